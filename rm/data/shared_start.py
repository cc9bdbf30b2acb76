"""Encode the start that the two texts of a pair share once, with the token ids of two separate encodings.

Tokenizing is the longest part of a first start on much data, and most of a pair's text is shared. Whether a text may be
cut is told from the tokenizer's definition (`can_share_prefix`); where it may not, both texts are encoded in full.
"""

import json
import re

from transformers import PreTrainedTokenizerFast


def encode_pairs(
    chosen: list[str], rejected: list[str], tokenizer, *, add_special_tokens: bool, share_prefix: bool
) -> tuple[list[list[int]], list[list[int]]]:
    """`tokenizer(text)["input_ids"]` of every text, in one call of the tokenizer so that it uses every core.

    `share_prefix` (only if `can_share_prefix`) encodes the start that the two texts of a pair share once: the rejected
    side is the tokens of the chosen one up to a space between two words, and an encoding of the rest.
    """
    if not share_prefix:
        quiet = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        ids = tokenizer(chosen + rejected, add_special_tokens=add_special_tokens, **quiet)["input_ids"]
        return ids[: len(chosen)], ids[len(chosen) :]
    leading = tokenizer("", add_special_tokens=add_special_tokens)["input_ids"]  # also resets padding and truncation
    backend = tokenizer.backend_tokenizer
    encodings = backend.encode_batch(chosen, add_special_tokens=add_special_tokens)
    cuts = [_cut(*pair) for pair in zip(encodings, chosen, rejected, strict=True)]
    rests = [text[position:] for text, (position, _) in zip(rejected, cuts, strict=True)]
    rests = backend.encode_batch_fast(rests, add_special_tokens=False)
    chosen_ids = [encoding.ids for encoding in encodings]
    parts = zip(chosen_ids, cuts, rests, strict=True)
    return chosen_ids, [(ids[:n] if n else leading) + rest.ids for ids, (_, n), rest in parts]


def _cut(encoding, chosen: str, rejected: str) -> tuple[int, int]:
    """(characters, tokens) of `chosen` that need not be encoded again for `rejected`; (0, 0) if none.

    The cut is at a space between two ASCII letters, where `encoding` starts a new word, and the word after it is shared
    as well: so whatever the tokenizer looks at before the cut is the same in both texts.
    """
    end = chosen.rfind(" ", 0, _shared_characters(chosen, rejected))  # the last shared word ends here
    while (end := chosen.rfind(" ", 0, max(end, 0))) > 0:
        around = chosen[end - 1] + chosen[end + 1]
        if around.isascii() and around.isalpha():
            token = encoding.char_to_token(end + 1)
            starts_here = token and encoding.token_to_chars(token)[0] >= end
            if starts_here and encoding.token_to_chars(token - 1)[1] <= end:
                if encoding.token_to_word(token) != encoding.token_to_word(token - 1):
                    return end, token
            return 0, 0
    return 0, 0


def _shared_characters(a: str, b: str) -> int:
    low, high = 0, min(len(a), len(b))
    while low < high:  # bisection: comparing slices is fast, comparing characters is not
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def can_share_prefix(tokenizer) -> bool:
    """Whether a text may be encoded in two parts, cut as `_cut` does, for the same ids: told from its definition.

    It may if the text is first split into words (`_cut` sees to it that they end at spaces), where a word's end depends
    on its own characters and the next one only, nothing is appended to a text, and no added token reaches over a space.
    True for byte-level BPE (GPT-2, GPT-NeoX, Llama 3, Qwen, SmolLM), false for SentencePiece (Llama 2, Gemma) and BERT.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return False
    if type(tokenizer)._encode_plus is not PreTrainedTokenizerFast._encode_plus:
        return False
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    splitter, normalizer = definition["pre_tokenizer"] or {}, definition["normalizer"] or {}
    with_special, without = (tokenizer("a", add_special_tokens=flag)["input_ids"] for flag in (True, False))
    return (
        all(_splits_locally(step) for step in splitter.get("pretokenizers", [splitter]))
        and all(step.get("type") in (None, "NFC", "Lowercase") for step in normalizer.get("normalizers", [normalizer]))
        and not definition["model"].get("dropout")
        and with_special == tokenizer("")["input_ids"] + without
        and not any(_reaches_over_space(token) for token in definition["added_tokens"])
    )


def _reaches_over_space(token: dict) -> bool:
    flags = token["lstrip"] or token["rstrip"] or token["single_word"]
    return flags or re.search("[a-zA-Z] [a-zA-Z]", token["content"]) is not None


def _splits_locally(step: dict) -> bool:
    """Whether a pre-tokenizer step splits a text the same way wherever, at a word, the text begins."""
    if step.get("type") == "ByteLevel":
        return not step["add_prefix_space"]
    if step.get("type") == "Split":  # a look behind, an anchor or a merge with neighbours would see what is before
        regex = step["pattern"].get("Regex", "^").replace("[^", "[")
        looks_back = any(part in regex for part in ("(?<", "^", "\\b", "\\B", "\\A", "\\G"))
        return step["behavior"] in ("Isolated", "Removed") and not looks_back
    return step.get("type") in ("Digits", "Punctuation", "Whitespace", "WhitespaceSplit")
