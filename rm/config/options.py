"""`RewardConfig`: every option of a run, checked; and which of them a resumed run may change."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from rm.config.errors import InputError
from rm.config.redact import redact

TINY_LLAMA = "configs/tiny_llama"

Schedule = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "warmup_stable_decay",
    "reduce_lr_on_plateau",
    "greedy",
]
Optimizer = Literal["adamw_torch_fused", "adamw_torch", "adafactor", "sgd", "adagrad", "rmsprop"]


# What a resumed run may have otherwise than its checkpoint: nothing here changes the training beyond rounding ...
MAY_CHANGE_ON_RESUME = frozenset(
    "trust_remote_code attn_implementation gradient_checkpointing gradient_checkpointing_kwargs activation_offloading "
    "use_liger_kernel liger_kernel_config merge_adapter dataset_num_proc max_nonfinite_steps "
    "micro_batch_tokens eval_micro_batch_tokens auto_find_batch_size torch_compile layout output_dir "
    "overwrite_output_dir resume_from_checkpoint run_name logging_steps eval_steps save_steps save_total_limit "
    "num_print_samples num_normalization_samples report_to project load_best_model_at_end license push_to_hub "
    "hub_model_id hub_private_repo hub_strategy hub_token hub_revision".split()
)
# ... and these name things that are compared by their content (a file may lie elsewhere on another machine)
COMPARED_BY_CONTENT = frozenset(
    "model_name_or_path dataset_name eval_dataset_name chat_template_path peft_config".split()
)
LORA_OPTIONS = (
    "lora_r lora_alpha lora_dropout lora_target_modules lora_target_parameters lora_modules_to_save use_rslora use_dora"
).split()


def option(default: Any, help: str, section: str | None = None) -> Any:
    """A dataclass field with its `--help` line; `section` opens a new section of the help page."""
    metadata = {"help": help, "section": section}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class RewardConfig:
    """Flat, inputs only. Names are TRL's and transformers' wherever the meaning is the same."""

    # fmt: off
    model_name_or_path: str = option(TINY_LLAMA, "hub name or folder; a folder without weights is initialised from its config", "Model")
    model_revision: str = option("main", "branch, tag or commit on the hub")
    trust_remote_code: bool = option(False, "run code that comes with the model or tokenizer")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("float32", "type of the stored weights (the head and the loss are always float32)")
    attn_implementation: str | None = option(None, "sdpa, eager, flex_attention, flash_attention_2, ...; none: transformers' choice (on a CPU: sdpa_by_tree)")
    disable_dropout: bool = option(True, "set every dropout of the base model to 0 (lora_dropout is its own option)")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, about a third more time")
    gradient_checkpointing_kwargs: dict[str, Any] | None = option(None, "what torch.utils.checkpoint takes besides, as a dict; none: use_reentrant False")
    chat_template_path: str | None = option(None, "Jinja file, or folder of a tokenizer, whose chat template is used; none: the tokenizer's own")

    use_peft: bool = option(False, "train an adapter (LoRA, or peft_config's) and the head instead of all weights; if model_name_or_path is an adapter: train that one further", "PEFT")
    lora_r: int = option(16, "LoRA's rank")
    lora_alpha: int = option(32, "LoRA's scale: the update is multiplied by lora_alpha / lora_r")
    use_rslora: bool = option(False, "multiply by lora_alpha / sqrt(lora_r) instead (rank-stabilised LoRA)")
    use_dora: bool = option(False, "train the length of every column of weights besides its direction (DoRA)")
    lora_dropout: float = option(0.05, "dropout on the adapter's input; 0: off")
    lora_target_modules: str | list[str] | None = option(None, "layer names, or all-linear; none: PEFT's choice for the architecture")
    lora_target_parameters: list[str] | None = option(None, "names of parameters that are no layers, such as mlp.experts.gate_up_proj; none: layers only")
    lora_modules_to_save: list[str] | None = option(None, "modules trained in full besides the head, and saved with the adapter; none: the head alone")
    peft_config: str | None = option(None, "JSON or YAML file with any PEFT method's config (peft_type: IA3, ...), instead of the lora_ options; none: LoRA")
    merge_adapter: bool = option(False, "save the final model with the adapter merged into the weights (the adapter goes to adapter/)")
    load_in_4bit: bool = option(False, "quantise the base to 4 bits under the adapter (needs bitsandbytes and use_peft)")
    load_in_8bit: bool = option(False, "quantise the base to 8 bits under the adapter (the same)")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = option("nf4", "data type of 4-bit weights")
    use_bnb_nested_quant: bool = option(False, "quantise the scales of 4-bit weights too")
    bnb_4bit_quant_storage: str | None = option(None, "torch type that 4-bit weights are stored as, such as bfloat16; none: uint8")

    dataset_name: str | list[str] = option("toy", "hub name, .json/.jsonl/.parquet/.csv file (also .gz), save_to_disk folder, or toy (embedded); several as a list", "Data")
    dataset_weights: list[float] | None = option(None, "passes over each data set in an epoch: 1 is every pair once, 0.5 a random half, 2 every pair twice; none: 1 for each")
    dataset_config: str | list[str | None] | None = option(None, "configuration (subset) of a hub data set; of several data sets a list, null for one without")
    dataset_train_split: str = option("train", "split to train on")
    dataset_test_split: str = option("test", "split to evaluate on")
    eval_dataset_name: str | list[str] | dict[str, str] | None = option(None, "other data to evaluate on: a data set, several as a list or {name: data set}, each with metrics of its own; none: dataset_test_split of dataset_name")
    eval_dataset_config: str | list[str | None] | None = option(None, "configuration (subset) of eval_dataset_name; of several data sets a list, null for one without")
    eval_fraction: float | None = option(None, "fraction of the training split (of each data set's) that is held out for evaluation; none: use a test split")
    max_train_samples: int | None = option(None, "use the first N pairs of each data set, before weights (toy: draw N pairs); none: all")
    max_eval_samples: int | None = option(None, "use the first N evaluation pairs of each data set (toy: draw N pairs); none: all")
    max_length: int | None = option(1024, "tokens in one sequence (prompt + answer); none: no limit")
    overlength: Literal["drop", "truncate_left"] = option("drop", "pairs longer than max_length: drop them, or cut the start of the prompt (truncate_left)")
    add_eos: bool = option(True, "append the EOS token to plain text (conversations end as their template says)")
    text_as_conversation: bool | None = option(None, "make plain text with a prompt column a conversation, the user's prompt and the assistant's answer, by the chat template; none: only data that are evaluated on, if the model is trained on conversations")
    margin_from_scores: bool = option(False, "margin = score_chosen - score_rejected")
    chat_template_kwargs: dict[str, Any] | None = option(None, "extra variables for the chat template, as a dict")
    dataset_num_proc: int | None = option(None, "processes for rendering and tokenizing; none: one")

    center_rewards_coefficient: float | None = option(None, "weight of (r_chosen + r_rejected)^2, which centres rewards on 0; 0.01 recommended; none: off", "Loss")
    label_smoothing_factor: float = option(0.0, "probability that a label is wrong, in [0, 0.5); 0: off")

    train_batch_size: int | None = option(None, "pairs per optimizer step over all processes; none: 64, or from the next two", "Optimization")
    per_device_train_batch_size: int | None = option(None, "TRL's way to say it: x gradient_accumulation_steps x processes = train_batch_size")
    gradient_accumulation_steps: int | None = option(None, "factor of per_device_train_batch_size (memory is micro_batch_tokens' business); none: 1")
    learning_rate: float = option(1e-4, "peak learning rate")
    head_learning_rate: float | None = option(None, "peak learning rate of the reward head; none: learning_rate")
    num_train_epochs: float = option(1.0, "passes over the training pairs")
    max_steps: int = option(-1, "optimizer steps; overrides num_train_epochs; -1: off")
    lr_scheduler_type: Schedule = option("linear", "a schedule of transformers.get_scheduler, such as cosine; reduce_lr_on_plateau and greedy go by evaluations")
    lr_scheduler_kwargs: dict[str, Any] | None = option(None, "what that schedule takes besides, as a dict")
    warmup_ratio: float = option(0.0, "fraction of all steps with a rising learning rate; 0: off")
    warmup_steps: int | float = option(0, "steps with a rising learning rate; below 1: fraction of all steps; 0: use warmup_ratio")
    optim: Optimizer = option("adamw_torch_fused", "optimizer, by transformers' name")
    optim_args: dict[str, Any] | None = option(None, "what the optimizer takes besides, as a dict or as name=value,name=value")
    weight_decay: float = option(0.0, "decay of weight matrices (never of biases and norms); 0: off")
    adam_beta1: float = option(0.9, "AdamW beta 1")
    adam_beta2: float = option(0.999, "AdamW beta 2")
    adam_epsilon: float = option(1e-8, "AdamW epsilon")
    max_grad_norm: float = option(1.0, "clip the global gradient norm to this; 0: off (the norm is still logged)")
    max_nonfinite_steps: int = option(0, "steps in a row that may be left out because their loss or gradient is NaN or infinite; 0: the first one ends the run")
    neftune_noise_alpha: float | None = option(None, "NEFTune: noise of at most alpha / sqrt(tokens in the sequence x width) on input embeddings in training; 5 to 15; none: off")
    seed: int = option(42, "everything random is a function of (seed, step, process)")
    full_determinism: bool = option(False, "deterministic kernels where there is a choice: the same bits on a GPU too, slower")

    micro_batch_tokens: int = option(8192, "padded tokens per forward pass on one device; changes memory, not results", "Hardware")
    eval_micro_batch_tokens: int | None = option(None, "the same in evaluation; none: 2 x micro_batch_tokens")
    auto_find_batch_size: bool = option(False, "out of memory: halve micro_batch_tokens and repeat the step, same numbers (DDP then sums gradients after the backward pass)")
    torch_compile: bool = option(False, "compile the repeated layer (about 15 s a graph, in the first steps): faster where it is long used")
    layout: Literal["auto", "shared_prefix", "concatenated"] = option("auto", "how pairs become rows; auto: shared_prefix where a start-up check proves it right")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(None, "autocast; none: as `accelerate launch` was told")

    eval_dtype: Literal["bfloat16", "float16"] | None = option(None, "cast the weights to this type for the evaluations of the run (TRL: bf16_full_eval); none: as in training")
    tf32: bool | None = option(None, "multiply float32 matrices in TF32 (NVIDIA, Ampere or newer), or never; none: torch's choice")
    use_liger_kernel: bool = option(False, "Liger's Triton kernels for norms, MLPs and rotary positions (needs liger-kernel and a GPU)")
    liger_kernel_config: dict[str, bool] | None = option(None, "which of them, as a dict such as {rope: false}; none: all")
    activation_offloading: bool = option(False, "keep activations in the CPU's memory until the backward pass: less memory, more time; needs a GPU")

    output_dir: str | None = option(None, "folder of the run; none: runs/<run_name>", "Output")
    overwrite_output_dir: bool = option(False, "allow an output_dir that already holds a run")
    resume_from_checkpoint: str | None = option(None, "checkpoint folder to go on from, or latest: the newest in output_dir (if there is none, from the start); none: start anew")
    run_name: str | None = option(None, "name of the run; none: <model>-<data set>-<time>")
    logging_steps: int | float = option(10, "steps between lines of training metrics; below 1: fraction of all steps")
    eval_steps: int | float = option(0, "steps between evaluations; below 1: fraction of all steps; 0: only at the end")
    eval_on_start: bool = option(False, "evaluate before the first step too")
    save_steps: int | float = option(0, "steps between checkpoints in checkpoints/step-N; below 1: fraction; 0: off (the final model is always saved)")
    save_total_limit: int | None = option(None, "checkpoints to keep, the newest and besides them the best one; none: all")
    metric_for_best_model: str | None = option(None, "eval/ metric whose best evaluation gets a checkpoint, which is kept; none: off")
    greater_is_better: bool | None = option(None, "whether more of metric_for_best_model is better; none: by its name (less of a loss or an error is)")
    load_best_model_at_end: bool = option(False, "save the weights of the best evaluation, not the last (metric_for_best_model, else eval/loss)")
    early_stopping_patience: int | None = option(None, "evaluations in a row without a better metric_for_best_model (else eval/loss) that end the training; none: off")
    early_stopping_threshold: float = option(0.0, "by how much it must be better to count")
    num_print_samples: int = option(4, "held-out pairs (of each set) shown with their rewards at every evaluation; -1: all; 0: off")
    num_normalization_samples: int = option(1024, "random training pairs whose answers' rewards give the mean and std that are kept with the model; -1: all; 0: off")
    report_to: list[str] = option([], "trackers: wandb, tensorboard, any other of Accelerate's, all, or none")
    project: str = option("reward-model", "project name at the tracker")

    license: str | None = option(None, "licence for the model card, as the hub calls it, such as apache-2.0; none: the card says that none was given", "Hub")
    push_to_hub: bool = option(False, "upload the final model, tokenizer, card, config and results to the hub; what cannot be reached is an error at the start")
    hub_model_id: str | None = option(None, "repository, user/name or name; none: the name of the run")
    hub_private_repo: bool | None = option(None, "whether a new repository is private; none: the account's default")
    hub_strategy: Literal["end", "checkpoint", "all_checkpoints", "every_save"] = option("end", "what to upload: end, the final model; checkpoint, in the background the newest checkpoint too; all_checkpoints, each of them (every_save is TRL's, and refused)")
    hub_token: str | None = option(None, "token for the hub; never written down; none: HF_TOKEN, or that of `hf auth login`")
    hub_revision: str | None = option(None, "branch to upload to, made if need be; none: main")
    # fmt: on

    def __post_init__(self) -> None:
        """Raise `InputError` for values out of range, contradictions, and values that could not act."""
        c, defaults = self, {f.name: f.default for f in dataclasses.fields(self)}

        def need(ok: bool, key: str, fix: str) -> None:
            if not ok:
                raise InputError(f"{key}={redact(getattr(c, key), key)!r}: {fix}")

        if c.metric_for_best_model is None and (c.load_best_model_at_end or c.early_stopping_patience is not None):
            c.metric_for_best_model = "eval/loss"
        positive = "lora_r lora_alpha learning_rate num_train_epochs micro_batch_tokens logging_steps adam_epsilon"
        optional_positive = (
            "train_batch_size per_device_train_batch_size gradient_accumulation_steps eval_micro_batch_tokens "
            "max_train_samples max_eval_samples max_length dataset_num_proc save_total_limit center_rewards_coefficient "
            "head_learning_rate early_stopping_patience neftune_noise_alpha"
        )
        for key in positive.split():
            need(getattr(c, key) > 0, key, "must be greater than 0")
        for key in optional_positive.split():
            need(getattr(c, key) is None or getattr(c, key) > 0, key, "must be greater than 0, or none to turn it off")
        for key in "warmup_steps weight_decay max_grad_norm max_nonfinite_steps eval_steps save_steps seed".split():
            need(getattr(c, key) >= 0, key, "must be 0 or greater")
        for key in ("logging_steps", "eval_steps", "save_steps", "warmup_steps"):
            every = getattr(c, key)
            need(every < 1 or every == int(every), key, "must be a number of steps, or a fraction of all steps below 1")
        need(c.early_stopping_threshold >= 0, "early_stopping_threshold", "must be 0 or greater")
        for key in "lora_dropout warmup_ratio adam_beta1 adam_beta2".split():
            need(0 <= getattr(c, key) < 1, key, "must be in [0, 1)")
        need(0 <= c.label_smoothing_factor < 0.5, "label_smoothing_factor", "must be in [0, 0.5)")
        need(c.eval_fraction is None or 0 < c.eval_fraction < 1, "eval_fraction", "must be in (0, 1), or none")
        for key in ("num_print_samples", "num_normalization_samples"):
            need(getattr(c, key) >= -1, key, "must be -1 (all), 0 (off) or a number of pairs")
        need(c.max_steps == -1 or c.max_steps > 0, "max_steps", "must be greater than 0, or -1 to use num_train_epochs")
        need(not (c.warmup_steps and c.warmup_ratio), "warmup_ratio", "warmup_steps is given too; give one of them")
        need(not (c.dtype == "float16" and c.mixed_precision == "fp16"), "dtype", "fp16 autocast needs float32 weights")
        is_path = str(c.resume_from_checkpoint).lower() not in ("true", "false")
        need(is_path, "resume_from_checkpoint", "write latest (TRL's true), a checkpoint folder, or none")
        resumes_unnamed = c.resume_from_checkpoint and not (c.output_dir or c.run_name)
        need(not resumes_unnamed, "resume_from_checkpoint", "name the run to go on with: output_dir or run_name")
        no_warmup = c.lr_scheduler_type in ("constant", "reduce_lr_on_plateau", "greedy")
        for key in ("warmup_steps", "warmup_ratio"):
            need(
                not (no_warmup and getattr(c, key)),
                key,
                f"lr_scheduler_type={c.lr_scheduler_type} has no warm-up; use constant_with_warmup, say",
            )
        self._check_data(need)
        need(not (c.eval_fraction and c.eval_dataset_name), "eval_fraction", "eval_dataset_name is given too; give one")
        saves = c.save_steps > 0 or c.metric_for_best_model is not None
        need(c.save_total_limit is None or saves, "save_total_limit", "does nothing while save_steps is 0")
        if c.metric_for_best_model is not None:
            need(
                c.metric_for_best_model.startswith("eval/"),
                "metric_for_best_model",
                "must be one of the eval/ metrics, such as eval/loss",
            )
            given = (c.early_stopping_patience is not None, c.load_best_model_at_end, True)
            names = ("early_stopping_patience", "load_best_model_at_end", "metric_for_best_model")
            needs_it = names[given.index(True)]
            need(c.eval_steps > 0, needs_it, "does nothing while eval_steps is 0")
        else:
            need(c.greater_is_better is None, "greater_is_better", "does nothing without metric_for_best_model")
        if c.early_stopping_patience is None:
            need(c.early_stopping_threshold == 0, "early_stopping_threshold", "needs early_stopping_patience")
        if c.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
            need(c.eval_steps > 0, "lr_scheduler_type", "goes by evaluations; set eval_steps")
        if not c.optim.startswith("adamw"):
            for key in ("adam_beta1", "adam_beta2", "adam_epsilon"):
                need(getattr(c, key) == defaults[key], key, f"does nothing with optim={c.optim}; see optim_args")
        if c.train_batch_size is not None:
            for key in ("per_device_train_batch_size", "gradient_accumulation_steps"):
                need(getattr(c, key) is None, key, "train_batch_size is given too; give one of them")
        kwargs_act = c.gradient_checkpointing or c.gradient_checkpointing_kwargs is None
        need(kwargs_act, "gradient_checkpointing_kwargs", "does nothing while gradient_checkpointing is false")
        liger_acts = c.use_liger_kernel or c.liger_kernel_config is None
        need(liger_acts, "liger_kernel_config", "does nothing while use_liger_kernel is false")
        for key in (*LORA_OPTIONS, "peft_config", "merge_adapter", "load_in_4bit", "load_in_8bit"):
            need(c.use_peft or getattr(c, key) == defaults[key], key, "does nothing while use_peft is false")
        for key in LORA_OPTIONS:
            with_lora = c.peft_config is None or getattr(c, key) == defaults[key]
            need(with_lora, key, "peft_config is given too, which names the method and all its settings")
        need(not (c.load_in_4bit and c.load_in_8bit), "load_in_8bit", "load_in_4bit is given too; give one of them")
        for key in ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"):
            need(c.load_in_4bit or getattr(c, key) == defaults[key], key, "does nothing while load_in_4bit is false")
        storage = c.bnb_4bit_quant_storage in (None, "uint8", "float16", "float32", "float64", "bfloat16")
        need(storage, "bnb_4bit_quant_storage", "must be uint8, float16, float32, float64 or bfloat16, or none")
        for key in ("run_name", "project"):  # both become folders
            name = getattr(c, key)
            safe = name is None or Path(name).name == name and name not in ("", ".", "..")
            need(safe, key, "must be a plain name, not a path (use output_dir for a folder)")

        if not c.push_to_hub:
            for key in "hub_model_id hub_private_repo hub_strategy hub_token hub_revision".split():
                need(getattr(c, key) == defaults[key], key, "does nothing while push_to_hub is false")
        instead = "would save the whole model anew each time; use checkpoint, all_checkpoints, or end"
        need(c.hub_strategy != "every_save", "hub_strategy", instead)
        need(
            c.hub_strategy == "end" or saves, "hub_strategy", "there are no checkpoints while save_steps is 0; use end"
        )
        try:
            validate_repo_id(c.hub_model_id)
        except HFValidationError as error:
            need(False, "hub_model_id", str(error))
        for key in ("hub_token", "hub_revision"):
            need(getattr(c, key) != "", key, "is empty; give one, or none")
        named = c.license is None or re.fullmatch(r"[a-z0-9][a-z0-9.-]*", c.license)
        need(bool(named), "license", "must be one of the hub's names, such as apache-2.0, mit or other; or none")

    def changed(self, names: Sequence[str]) -> list[str]:
        """Those of the options `names` that are not at their default."""
        return [f.name for f in dataclasses.fields(self) if f.name in names and getattr(self, f.name) != f.default]

    def _check_data(self, need) -> None:
        """Raise `InputError` where lists of data sets, weights and configurations do not go together."""
        for name, config in (("dataset_name", "dataset_config"), ("eval_dataset_name", "eval_dataset_config")):
            given, configs = getattr(self, name), getattr(self, config)
            places = [given] if isinstance(given, str | None) else list(given)
            need(places and "" not in places, name, "names no data set")
            is_broken = isinstance(given, str) and given[:1] in ("[", "{")
            need(not is_broken, name, "is no list or dict in JSON; put the names in quotes")
            count = f"give a list with one for each of the {len(places)} data sets"
            need(configs is None or given is not None, config, f"does nothing without {name}")
            num_configs = len(configs) if isinstance(configs, list) else 1
            need(configs is None or num_configs == len(places), config, f"{count}, null for one without")
            if name == "dataset_name" and self.dataset_weights is not None:
                need(len(self.dataset_weights) == len(places), "dataset_weights", count)
        for weight in self.dataset_weights or ():
            need(0 < weight <= 100, "dataset_weights", f"{weight:g} must be greater than 0 and at most 100")

    def data_options(self) -> dict[str, Any]:
        """The arguments of `rm.data.mixture.load_pairs`: all that decides which pairs there are."""
        names = (
            "dataset_name dataset_weights dataset_config dataset_train_split dataset_test_split eval_dataset_name "
            "eval_dataset_config eval_fraction max_train_samples max_eval_samples seed max_length overlength add_eos "
            "text_as_conversation margin_from_scores chat_template_kwargs dataset_num_proc"
        )
        return {name: getattr(self, name) for name in names.split()}

    def global_batch_size(self, num_processes: int) -> int:
        """Pairs per optimizer step over all processes, from either way of saying it."""
        if self.per_device_train_batch_size or self.gradient_accumulation_steps:
            per_device = self.per_device_train_batch_size or 8  # TRL's default
            return per_device * (self.gradient_accumulation_steps or 1) * num_processes
        return self.train_batch_size or 64

    def to_yaml(self) -> str:
        """The configuration as YAML that reads back, without secrets (`parse_config` refuses what was hidden).

        The hub's token is left out: where the file is used again, HF_TOKEN or `hf auth login` gives one.
        """
        options = redact(dataclasses.asdict(self) | {"hub_token": None})
        return yaml.safe_dump(options, sort_keys=False, allow_unicode=True)

    def resolved(self, num_processes: int, mixed_precision: str) -> dict[str, Any]:
        """All options as a dict, with what the launcher decides filled in: for the record, and to compare runs by."""
        batch = {"train_batch_size": self.global_batch_size(num_processes), "mixed_precision": mixed_precision}
        trl_batch = dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps"))
        return dataclasses.asdict(self) | trl_batch | batch


def changed_options(before: dict[str, Any], now: dict[str, Any], places_too: bool = False) -> list[str]:
    """The options that a resumed run must have as before and has not, each as "key: before -> now".

    `places_too`: also those that are otherwise compared by content.
    """
    free = MAY_CHANGE_ON_RESUME | (frozenset() if places_too else COMPARED_BY_CONTENT)
    if now["early_stopping_patience"] or now["lr_scheduler_type"] in ("reduce_lr_on_plateau", "greedy"):
        free -= {"eval_steps"}  # then evaluations decide about the training
    names = [name for name in now if name not in free and before.get(name, now[name]) != now[name]]
    return [f"{name}: {before[name]!r} -> {now[name]!r}" for name in names]
