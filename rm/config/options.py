"""`RewardConfig`: every option of a run, in one section per subject. A function takes the section that it needs.

Names are those of TRL and transformers wherever the meaning is the same. The docstring of a section is its title on the
help page. Options without `may_change_on_resume` must be the same when a run is resumed.
"""

import dataclasses
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field

from rm.config.redact import redact
from rm.config.section import Section, fields_of, option

TINY_LLAMA = "configs/tiny_llama"


def _whole_or_fraction(value: float) -> float:
    if value >= 1 and value != int(value):
        raise ValueError("must be a number of steps, or a fraction of all steps below 1")
    return value


# fmt: off
PLAIN_NAME: dict[str, str] = {"pattern": r"^(\.{3,}|\.{0,2}[^./\x00])[^/\x00]{0,200}$", "fix": "must be a plain name, not a path (use output_dir for a folder)"}
Steps = Annotated[int | float, Field(ge=0), AfterValidator(_whole_or_fraction)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Schedule = Literal["linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt", "warmup_stable_decay", "reduce_lr_on_plateau", "greedy"]
ColumnName = str | dict[str, str] | None  # of all data sets, or {name of the set: column}
FOLLOW_EVALUATIONS = ("reduce_lr_on_plateau", "greedy")
Optimizer = Literal["adamw_torch_fused", "adamw_torch", "adafactor", "sgd", "adagrad", "rmsprop"]

class BackboneOptions(Section):
    """Model"""
    model_name_or_path: str = option(TINY_LLAMA, "hub name or folder; a folder without weights is initialized from its config", compared_by_content=True)
    model_revision: str = option("main", "branch, tag or commit on the hub")
    trust_remote_code: bool = option(False, "run code that comes with the model or tokenizer", may_change_on_resume=True)
    attn_implementation: str | None = option(None, "sdpa, eager, flash_attention_2, flash_attention_3, ...; none: chosen by transformers (on a CPU: sdpa_by_tree); flash attention needs a GPU and half precision, and computes rows without masks (varlen_by_tree; on a CPU: sdpa_by_tree)", may_change_on_resume=True)
    disable_dropout: bool = option(True, "set every dropout of the base model to 0 (lora_dropout is separate)")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, about a third more time", may_change_on_resume=True)
    gradient_checkpointing_kwargs: dict[str, Any] | None = option(None, "arguments of torch.utils.checkpoint, as a dict; none: use_reentrant=False", needs="gradient_checkpointing", may_change_on_resume=True)
    chat_template_path: str | None = option(None, "chat template: a Jinja file, or a folder with a tokenizer; none: the template of the tokenizer of the model", compared_by_content=True)
    trainable: str | None = option(None, "regular expression searched in parameter names: only matching parameters and the head are trained; none: all", excludes="use_peft")
    use_peft: bool = option(False, "train an adapter and the head instead of all weights; if model_name_or_path is an adapter, training continues with it")
    peft_config: str | None = option(None, "JSON or YAML file with the config of any PEFT method (peft_type: IA3, ...), instead of the lora_ options; none: LoRA", needs="use_peft", compared_by_content=True)
    merge_adapter: bool = option(False, "save the final model with the adapter merged into the weights (the adapter itself goes to adapter/)", needs="use_peft", may_change_on_resume=True)

class LoraOptions(Section):
    """LoRA"""
    lora_r: int = option(16, "rank", gt=0, needs="use_peft", excludes="peft_config")
    lora_alpha: int = option(32, "scale: the update is multiplied by lora_alpha / lora_r", gt=0, needs="use_peft", excludes="peft_config")
    use_rslora: bool = option(False, "rank-stabilized LoRA: multiply the update by lora_alpha / sqrt(lora_r)", needs="use_peft", excludes="peft_config")
    use_dora: bool = option(False, "DoRA: train the norm of each weight column separately", needs="use_peft", excludes="peft_config")
    lora_dropout: Fraction = option(0.05, "dropout on the input of the adapter; 0: off", needs="use_peft", excludes="peft_config")
    lora_target_modules: str | list[str] | None = option(None, "layer names, or all-linear; none: chosen by PEFT for the architecture", needs="use_peft", excludes="peft_config")
    lora_target_parameters: list[str] | None = option(None, "names of parameters that are not the weight of a layer, such as mlp.experts.gate_up_proj; none: layers only", needs="use_peft", excludes="peft_config")
    lora_modules_to_save: list[str] | None = option(None, "modules trained in full besides the head, and saved with the adapter; none: the head alone", needs="use_peft", excludes="peft_config")

class QuantizationOptions(Section):
    """Stored weights"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("float32", "type of the stored weights (the head and the loss are always float32)")
    load_in_4bit: bool = option(False, "quantize the base model under the adapter to 4 bits (needs bitsandbytes)", needs="use_peft")
    load_in_8bit: bool = option(False, "quantize the base model under the adapter to 8 bits (needs bitsandbytes)", needs="use_peft", excludes="load_in_4bit")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = option("nf4", "data type of 4-bit weights", needs="load_in_4bit")
    use_bnb_nested_quant: bool = option(False, "quantize the scales of 4-bit weights too", needs="load_in_4bit")
    bnb_4bit_quant_storage: Literal["uint8", "float16", "float32", "float64", "bfloat16"] | None = option(None, "torch type in which 4-bit weights are stored; none: uint8", needs="load_in_4bit")

class ModelOptions(QuantizationOptions, LoraOptions, BackboneOptions):
    """All options that determine the model."""

class DatasetOptions(Section):
    """Data"""
    dataset_name: str | list[str] = option("toy", "hub name, .json/.jsonl/.parquet/.csv file (also .gz), save_to_disk folder, toy or toy_groups (embedded); several as a list", compared_by_content=True)
    dataset_weights: list[Annotated[float, Field(gt=0, le=100)]] | None = option(None, "passes over each data set in an epoch: 1 is each row once, 0.5 a random half, 2 each row twice; none: 1 for each", min_length=1, fix="must be a list of numbers greater than 0 and at most 100, or none")
    dataset_config: str | list[str | None] | None = option(None, "configuration (subset) of a hub data set; for several data sets a list, null for one without")
    dataset_train_split: str = option("train", "split to train on")
    dataset_test_split: str = option("test", "split to evaluate on")
    eval_dataset_name: str | list[str] | dict[str, str] | None = option(None, "other data to evaluate on: a data set, a list, or {name: data set}, each with its own metrics; none: dataset_test_split of dataset_name", compared_by_content=True)
    eval_dataset_config: str | list[str | None] | None = option(None, "configuration (subset) of eval_dataset_name; for several data sets a list, null for one without", needs="eval_dataset_name")
    eval_fraction: float | None = option(None, "fraction of the training split of each data set that is held out for evaluation; none: use a test split", gt=0, lt=1, excludes="eval_dataset_name")
    max_train_samples: int | None = option(None, "use the first N rows of each data set, before weights (toy: draw N); none: all", gt=0)
    max_eval_samples: int | None = option(None, "use the first N evaluation rows of each data set (toy: draw N); none: all", gt=0)
    margin_column: ColumnName = option(None, "data column with the margin of each comparison; none: the column margin, if there is one", min_length=1, excludes="margin_from_scores")
    weight_column: ColumnName = option(None, "data column with the weight (0 or greater) of each comparison in the loss; none: weight 1", min_length=1)
    probability_column: ColumnName = option(None, "data column with the probability that the chosen answer is better (soft label); none: probability 1", min_length=1)
    prompt_column: ColumnName = option(None, "data column with the prompt, text or messages, with a dot for a field (info.post); empty: there is none; none: a known name")
    system_column: ColumnName = option(None, "data column with the system message; none: system or system_prompt, if there is one", min_length=1)
    chosen_column: ColumnName = option(None, "data column with the better answer; none: a known name", min_length=1)
    rejected_column: ColumnName = option(None, "data column with the worse answer; none: a known name", min_length=1)
    responses_column: ColumnName = option(None, "data column with a list of answers, or with a dot a field of its entries (answers.text); none: a known name", min_length=1)
    scores_column: ColumnName = option(None, "data column with the scores of the answers, higher is better; none: a known name", min_length=1)
    ranks_column: ColumnName = option(None, "data column with the ranks of the answers, 1 is best; empty: the best answer is the first; none: a known name")
    preference_column: ColumnName = option(None, "data column that says which of two answers is better, in a known layout (safer_response_id); none: that of the layout", min_length=1)
    margin_from_scores: bool = option(False, "margin = difference of the two answers' scores (score_chosen, score_rejected; or scores)")
    equal_scores: Literal["drop", "tie"] = option("drop", "answers of a group with equal scores: drop (no comparison), or tie (a comparison with probability 0.5)")
    group_by_prompt: bool = option(False, "merge all pairs that share a prompt into one group, and compute each of its answers once; every prompt then has the same weight in the loss")
    max_answers: int | None = option(None, "largest number of answers in a group; larger groups are split, and comparisons between the parts are dropped; none: no limit", gt=1)
    dataset_num_proc: int | None = option(None, "processes that render and tokenize; none: one", gt=0, may_change_on_resume=True)

    def check(self) -> None:
        for name, config in (("dataset_name", "dataset_config"), ("eval_dataset_name", "eval_dataset_config")):
            given, configs = getattr(self, name), getattr(self, config)
            places = [given] if isinstance(given, str | None) else list(given)
            self.need(places and "" not in places, name, "names no data set")
            self.need(not (isinstance(given, str) and given.startswith(("[", "{"))), name, "is not valid JSON for a list or dict; put the names in quotes")
            count = f"give a list with one for each of the {len(places)} data sets"
            self.need(configs is None or (len(configs) if isinstance(configs, list) else 1) == len(places), config, f"{count}, null for one without")
            self.need(name != "dataset_name" or len(self.dataset_weights or places) == len(places), "dataset_weights", count)

class TokenOptions(Section):
    """Tokens"""
    max_length: int | None = option(1024, "largest number of tokens in a sequence (prompt and answer); none: no limit", gt=0)
    overlength: Literal["drop", "truncate_left"] = option("drop", "what happens to longer sequences: drop them, or cut the start of the prompt (truncate_left)")
    add_eos: bool = option(True, "append the EOS token to plain text (the chat template determines the end of conversations)")
    text_as_conversation: bool | None = option(None, "render plain text with a prompt column by the chat template, as messages of user and assistant; none: only for evaluation data, and only if the model is trained on conversations")
    chat_template_kwargs: dict[str, Any] | None = option(None, "extra variables of the chat template, as a dict")

class DataOptions(TokenOptions, DatasetOptions):
    """All options that determine the tokens and columns of the data (with `seed`)."""

class LossOptions(Section):
    """Loss"""
    loss_type: Literal["bradley_terry", "plackett_luce"] = option("bradley_terry", "bradley_terry: mean over the comparisons of a prompt; plackett_luce: likelihood of the ranking of its answers by score (needs scores or ranks)")
    center_rewards_coefficient: float | None = option(None, "weight of (r_chosen + r_rejected)^2, which centers rewards on 0; 0.01 is recommended; none: off", gt=0)
    label_smoothing_factor: float = option(0.0, "probability that a label is wrong, below 0.5; 0: off", ge=0, lt=0.5)

    @property
    def loss_options(self) -> dict[str, Any]:
        """The keyword arguments of the loss in `rm.loss`."""
        smoothing = {} if self.loss_type == "plackett_luce" else {"label_smoothing": self.label_smoothing_factor}
        return {"center_rewards_coefficient": self.center_rewards_coefficient} | smoothing

    def check(self) -> None:
        if self.loss_type == "plackett_luce":
            self.need(not self.label_smoothing_factor, "label_smoothing_factor", "has no effect with loss_type=plackett_luce")

class TrainOptions(Section):
    """Optimization"""
    train_batch_size: int | None = option(None, "prompts per optimizer step over all processes (a pair is one prompt); none: 64, or from per_device_train_batch_size and gradient_accumulation_steps", gt=0)
    per_device_train_batch_size: int | None = option(None, "as in TRL: train_batch_size = this x gradient_accumulation_steps x processes; none: 8 if gradient_accumulation_steps is given", gt=0, excludes="train_batch_size")
    gradient_accumulation_steps: int | None = option(None, "factor of per_device_train_batch_size (memory depends on micro_batch_tokens alone); none: 1", gt=0, excludes="train_batch_size")
    learning_rate: float = option(1e-4, "peak learning rate", gt=0)
    head_learning_rate: float | None = option(None, "peak learning rate of the reward head; none: learning_rate", gt=0)
    num_train_epochs: float = option(1.0, "passes over the training data", gt=0)
    max_steps: int = option(-1, "optimizer steps, instead of num_train_epochs; -1: off", ge=-1)
    lr_scheduler_type: Schedule = option("linear", "schedule of the learning rate, as in transformers; reduce_lr_on_plateau and greedy depend on evaluations")
    lr_scheduler_kwargs: dict[str, Any] | None = option(None, "arguments of the schedule, as a dict")
    warmup_ratio: Fraction = option(0.0, "fraction of all steps in which the learning rate rises; 0: off", excludes="warmup_steps")
    warmup_steps: Steps = option(0, "steps in which the learning rate rises; below 1: fraction of all steps; 0: use warmup_ratio")
    optim: Optimizer = option("adamw_torch_fused", "optimizer, named as in transformers")
    optim_args: dict[str, Any] | None = option(None, "arguments of the optimizer, as a dict or as name=value,name=value")
    weight_decay: float = option(0.0, "decay of weight matrices (never of biases and norms); 0: off", ge=0)
    adam_beta1: Fraction = option(0.9, "beta 1 of AdamW")
    adam_beta2: Fraction = option(0.999, "beta 2 of AdamW")
    adam_epsilon: float = option(1e-8, "epsilon of AdamW", gt=0)
    max_grad_norm: float = option(1.0, "clip the global gradient norm to this; 0: off (the norm is still logged)", ge=0)
    max_nonfinite_steps: int = option(0, "consecutive steps that may be skipped because their loss or gradient is NaN or infinite; 0: the first one ends the run", ge=0, may_change_on_resume=True)
    neftune_noise_alpha: float | None = option(None, "NEFTune: uniform noise of at most alpha / sqrt(tokens of the row x width) on input embeddings in training; usually 5 to 15; none: off", gt=0)
    seed: int = option(42, "seed; all random numbers are functions of (seed, step, process)", ge=0, lt=2**32)
    full_determinism: bool = option(False, "use deterministic kernels: the same bits on a GPU too, slower")

    def check(self) -> None:
        self.need(self.max_steps != 0, "max_steps", "must be greater than 0, or -1 to use num_train_epochs")
        if self.lr_scheduler_type in ("constant", *FOLLOW_EVALUATIONS):
            for name in ("warmup_steps", "warmup_ratio"):
                self.need(not getattr(self, name), name, f"lr_scheduler_type={self.lr_scheduler_type} has no warm-up; use another, such as constant_with_warmup")
        for name in ("adam_beta1", "adam_beta2", "adam_epsilon"):
            is_default = getattr(self, name) == fields_of(TrainOptions)[name].default
            self.need(is_default or self.optim.startswith("adamw"), name, f"has no effect with optim={self.optim}; use optim_args")

class HardwareOptions(Section):
    """Hardware"""
    micro_batch_tokens: int = option(8192, "tokens per forward pass on one device, padding included; changes memory, not results", gt=0, may_change_on_resume=True)
    auto_find_batch_size: bool = option(False, "out of memory: halve micro_batch_tokens and repeat the step with the same result", may_change_on_resume=True)
    torch_compile: bool = option(False, "compile the repeated layer: faster in long runs; costs about 15 s per graph in the first steps", may_change_on_resume=True)
    layout: Literal["auto", "shared_prefix", "concatenated"] = option("auto", "rows of a batch: shared_prefix (a prompt, then all its answers), concatenated (every sequence by itself), or auto (shared_prefix if a check at the start verifies its rewards and gradients)", may_change_on_resume=True)
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(None, "type of autocast; none: the setting of `accelerate launch`")
    tf32: bool | None = option(None, "multiply float32 matrices in TF32 (NVIDIA, Ampere or newer); none: chosen by torch")
    use_liger_kernel: bool = option(False, "Liger kernels for norms, MLPs and rotary positions (needs liger-kernel and a GPU)", may_change_on_resume=True)
    liger_kernel_config: dict[str, bool] | None = option(None, "Liger kernels to use, as a dict such as {rope: false}; none: all", needs="use_liger_kernel", may_change_on_resume=True)
    activation_offloading: bool = option(False, "keep activations in CPU memory until the backward pass: less memory, more time; needs a GPU", may_change_on_resume=True)

class EvaluateOptions(Section):
    """Evaluation"""
    eval_steps: Steps = option(0, "steps between evaluations; below 1: fraction of all steps; 0: only at the end", may_change_on_resume=True)
    eval_on_start: bool = option(False, "evaluate before the first step too")
    eval_micro_batch_tokens: int | None = option(None, "micro_batch_tokens in evaluation; none: 2 x micro_batch_tokens", gt=0, may_change_on_resume=True)
    eval_dtype: Literal["bfloat16", "float16"] | None = option(None, "cast the weights to this type in evaluations; none: as in training")
    metric_for_best_model: str | None = option(None, "eval/ metric that selects the best evaluation; its checkpoint is saved and kept; none: off", pattern="^eval/", fix="must be one of the eval/ metrics, such as eval/loss")
    greater_is_better: bool | None = option(None, "whether a higher metric_for_best_model is better; none: the known direction of the metric")
    load_best_model_at_end: bool = option(False, "save the weights of the best evaluation instead of the last (by metric_for_best_model, or eval/loss)", needs="eval_steps", may_change_on_resume=True)
    early_stopping_patience: int | None = option(None, "consecutive evaluations without a better metric_for_best_model (or eval/loss) that end the training; none: off", gt=0, needs="eval_steps")
    early_stopping_threshold: float = option(0.0, "smallest improvement that counts; 0: any improvement", ge=0, needs="early_stopping_patience")
    num_print_samples: int = option(4, "held-out prompts of each set shown with their rewards at every evaluation; -1: all; 0: off", ge=-1, may_change_on_resume=True)

    def check(self) -> None:
        if self.metric_for_best_model is None and (self.load_best_model_at_end or self.early_stopping_patience):
            object.__setattr__(self, "metric_for_best_model", "eval/loss")
        self.need(self.eval_steps or not self.metric_for_best_model, "metric_for_best_model", "has no effect without eval_steps")
        self.need(self.metric_for_best_model or self.greater_is_better is None, "greater_is_better", "has no effect without metric_for_best_model")

class OutputOptions(Section):
    """Output"""
    output_dir: str | None = option(None, "folder of the run; none: runs/<run_name>", pattern=r"^[^\x00]+$", fix="cannot be written", may_change_on_resume=True)
    overwrite_output_dir: bool = option(False, "allow an output_dir that already holds a run", may_change_on_resume=True)
    resume_from_checkpoint: str | None = option(None, "checkpoint folder to resume from, or latest (the newest in output_dir; if there is none, start at step 0); none: a new run", may_change_on_resume=True)
    run_name: str | None = option(None, "name of the run; none: <model>-<data set>-<time>", **PLAIN_NAME, may_change_on_resume=True)
    logging_steps: Steps = option(10, "steps between lines of training metrics; below 1: fraction of all steps", gt=0, may_change_on_resume=True)
    save_steps: Steps = option(0, "steps between checkpoints; below 1: fraction of all steps; 0: off (the final model is always saved)", may_change_on_resume=True)
    save_total_limit: int | None = option(None, "checkpoints to keep: the newest ones, and always the best one; none: all", gt=0, may_change_on_resume=True)
    num_normalization_samples: int = option(1024, "random training rows whose rewards give the mean and std that are saved with the model; -1: all; 0: off", ge=-1, may_change_on_resume=True)
    report_to: list[str] = option([], "trackers: wandb, tensorboard, any other of Accelerate, or all", may_change_on_resume=True)
    project: str = option("reward-model", "project name in the tracker", **PLAIN_NAME, may_change_on_resume=True)

    def check(self) -> None:
        resumes = self.resume_from_checkpoint
        self.need(str(resumes).lower() not in ("true", "false"), "resume_from_checkpoint", "write latest (true in TRL), a checkpoint folder, or none")
        self.need(not resumes or self.output_dir or self.run_name, "resume_from_checkpoint", "name the run to resume: output_dir or run_name")

class HubOptions(Section):
    """Hub"""
    license: str | None = option(None, "license in the model card, named as on the hub, such as apache-2.0; none: not given", pattern=r"^[a-z0-9][a-z0-9.-]*$", fix="must be a name used by the hub, such as apache-2.0, mit or other; or none", may_change_on_resume=True)
    push_to_hub: bool = option(False, "upload the final model, tokenizer, card, config and results to the hub; access is checked at the start", may_change_on_resume=True)
    hub_model_id: str | None = option(None, "repository, user/name or name; none: the name of the run", pattern=r"^(\w+([.-]\w+)*/)?\w+([.-]\w+)*$", max_length=96, fix="must be user/name or name, of words separated by - or .", needs="push_to_hub", may_change_on_resume=True)
    hub_private_repo: bool | None = option(None, "whether a new repository is private; none: the default of the account", needs="push_to_hub", may_change_on_resume=True)
    hub_strategy: Literal["end", "checkpoint", "all_checkpoints"] = option("end", "what to upload: the final model (end), the newest checkpoint too, or all checkpoints too", needs="push_to_hub", fix="must be end, checkpoint or all_checkpoints (every_save would upload the whole model each time)", may_change_on_resume=True)
    hub_token: str | None = option(None, "token for the hub, never written to a file; none: HF_TOKEN, or that of `hf auth login`", min_length=1, fix="is empty; give a token, or none", needs="push_to_hub", secret=True, may_change_on_resume=True)
    hub_revision: str | None = option(None, "branch to upload to, created if needed; none: main", min_length=1, fix="is empty; give a branch, or none", needs="push_to_hub", may_change_on_resume=True)


# fmt: on


class RewardConfig(
    HubOptions, OutputOptions, EvaluateOptions, HardwareOptions, TrainOptions, LossOptions, DataOptions, ModelOptions
):
    """All options of a run in one object, which is an instance of every section. The last base has the first fields."""

    def check(self) -> None:
        need, has_checkpoints = self.need, self.save_steps or self.metric_for_best_model
        need(self.dtype != "float16" or self.mixed_precision != "fp16", "dtype", "mixed_precision=fp16 needs float32")
        if self.lr_scheduler_type in FOLLOW_EVALUATIONS:
            need(self.eval_steps, "lr_scheduler_type", "depends on evaluations; set eval_steps")
        need(has_checkpoints or not self.save_total_limit, "save_total_limit", "has no effect without save_steps")
        need(has_checkpoints or self.hub_strategy == "end", "hub_strategy", "has no effect without save_steps; use end")
        for name in ("margin_column", "weight_column", "probability_column", "margin_from_scores"):
            is_used = self.loss_type == "bradley_terry" or not getattr(self, name)
            need(is_used, name, "has no effect with loss_type=plackett_luce, which depends on the ranking alone")

    def global_batch_size(self, num_processes: int) -> int:
        """Prompts per optimizer step over all processes, from `train_batch_size` or from the two options of TRL."""
        if self.per_device_train_batch_size or self.gradient_accumulation_steps:
            return (self.per_device_train_batch_size or 8) * (self.gradient_accumulation_steps or 1) * num_processes
        return self.train_batch_size or 64

    def to_yaml(self) -> str:
        """The configuration as YAML for `--config`. Secrets are left out and must be given again."""
        left_out = {name: None for name, field in fields_of(RewardConfig).items() if field.json_schema_extra["secret"]}
        return yaml.safe_dump(redact(dataclasses.asdict(self) | left_out), sort_keys=False, allow_unicode=True)

    def resolved(self, num_processes: int, mixed_precision: str) -> dict[str, Any]:
        """The record by which runs are compared: all options, with the values that depend on the launcher."""
        batch = dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps"))
        batch |= {"train_batch_size": self.global_batch_size(num_processes), "mixed_precision": mixed_precision}
        return dataclasses.asdict(self) | batch


def changed_options(before: dict[str, Any], now: dict[str, Any], places_too: bool = False) -> list[str]:
    """Options that differ between two records (`resolved`) but must be equal on resume, as "key: before -> now".

    `places_too`: also options that are otherwise compared by their content (data sets, models, files).
    """
    rules = {name: field.json_schema_extra for name, field in fields_of(RewardConfig).items()}
    kinds = ("may_change_on_resume",) if places_too else ("may_change_on_resume", "compared_by_content")
    free = {name for name, rule in rules.items() if any(rule[kind] for kind in kinds)}
    if now["early_stopping_patience"] or now["lr_scheduler_type"] in FOLLOW_EVALUATIONS:
        free -= {"eval_steps"}  # evaluations then influence training
    names = [name for name in now if name not in free and before.get(name, now[name]) != now[name]]
    return [f"{name}: {before[name]!r} -> {now[name]!r}" for name in names]
