"""Tests of rm/token_html.py: what the picture of a trace says, with colours and without; and that texts can do nothing."""

import math
import re
from html.parser import HTMLParser

import pytest

from rm.log.token_html import NOTE, STRIP_CSS, Scale, pair_strips, sparkline, strip_html, strip_scale, strips_page

CHOSEN = [["", 1.0], ["good", 2.0], [" <b>", -1.0], ["!", 3.0]]
REJECTED = [["", 1.0], ["bad", -5.0]]
RECORD = {
    "id": "a", "step": 7, "prompt": "p", "chosen": "good <b>!", "rejected": "bad", "reward_chosen": 3.0,
    "reward_rejected": -5.0, "p_chosen": 0.99966, "margin": 8.0, "correct": "right",
    "trace_chosen": CHOSEN, "trace_rejected": REJECTED,
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
        return [attributes for tag, attributes in self.tags if tag == "span" and "title" in attributes]


def test_scale_by_hand():
    """The middle of 3 and -5, and the range of all."""
    assert strip_scale(CHOSEN, REJECTED) == Scale(middle=-1.0, low=-5.0, high=3.0)
    scale = Scale(middle=0.0, low=-1.0, high=4.0)  # colours are full at a distance of 4, above and below
    assert [scale.place(reward) for reward in (4.0, 9.0, 2.0, 0.0, -1.0, math.nan)] == [1.0, 1.0, 0.5, 0.0, -0.25, 0.0]
    assert strip_scale([["a", math.nan]], [["b", 2.0], ["", math.inf]]) == Scale(0.0, 0.0, 2.0)
    assert strip_scale([["a", 2.0]]) == Scale(2.0, 2.0, 2.0) and Scale(2.0, 2.0, 2.0).place(2.0) == 0.0


def test_strip_by_hand():
    """Distances from the middle, -1, of at most 4: 2 -> 3/4 of 6 levels (even: 4), -1 -> none, 3 -> all."""
    page = Page(strip_html(CHOSEN, Scale(-1.0, -5.0, 3.0)))
    assert page.spans() == [
        {"class": "u", "style": "--n:4", "title": "+2.000 (+1.000)"},
        {"title": "-1.000 (-3.000)"},
        {"class": "u", "style": "--n:6", "title": "+3.000 (+4.000)"},
    ]
    assert "".join(page.text).endswith("good <b>!")
    page = Page(strip_html(REJECTED, Scale(-1.0, -5.0, 3.0)))
    assert page.spans() == [{"class": "d", "style": "--n:6", "title": "-5.000 (-6.000)"}]


def test_chart_by_hand():
    """SVG counts downwards; steps of one token; labelled axes; the same in words for who cannot see it."""
    fragment = strip_html(CHOSEN, Scale(-1.0, -5.0, 3.0))
    page = Page(fragment)
    paths = {a["class"]: a["d"] for tag, a in page.tags if tag == "path"}
    assert paths["strip-line"] == "M0,-0.5V-0.5H1V-0.75H2V0H3V-1H4" and paths["strip-middle"] == "M0,0H4"
    assert paths["strip-up"] == "M0,0V-0.5H1V-0.75H2V0H3V-1H4V0Z" and paths["strip-down"] == "M0,0V0H1V0H2V0H3V0H4V0Z"
    (view,) = [a["viewbox"] for tag, a in page.tags if tag == "svg"]
    assert view == "0 -1.050 4 2.100"
    assert page.text[:6] == ["+3.00", "reward", "-5.00", "prompt’s end", "token", "3"]
    (label,) = [a["aria-label"] for _, a in page.tags if "aria-label" in a]
    assert label == "reward after each of 3 tokens: first +1.000, last +3.000, lowest -1.000, highest +3.000"
    assert "first token" in strip_html([["a", 1.0], ["b", 2.0]], Scale(0.0, 0.0, 2.0))  # there was no prompt


def test_without_colour_the_lines_tell():
    assert re.search(r"\.u \{ border-bottom: [^}]*solid", STRIP_CSS)
    assert re.search(r"\.d \{ border-bottom: [^}]*dotted", STRIP_CSS)
    assert "prefers-color-scheme: dark" in STRIP_CSS


def test_a_pair_shares_its_scale():
    fragment = pair_strips(RECORD)
    assert fragment.count("<span>+3.00</span><span>reward</span><span>-5.00</span>") == 2
    text = "".join(Page(fragment).text)
    assert "chosen, reward +3.000 (middle -1.000)" in text and "rejected, reward -5.000 (middle -1.000)" in text


def test_page():
    """Whole, without a network, and honest."""
    page = strips_page([RECORD, RECORD | {"id": "b", "margin": "nan", "p_chosen": "nan", "correct": "nan"}])
    assert page.startswith("<!DOCTYPE html>") and page.count(STRIP_CSS) == 1
    assert not re.search(r"https?:|src=|@import|url\(", page)
    assert NOTE in page and "Only the reward at the last token is trained" in NOTE
    text = "".join(Page(page).text)
    assert "a: right, margin +8.000, P = 1.000" in text and "b: nan, margin +nan" in text and "step 7" in text


@pytest.mark.parametrize("rewards", [[math.nan], [math.nan, math.inf], [0.0, 0.0], [1e30, -1e30], ["nan", "-inf", 1]])
def test_any_numbers(rewards):
    """As they are in the run, and as they are read back from samples/step-N.jsonl."""
    trace = [["x", reward] for reward in rewards]
    fragment = strip_html(trace, strip_scale(trace))
    assert len(Page(fragment).spans()) == len(rewards)
    assert not re.search("nan|inf", " ".join(re.findall(r' (?:d|viewBox)="([^"]*)"', fragment)))
    assert len(sparkline(trace).split()) == 3


def test_texts_can_do_nothing():
    record = RECORD | {"id": NASTY, "prompt": NASTY, "trace_chosen": [[NASTY, 1.0]], "trace_rejected": [[NASTY, 0.0]]}
    page = strips_page([record])
    plain = {tag for tag, _ in Page(strips_page([RECORD])).tags}
    parsed = Page(page)
    assert {tag for tag, _ in parsed.tags} == plain and not any("onerror" in a for _, a in parsed.tags)
    assert "".join(parsed.text).count("<script>alert(1)</script>") == 4
    assert "\x1b" not in page and "\u202e" not in page and r"\x1b[31m\u202e\ud83d" in page
    page.encode()  # no half characters


@pytest.mark.parametrize("unicode, bars", [(True, "▁▄█▅"), (False, "_-#=")])
def test_sparkline_by_hand(unicode, bars):
    """-1 to 1 in eight steps of 0.25."""
    trace = [["", -1.0], ["a", -0.125], ["b", 1.0], ["c", 0.0]]
    assert sparkline(trace, unicode=unicode) == f"-1.00 {bars} +0.00"


def test_sparkline_fits():
    trace = [["", 0.0], *(["x", float(i)] for i in range(1000)), ["end", -1.0]]
    line = sparkline(trace, width=30)
    assert len(line) == 30 and line.startswith("+0.00 ▁▁") and line.endswith("█▁ -1.00")  # first and last are kept
    assert sparkline([["", 0.5]]) == "+0.50 ▅ +0.50"
    assert sparkline([["", 0.5], ["", 1.0]], low=0.0, high=8.0) == "+0.50 ▁▂ +1.00"
