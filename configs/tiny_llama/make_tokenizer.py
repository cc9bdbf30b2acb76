"""Write the word-level tokenizer of the toy data into this folder.

PYTHONPATH=. python configs/tiny_llama/make_tokenizer.py
"""

import itertools
import re
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rm.data import toy

CHAT_TEMPLATE = """\
{%- if tools %}{{ '<|system|>' + (tools | tojson) + '<|end|>' }}{% endif %}
{%- for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""
SPECIAL_TOKENS = ("<pad>", "<unk>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the grammar (other words are <unk>); it ends a message with its EOS token, <|end|>."""
    tasks, phrases = toy.GRAMMAR["tasks"], [words for words in toy.GRAMMAR.values() if isinstance(words, list)]
    words = itertools.chain(tasks, *tasks.values(), *phrases, toy.GRAMMAR["phrase_reward"])
    text = " ".join(words).replace("{task}", " ").replace("{style}", " ")
    vocabulary = sorted(set(re.findall(r"\w+|[^\w\s]", text)))
    ids = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *vocabulary))}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    words.decoder = decoders.WordPiece(cleanup=True)  # no space before a full stop
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|end|>",
        additional_special_tokens=list(SPECIAL_TOKENS[3:]),
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


if __name__ == "__main__":
    build_tokenizer().save_pretrained(Path(__file__).parent)
