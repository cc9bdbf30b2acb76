"""Tests of rm/log/token_html.py: what colours and bars say, and that no text in the data has an effect on the page."""

import math
import re
from html.parser import HTMLParser

import pytest

from rm.log.token_html import CSS, NOTE, token_bars, token_rewards_html, token_rewards_page

CHOSEN = [["", 1.0], ["good", 2.0], [" <b>", -1.0], ["!", 3.0]]
REJECTED = [["", 1.0], ["bad", -5.0]]
RECORD = {
    "id": "a", "step": 7, "prompt": "p", "chosen": "good <b>!", "rejected": "bad", "reward_chosen": 3.0,
    "reward_rejected": -5.0, "p_chosen": 0.99966, "margin": 8.0, "correct": "right",
    "token_rewards_chosen": CHOSEN, "token_rewards_rejected": REJECTED,
}  # fmt: skip
NASTY = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&amp;</p></style>\x1b[31m\u202e\ud83d]]>"


class Page(HTMLParser):
    """The tags, attributes and text of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)

    def spans(self) -> list[dict]:
        return [attributes for tag, attributes in self.tags if tag == "span"]


def test_html_by_hand():
    """The mean of 3 and -5 is -1; the furthest reward is 4 away. 2: 3/4 above it; 3: the whole way; -5: below it."""
    chosen, rejected = map(Page, token_rewards_html(CHOSEN, REJECTED))
    assert chosen.spans() == [
        {"class": "u", "style": "--v:0.75", "title": "+2.000 (+1.000)"},
        {"title": "-1.000 (-3.000)"},
        {"class": "u", "style": "--v:1", "title": "+3.000 (+4.000)"},
    ]
    assert chosen.text == ["+1.00 ▇█▅█ +3.00", "good", " <b>", "!"]
    assert rejected.spans() == [{"class": "d", "style": "--v:1", "title": "-5.000 (-6.000)"}]
    assert rejected.text == ["+1.00 ▇▁ -5.00", "bad"]


def test_without_colour_the_lines_tell():
    assert re.search(r"\.u \{[^}]*border-bottom: solid", CSS) and re.search(r"\.d \{[^}]*border-bottom: dotted", CSS)
    assert "prefers-color-scheme: dark" in CSS


def test_page():
    page = token_rewards_page([RECORD, RECORD | {"id": "b", "margin": "nan", "correct": "nan"}])
    assert page.startswith("<!DOCTYPE html>") and page.count(CSS) == 1 and NOTE in page
    assert not re.search(r"https?:|src=|@import|url\(", page)  # no network
    text = " ".join(Page(page).text)
    assert "a: right, margin +8.000" in text and "b: nan, margin +nan" in text


@pytest.mark.parametrize(
    "rewards", [[math.nan], [math.nan, math.inf], [0.0, 0.0], [1e30, -1e30], ["NaN", "-Infinity", 1]]
)
def test_any_numbers(rewards):
    """As they are in a run, and as they are in samples/step-N.jsonl."""
    (fragment,) = token_rewards_html([["x", reward] for reward in rewards])
    page = Page(fragment)
    assert len(page.spans()) == len(rewards) and len(page.text[0].split()) == 3
    assert not re.search("nan|inf", " ".join(span.get("style", "") for span in page.spans()))


def test_texts_have_no_effect():
    tokens = {"token_rewards_chosen": [[NASTY, 1.0]], "token_rewards_rejected": [[NASTY, 0.0]]}
    page = token_rewards_page([RECORD | {"id": NASTY, "prompt": NASTY} | tokens])
    parsed = Page(page)
    assert {tag for tag, _ in parsed.tags} == {tag for tag, _ in Page(token_rewards_page([RECORD])).tags}
    assert not any("onerror" in attributes for _, attributes in parsed.tags)
    assert "".join(parsed.text).count("<script>alert(1)</script>") == 4
    assert "\x1b" not in page and "\u202e" not in page and r"\x1b[31m\u202e\ud83d" in page
    page.encode()  # no lone surrogates


@pytest.mark.parametrize("unicode, bars", [(True, "▁▄█▅"), (False, "_-#=")])
def test_bars_by_hand(unicode, bars):
    """-1 to 1 in eight levels of 0.25."""
    assert token_bars([[["", -1.0], ["a", -0.125], ["b", 1.0], ["c", 0.0]]], 60, unicode) == [f"-1.00 {bars} +0.00"]


def test_bars_fit_and_share_a_scale():
    long, short = [["", 0.0], *(["x", float(i)] for i in range(1000)), ["end", -1.0]], [["", -1.0], ["", 999.0]]
    first, second = token_bars([long, short], width=30)
    assert len(first) == 30 and first.startswith("+0.00 ▁▁") and first.endswith("█▁ -1.00")  # first and last are kept
    assert second == "-1.00 ▁█ +999.00"
    assert token_bars([[["", 0.5]]], 60) == ["+0.50 ▁ +0.50"]
