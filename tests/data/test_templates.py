"""Chat templates that fail or write the date; blank answers."""

import pytest
from examples import IDS, TALK, TEMPLATE, decoded, say, word_tokenizer
from tokenizers import processors

from rm.config.errors import InputError

CALL = {"role": "assistant", "content": "", "tool_calls": [{"name": "city"}]}
PART = [{"type": "text", "text": "a"}]
TEMPLATES = {
    "syntax": ("{% for m in messages %}", "rejects the messages: TemplateSyntaxError"),
    "exception": ("{{ raise_exception('no such role') }}", "rejects the messages: TemplateError: no such role$"),
    "recursion": ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "rejects the messages: RecursionError"),
    "loop in itself": ("{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}", "the messages: RecursionError"),
    "nesting": ("{% if true %}" * 3000 + "{% endif %}" * 3000, "rejects the messages: RecursionError"),
    "long range": ("{% for i in range(10**9) %}{% endfor %}", "rejects the messages: OverflowError: Range too big"),
    "attributes": ("{{ ''.__class__.__mro__ }}", "rejects the messages: SecurityError"),
    "file": ("{% include '/etc/hostname' %}", "rejects the messages: TypeError: no loader"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_template_that_fails(data_of, name):
    template, message = TEMPLATES[name]
    with pytest.raises(InputError, match=f"rows.jsonl, row 1: the chat template .*{message}") as error:
        data_of([TALK, TALK], word_tokenizer(chat_template=template))
    assert "\n" not in str(error.value)


def test_the_row_that_a_template_rejects_is_named(data_of):
    bad = TALK | {"rejected": [{"role": "bad", "content": "a"}]}
    with pytest.raises(InputError, match="row 3: the chat template rejects the messages: TemplateError: no such role$"):
        data_of([TALK, TALK, bad, TALK])


def test_a_template_that_writes_the_date(data_of, caplog):
    dated = word_tokenizer(chat_template="{{ date_string or strftime_now('%Y') }}" + TEMPLATE)
    data_of([TALK], dated)
    assert "may write today's date into the prompt" in caplog.text
    caplog.clear()
    data_of([TALK], dated, chat_template_kwargs={"date_string": "date"})
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


SYSTEM = [{"role": "system", "content": "x"}]
RENDERED = "<|user|> hi <|end|> <|assistant|> a <|end|>"


@pytest.mark.parametrize("writes_bos", [True, False])
@pytest.mark.parametrize("bos", ["<bos> ", ""])
def test_rendered_text_has_the_tokens_of_its_conversation(data_of, writes_bos, bos):
    tokenizer = word_tokenizer(chat_template="{{ bos_token }}" * writes_bos + TEMPLATE, bos_token="<bos>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", None, [("<bos>", 3)])
    for before, text in (([], RENDERED), (SYSTEM, f"<|system|> x <|end|> {RENDERED}")):
        talk = {side: before + messages for side, messages in TALK.items()}
        rejected = text.replace("> a <", "> b <")
        prompt = text.removesuffix("a <|end|>")  # with what makes the model answer
        row = {"chosen": bos + text, "rejected": bos + rejected}
        cut = {"chosen": bos + text.removesuffix(" <|end|>"), "rejected": f"{bos}{rejected} \n"}
        apart = {"prompt": bos + prompt, "chosen": "a", "rejected": "b <|end|>"}
        expected = decoded(data_of([talk], tokenizer), tokenizer)
        for given, as_conversation in ((row, None), (cut, None), (apart, None), (apart, True)):
            data = data_of([given], tokenizer, text_as_conversation=as_conversation)
            assert decoded(data, tokenizer) == expected
    other = {"chosen": f"{bos}hi a", "rejected": f"{bos}hi b"}  # is not of the template
    assert decoded(data_of([other], tokenizer), tokenizer) == [("<bos> hi a <eos>", "<bos> hi b <eos>")]


def test_a_rendered_prompt_is_not_rendered_again(data_of, caplog):
    row = {"prompt": "<|user|> hi <|end|> <|assistant|> ", "chosen": "a", "rejected": "b"}
    with caplog.at_level("INFO"):
        assert data_of([row]).sets["rows"].encoding.format == "text_explicit_prompt"
        assert "text_as_conversation" not in caplog.text
        data_of([row], text_as_conversation=True)
    assert "rows.jsonl stays text: its prompts are rendered already" in caplog.text


BLANK = {  # a pair with a blank answer beside a whole one
    "text": ({"prompt": "hi ", "chosen": "", "rejected": "a"}, {"prompt": "hi ", "chosen": "b", "rejected": "a"}),
    "messages": ({"chosen": say("hi", " "), "rejected": say("hi", "b")}, TALK),
    "tokens": (IDS | {"chosen_ids": []}, IDS),
    "padding": (IDS | {"chosen_mask": [0, 0], "rejected_mask": [1, 1]},
                IDS | {"chosen_mask": [1, 1], "rejected_mask": [1, 1]}),
    "parts": ({"chosen": say("hi", []), "rejected": say("hi", PART)},
              {"chosen": say("hi", [*PART, *PART]), "rejected": say("hi", PART)}),
}  # fmt: skip


@pytest.mark.parametrize("name", BLANK)
def test_a_blank_answer_is_empty(data_of, name):
    data = data_of([*BLANK[name]])
    assert (data.audit["total"], data.audit["empty"], data.audit["kept"]) == (2, 1, 1)
    assert data.dataset["row"][:] == [[1]]


def test_a_call_of_a_tool_is_not_blank(data_of):
    assert data_of([{"chosen": [*say("hi"), CALL], "rejected": say("hi", "b")}, TALK]).audit["empty"] == 0
