"""TRL's options that have another name or place here: for the error message, and for the README's table."""

from __future__ import annotations

# names of one kind -> where that lives here
# fmt: off
FROM_TRL = {
    # the launcher's
    "fsdp fsdp_config fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap": "the launcher's: `accelerate launch --config_file configs/accelerate/fsdp2.yaml train_rm.py …`",
    "deepspeed": "the launcher's: `accelerate launch --config_file configs/accelerate/deepspeed_zero3.yaml train_rm.py …`",
    "local_rank": "the launcher's: `accelerate launch --config_file configs/accelerate/ddp.yaml train_rm.py …`, or `torchrun`",
    "ddp_backend": "`InitProcessGroupKwargs(backend=…)` among the `kwargs_handlers` of `make_accelerator` in `train_rm.py`; else NCCL on GPUs, gloo on CPUs",
    "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph": "a `DistributedDataParallelKwargs` among the `kwargs_handlers` of `make_accelerator` in `train_rm.py`; none is needed: every weight gets a gradient",
    "ddp_timeout": "`PATIENCE` in `train_rm.py`",
    "accelerator_config parallelism_config dispatch_batches split_batches": "`make_accelerator` in `train_rm.py`; the batches are dealt to the processes by `StepPlan`, not by Accelerate",
    "use_cpu no_cuda use_mps_device": "the launcher's: `accelerate launch --cpu`; without a GPU that is what happens anyway",
    "tpu_num_cores tpu_metrics_debug": "the launcher's: `accelerate launch --tpu`; never tried",
    "debug": "the environment's: `ACCELERATE_DEBUG_MODE=1`, `TORCH_DISTRIBUTED_DEBUG=DETAIL`",
    "mp_parameters ray_scope": "not here: SageMaker's model parallelism and Ray; sweeps are W&B's (`configs/sweep.yaml`)",
    # batches and data
    "per_gpu_train_batch_size": "its later name, `per_device_train_batch_size`; or `train_batch_size`",
    "per_device_eval_batch_size per_gpu_eval_batch_size eval_accumulation_steps": "`eval_micro_batch_tokens`; no result depends on it",
    "group_by_length length_column_name train_sampling_strategy": "not needed: pairs are packed by length inside a step, which leaves the steps random; another order is `indices` in `rm/data/plan.py`",
    "dataloader_num_workers dataloader_prefetch_factor dataloader_pin_memory dataloader_persistent_workers dataloader_multiprocessing_context dataloader_in_order": "not needed: collating 8,192 tokens takes 3 ms; the tokens are memory-mapped",
    "dataloader_drop_last": "no pair is dropped: the last step of an epoch is smaller, and its mean is over its own pairs",
    "datasets": "`dataset_name`, a list, with `dataset_weights`",
    "test_split_size": "`eval_fraction`",
    "dataset_streaming streaming": "not needed: Arrow files are memory-mapped, so the data need disk and no memory, while a stream has no random order over all pairs, no exact epochs and no exact resume; to train on a part give `max_train_samples`, or `dataset_train_split=train[:10%]`",
    "data_seed": "`seed`: the order of the pairs is a function of it",
    "remove_unused_columns label_names past_index ignore_bias_buffers": "not needed: the columns of a pair are found by name",
    "pad_token": "chosen or added so that it is not EOS (`load_tokenizer` in `rm/model/load.py`)",
    "eos_token": "the tokenizer's own; `add_eos` says whether it ends plain text",
    "pad_to_multiple_of": "not needed: rows are packed; FlexAttention's are padded to its blocks",
    # model
    "model_init_kwargs": "`dtype`, `attn_implementation`, `model_revision`; others in `load_classifier` in `rm/model/load.py`",
    "torch_dtype": "its later name, `dtype`",
    "lora_task_type": "always SEQ_CLS, which trains the head too",
    "use_cache": "always off: nothing is generated",
    "activation_checkpointing activation_checkpointing_kwargs": "`gradient_checkpointing`, `gradient_checkpointing_kwargs`",
    "torch_compile_backend torch_compile_mode torchdynamo jit_mode_eval use_ipex": "`torch_compile`; its settings are in `compile_layers` in `rm/model/reward_model.py`",
    # optimization
    "bf16": "`mixed_precision=bf16`, or `accelerate launch --mixed_precision bf16`",
    "fp16 half_precision_backend fp16_backend fp16_opt_level": "`mixed_precision=fp16` (torch's autocast and scaler; Apex is gone)",
    "bf16_full_eval fp16_full_eval": "`eval_dtype=bfloat16`, `eval_dtype=float16`",
    "adafactor": "`optim=adafactor`",
    "optim_target_modules": "GaLore's and APOLLO's: give `make_optimizer` in `rm/train/optimizer.py` their groups",
    "logging_nan_inf_filter": "`max_nonfinite_steps`: a step that is not finite is left out, or ends the run",
    "average_tokens_across_devices": "the loss is a mean over the step's pairs on all processes, exactly",
    "torch_empty_cache_steps": "a line in the loop of `train_rm.py`: `torch.accelerator.empty_cache()`",
    # evaluation
    "do_train do_eval do_predict": "`train_rm.py` trains and evaluates; `python -m rm.evaluate --model OUT` evaluates alone",
    "eval_strategy evaluation_strategy": "`eval_steps`: 0 for the end alone, a number for steps, below 1 a fraction of the run (0.5 with two epochs: every epoch)",
    "eval_delay": "the line `if eval_steps and …` in `train_rm.py`",
    "prediction_loss_only eval_do_concat_batches eval_use_gather_object batch_eval_metrics include_inputs_for_metrics include_for_metrics use_legacy_prediction_loop": "not needed: an evaluation is one table, two rewards a pair, and `evaluation_metrics` in `rm/evaluate/metrics.py` gets all of it",
    # logging
    "logging_strategy logging_first_step": "`logging_steps`: 1 from the first step on, below 1 a fraction of the run",
    "logging_dir": "`output_dir`: the trackers' files lie there",
    "log_level log_level_replica log_on_each_node": "`logging.getLogger().setLevel` in `train_rm.py`; the main process logs",
    "disable_tqdm": "the environment's: `TQDM_DISABLE=1`",
    "include_tokens_per_second include_num_input_tokens_seen skip_memory_metrics": "always measured: `speed/tokens_per_second`, `speed/peak_memory_gb`; a count of all tokens seen is not kept",
    "trackio_space_id trackio_bucket_id trackio_static_space_id": "that tracker's environment variables; `report_to=trackio`",
    # saving
    "save_strategy": "`save_steps`: 0 for no, a number for steps, below 1 a fraction of the run; `metric_for_best_model` for best",
    "save_safetensors": "always: no pickle is written or read",
    "save_on_each_node": "the main process writes; `output_dir` must be one that every node sees when a run is resumed",
    "save_only_model": "the final model is saved alone; a checkpoint is always whole, so that it can be gone on from",
    "enable_jit_checkpoint": "always: a signal gets a checkpoint after the current step",
    "restore_callback_states_from_checkpoint ignore_data_skip": "not needed: which pairs make a step is a function of (seed, step), and there are no callbacks; all state is in a checkpoint's `state.json`",
    "hub_always_push": "a push waits for the one before it; the last one is never left out",
    "push_to_hub_model_id push_to_hub_organization": "`hub_model_id=ORGANIZATION/NAME`",
    "push_to_hub_token": "its later name, `hub_token`",
}
# fmt: on


def answer(name: str) -> str | None:
    """Where TRL's option `name` lives here, in a line of plain text; None if it is not in the table."""
    found = next((text for names, text in FROM_TRL.items() if name in names.split()), None)
    return found and found.replace("`", "")
