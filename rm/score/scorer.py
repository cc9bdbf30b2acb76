"""The one loop that scores prompts, for evaluation, token rewards and `rm.score`; a saved model that scores inputs.

An input is a dict. The first of `FORMS` whose keys it has decides what it is; other keys are ignored. Text is scored as
text and messages by the chat template, as in training; a prompt and answers of text are messages too with
`text_as_conversation`. To a prompt of messages an answer may be a message, a list of messages, or text.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from rm.collate import Batch, collate_trees
from rm.config.errors import InputError
from rm.config.options import QuantizationOptions, TokenOptions
from rm.config.section import fields_of
from rm.data.example import SIDES, Encoding, Example, RowError, make_example, stored_messages, template_variables
from rm.data.layouts import NUMBERS, TOKEN_COLUMNS, read_group, read_token_group, read_tokens
from rm.data.plan import Layout, plan_micro_batches
from rm.data.tokenize import Tree, encode_examples, is_blank, is_rendered, make_tree, truncate_left
from rm.data.tokenizer import load_tokenizer
from rm.forward import choose_layout, score_batch
from rm.model.load import conversations_from_text, load_saved_model, read_scale, recorded_config
from rm.model.reward_model import cast_weights, is_half_precision, max_positions, set_tf32, unwrapped

logger = logging.getLogger(__name__)

MASKS = {**TOKEN_COLUMNS, ("input_ids",): ("attention_mask",)}  # keys of token ids -> those of their attention masks
FORMS = [*MASKS, SIDES, ("responses",), ("prompt", "response"), ("prompt", "completion"), ("messages",), ("text",)]
ACCEPTED = (*fields_of(TokenOptions), *fields_of(QuantizationOptions), "dtype", "trust_remote_code")
ACCEPTED += ("micro_batch_tokens", "layout", "mixed_precision", "eval_dtype", "tf32", "attn_implementation")
CHARACTERS = 256  # of a token, on average, at most: a longer text is not tokenized


class TreeList(list[Tree]):
    """Trees in memory, with what scoring needs of `PreferenceData`."""

    @property
    def num_answers(self) -> np.ndarray:
        return np.array([len(tree.answers) for tree in self], np.int64)

    def costs(self, layout: Layout) -> np.ndarray:
        if layout.name == "shared_prefix":
            return np.array([len(tree) for tree in self], np.int64)
        lengths = [list(map(len, tree.sequences())) for tree in self]
        return np.array([sum(each) if layout.by_tree else len(each) * max(each) for each in lengths], np.int64)

    def trees(self, indices: Sequence[int]) -> list[Tree]:
        return [self[i] for i in indices]


@torch.no_grad()
def score_prompts(
    model: nn.Module,
    data: Any,
    layout: Layout,
    micro_batch_tokens: int,
    accelerator: Accelerator | None = None,
    every_token: bool = False,
) -> list[np.ndarray]:
    """Rewards of the N answers of every prompt, float64 [N] each, in the order of `data`. Collective.

    Each process scores its share and writes it into a table of zeros; the sum over processes is the whole table. So no
    prompt is scored twice, and the result depends on batches, layout and processes by float rounding only.

    Args:
        model: a `RewardModel`, prepared or not; in eval mode during the call.
        data: `PreferenceData` or a `TreeList`.
        micro_batch_tokens: tokens of one forward pass, padding included; a larger prompt runs alone.
        accelerator: None: one process.
        every_token: return the reward of every beginning of every answer's sequence instead, one answer after the other
            (float64 [tokens of all sequences]). For causal models.
    """
    if not len(data):
        return []
    counts = data.num_answers
    if every_token:
        counts = np.array([sum(map(len, tree.sequences())) for tree in data.trees(range(len(data)))], np.int64)
    num_processes, process = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
    plans = plan_micro_batches(np.arange(len(data)), data.costs(layout), layout, micro_batch_tokens, num_processes)
    ends, device = np.cumsum(counts), next(model.parameters()).device
    table = torch.zeros(int(ends[-1]), 2, device=device)  # reward (float32 as computed), times scored
    was_training = model.training
    model.eval()
    for micro_batch in plans[process]:
        prompts = micro_batch.prompts
        batch = collate_trees(data.trees(prompts), micro_batch, layout).to(device)
        rewards = score_batch(model, _at_every_token(batch) if every_token else batch)
        if not micro_batch.is_dummy:
            places = torch.from_numpy(np.concatenate([np.arange(ends[p] - counts[p], ends[p]) for p in prompts]))
            table[places.to(device)] += torch.stack([rewards, torch.ones_like(rewards)], dim=1)
    model.train(was_training)
    table = (accelerator.reduce(table, "sum") if accelerator else table).cpu().numpy()  # collective
    assert (table[:, 1] == 1).all(), "an answer was scored twice or not at all"
    return np.split(table[:, 0].astype(np.float64), ends[:-1])


def _at_every_token(batch: Batch) -> Batch:
    """The batch with every token of each sequence, from its first to its last, as the end of a sequence."""
    places = []
    for row, end in zip(batch.end_row_N, batch.end_index_N, strict=True):
        is_own_L = torch.arange(batch.input_ids_RL.shape[1], device=end.device) <= end
        if batch.is_packed:
            tree_L, branch_L = batch.tree_RL[row], batch.branch_RL[row]
            is_own_L = (tree_L == tree_L[end]) & ((branch_L == 0) | (branch_L == branch_L[end]))
        places.append(is_own_L.nonzero()[:, 0])
    counts = torch.tensor(list(map(len, places)), device=batch.end_row_N.device)
    return replace(batch, end_row_N=batch.end_row_N.repeat_interleave(counts), end_index_N=torch.cat(places))


# ---------------------------------------------------------------- a saved model
class Scorer:
    """A saved reward model: `load_scorer("runs/my_run").rewards([{"prompt": …, "responses": […]}])`.

    It is on the accelerator if there is one. The rewards are those of `rm.evaluate`: the options are those of the run's
    config.yaml (of a model from elsewhere: the defaults). Raises `InputError`.

    Args:
        model: the output folder of a run, or a hub name.
        normalize: return (r - mean) / std, with the moments of the rewards of answers of the training set.
        options: of `RewardConfig` (`ACCEPTED`). Without `max_length` a sequence is limited by
            the positions of the model (if they are computed: those it was trained on, or the training's `max_length` if
            it is larger); without `micro_batch_tokens` it is twice the training's, or its `eval_micro_batch_tokens`.
    """

    def __init__(self, model: str, *, normalize: bool = False, **options: Any):
        if unknown := [name for name in options if name not in ACCEPTED]:
            raise InputError(f"{unknown[0]}: has no effect in scoring; there are {', '.join(ACCEPTED)}")
        config = recorded_config(model, {"dataset_name": "toy"} | options)  # no data set is read
        set_tf32(config.tf32)
        self.tokenizer = load_tokenizer(config)
        self.model = load_saved_model(model, self.tokenizer, config).eval()
        self.mean, self.std = read_scale(model, self.model) if normalize else (0.0, 1.0)
        as_conversation, why = conversations_from_text(config, self.tokenizer)
        if self.tokenizer.chat_template:
            logger.info(why)
        trained = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        usual = max(trained, config.max_length or 0) if trained else None
        limits = (config.max_length if "max_length" in options else usual, max_positions(self.model))
        self.encoding = Encoding(
            add_eos=config.add_eos,
            text_as_conversation=as_conversation,
            chat_template_kwargs=config.chat_template_kwargs or {},
            max_length=min(filter(None, limits), default=None),
            overlength=config.overlength if "overlength" in options else "drop",
            vocab_size=max(self.tokenizer.get_vocab().values()) + 1,
        )
        self.micro_batch_tokens = config.micro_batch_tokens
        if "micro_batch_tokens" not in options:
            self.micro_batch_tokens = config.eval_micro_batch_tokens or 2 * config.micro_batch_tokens
        self.device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        if not getattr(unwrapped(self.model.classifier), "is_quantized", False):  # bitsandbytes chose the device
            self.model = self.model.to(self.device)
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.mixed_precision)
        self.autocast = torch.autocast(self.device.type, half, enabled=half is not None)
        tolerance = 5e-2 if is_half_precision(self.model, config.mixed_precision, config.tf32) else 1e-4
        ordinary = set(self.tokenizer.get_vocab().values()) - set(self.tokenizer.added_tokens_decoder)
        vocabulary, rng = np.array(sorted(ordinary) or [self.tokenizer.pad_token_id]), np.random.default_rng(0)
        draws = [[rng.choice(vocabulary, n) for n in (20 + i, 8, 5 + i)] for i in range(4)]
        trees = TreeList([Tree(prefix, answers) for prefix, *answers in draws])  # on which the layout is verified
        with self.autocast:
            self.layout = choose_layout(config.layout, self.model, trees, self.tokenizer.pad_token_id)
        self.eval_dtype = config.eval_dtype
        self.rounding = (5e-2 if self.eval_dtype else tolerance) / min(self.std, 1.0)  # of a reward, if scored again

    def rewards(self, records: Sequence[dict]) -> list[np.ndarray]:
        """The rewards of each input's answers, float64 [1], [N] or [2] (chosen, rejected).

        Raises `InputError` with the index of an input that cannot be scored.
        """
        results = self.results(records)
        for i, result in enumerate(results):
            if isinstance(result, RowError):
                raise InputError(f"input {i}: {result}")
        return results

    def results(self, records: Sequence[Any]) -> list[np.ndarray | RowError]:
        """As `rewards`, but with a `RowError` for an input that cannot be scored, or is one."""
        results: list = encode_inputs(records, self.tokenizer, self.encoding)
        places = [i for i, tree in enumerate(results) if isinstance(tree, Tree)]
        pieces = TreeList([piece for i in places for piece in self._split(results[i])])
        with cast_weights(self.model, self.eval_dtype), self.autocast:
            scored = score_prompts(self.model, pieces, self.layout, self.micro_batch_tokens)
        rewards = iter((np.concatenate([[], *scored]) - self.mean) / self.std)
        for i in places:
            found = np.array([next(rewards) for _ in results[i].answers])
            results[i] = found if np.isfinite(found).all() else RowError("the reward is not finite")
        return results

    def _split(self, tree: Tree) -> list[Tree]:
        """The tree as several, each with its prefix, so that one fits into a forward pass if a single answer does."""
        limit = self.micro_batch_tokens if self.layout.name == "shared_prefix" else 0  # 0: each answer alone
        parts: list[Tree] = []
        for answer in tree.answers:
            if not parts or len(parts[-1]) + len(answer) > limit:
                parts.append(Tree(tree.prefix, []))
            parts[-1].answers.append(answer)
        return parts


# ---------------------------------------------------------------- inputs to trees
def form_of(record: Any) -> tuple[tuple[str, ...], str]:
    """Which of `FORMS` an input is, and the key of its N answers if it is a group (otherwise ""). Raises `RowError`."""
    if type(record) is not dict:
        raise RowError("not a JSON object with keys")
    for keys in FORMS:
        if all(record.get(key) is not None for key in keys):
            key, ids = keys[-1], record.get("input_ids")
            is_group = key == "responses" or key == "input_ids" and type(ids) is list and list in map(type, ids)
            return keys, key if is_group else ""
    raise RowError("nothing to score; give text, messages, prompt and response or responses, or chosen and rejected")


def read_input(record: Any, encoding: Encoding, tokenizer: Any) -> Example:
    """The example of an input, without labels. A rendered prompt stays text. Raises `RowError`."""
    keys, group = form_of(record)
    if type(record.get("prompt")) is str and is_rendered(record["prompt"], tokenizer):
        encoding = replace(encoding, text_as_conversation=False)
    if keys == ("messages",):
        record = record | {"messages": stored_messages(record["messages"])}
    for key in {"responses", "messages"} & set(keys):
        if type(record[key]) is not list or not record[key]:
            raise RowError(f"{key!r} must be a list, and not empty")
    if group:  # its labels have no effect
        read = read_group if group == "responses" else read_token_group
        row = record | dict.fromkeys(NUMBERS) | {"comparisons": []}
        roles = {name: name for name in ("prompt", "responses", "comparisons") if row.get(name) is not None}
        example = read(row, replace(encoding, roles=roles))
    elif keys in MASKS:
        example = read_tokens(record, encoding, keys, MASKS[keys])
    else:
        prompt = None if keys in (("text",), ("messages",)) else record.get("prompt")
        example = make_example(prompt, {k: record[k] for k in keys if k != "prompt"}, encoding.text_as_conversation)
    for name, answer in zip(example.names, example.answers, strict=True):
        if example.kind != "tokens" and is_blank(answer):
            raise RowError(f"{name!r} is blank")
    size = 0 if example.kind == "tokens" else len(str((example.prompt, example.answers)))
    if size > CHARACTERS * len(example.answers) * (encoding.max_length or 2**20):
        raise RowError(f"has {size:,} characters, which are more than {encoding.max_length or 2**20:,} tokens")
    if example.kind == "conversation":
        example.variables = template_variables(record, encoding.chat_template_kwargs)
    return example


def encode_inputs(records: Sequence[Any], tokenizer: Any, encoding: Encoding) -> list[Tree | RowError]:
    """Each input's sequences as a tree, their common prefix once; or the `RowError` that it has or is.

    A sequence longer than `encoding.max_length` is an error, or truncated (`encoding.overlength`).
    """
    examples: list[Example | RowError] = []
    for record in records:
        try:
            examples.append(record if isinstance(record, RowError) else read_input(record, encoding, tokenizer))
        except RowError as error:
            examples.append(error)
    encoded = zip(examples, encode_examples(examples, tokenizer, encoding), strict=True)
    return [_tree(example, sequences, tokenizer.bos_token_id, encoding) for example, sequences in encoded]


def _tree(example: Example, sequences: Any, bos: int | None, encoding: Encoding) -> Tree | RowError:
    if isinstance(sequences, RowError):
        return sequences
    limit = encoding.max_length or math.inf
    for name, ids in zip(example.names, sequences, strict=True):
        if not len(ids):
            return RowError(f"{name!r} has no tokens")
        if len(ids) > limit and encoding.overlength == "drop":
            return RowError(f"{name!r} has {len(ids)} tokens, the limit is {limit}; overlength=truncate_left cuts it")
    if max(map(len, sequences)) > limit:
        sequences = truncate_left(sequences, limit, bos)
    return make_tree(sequences)
