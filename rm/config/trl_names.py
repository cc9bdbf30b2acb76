"""Option names of TRL and of other trainers that differ here: for error messages and docs/migration_from_trl.md."""

from __future__ import annotations

# names with the same answer -> the answer
# fmt: off
FROM_TRL = {
    "fsdp fsdp_config fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap deepspeed local_rank use_cpu no_cuda use_mps_device tpu_num_cores tpu_metrics_debug": "set by the launcher: `accelerate launch --config_file configs/accelerate/NAME.yaml train_rm.py …`, NAME being cpu, ddp, fsdp2 or deepspeed_zero3; or `torchrun`",
    "ddp_backend ddp_timeout ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph accelerator_config parallelism_config dispatch_batches split_batches": "arguments of `Accelerator`, set in `train_rm.py`",
    "debug disable_tqdm trackio_space_id trackio_bucket_id trackio_static_space_id": "set by environment variables: `ACCELERATE_DEBUG_MODE=1`, `TQDM_DISABLE=1`, those of Trackio",
    "mp_parameters ray_scope optim_target_modules": "not available (SageMaker, Ray, GaLore and APOLLO)",
    # batches and data
    "per_gpu_train_batch_size": "`per_device_train_batch_size`, or `train_batch_size`",
    "per_device_eval_batch_size per_gpu_eval_batch_size eval_accumulation_steps": "`eval_micro_batch_tokens`; no result depends on it",
    "group_by_length length_column_name train_sampling_strategy pad_to_multiple_of": "not needed: rows are packed by length within a step, and steps stay random",
    "dataloader_num_workers dataloader_prefetch_factor dataloader_pin_memory dataloader_persistent_workers dataloader_multiprocessing_context dataloader_in_order": "not needed: tokens are memory-mapped, and a micro-batch is collated in milliseconds",
    "dataloader_drop_last average_tokens_across_devices": "not needed: nothing is dropped, and the loss is the exact mean over the step on all processes",
    "datasets": "`dataset_name`, a list, with `dataset_weights`",
    "test_split_size": "`eval_fraction`",
    "dataset_streaming streaming": "not needed: data are memory-mapped; a stream has no exact epochs and no exact resume. For a part of the data: `max_train_samples`, or `dataset_train_split=train[:10%]`",
    "data_seed": "`seed`",
    "remove_unused_columns label_names past_index ignore_bias_buffers": "not needed: columns are found by name",
    "pad_token eos_token": "those of the tokenizer; a PAD token other than EOS is added if needed; `add_eos` appends EOS to plain text",
    # model and optimization
    "model_init_kwargs torch_dtype": "`dtype`, `attn_implementation`, `model_revision`",
    "lora_task_type": "always SEQ_CLS, which trains the head too",
    "use_cache": "always off: nothing is generated",
    "activation_checkpointing activation_checkpointing_kwargs": "`gradient_checkpointing`, `gradient_checkpointing_kwargs`",
    "torch_compile_backend torch_compile_mode torchdynamo jit_mode_eval use_ipex": "`torch_compile`",
    "bf16": "`mixed_precision=bf16`, or `accelerate launch --mixed_precision bf16`",
    "fp16 half_precision_backend fp16_backend fp16_opt_level": "`mixed_precision=fp16`, or `accelerate launch --mixed_precision fp16`",
    "bf16_full_eval fp16_full_eval": "`eval_dtype=bfloat16` or `eval_dtype=float16`",
    "adafactor": "`optim=adafactor`",
    "logging_nan_inf_filter": "`max_nonfinite_steps`",
    "torch_empty_cache_steps eval_delay": "a line in the loop of `train_rm.py`",
    # evaluation, logging and saving
    "do_train do_eval do_predict": "`train_rm.py` trains and evaluates; `python -m rm.evaluate --model OUT` only evaluates",
    "eval_strategy evaluation_strategy": "`eval_steps`: 0 only at the end, from 1 on steps, below 1 a fraction of the run (0.5 with two epochs: every epoch)",
    "prediction_loss_only eval_do_concat_batches eval_use_gather_object batch_eval_metrics include_inputs_for_metrics include_for_metrics use_legacy_prediction_loop": "not needed: metrics are functions of one table with every reward, in `rm/evaluate/metrics.py`",
    "logging_strategy logging_first_step": "`logging_steps`: 1 logs every step, below 1 is a fraction of the run",
    "logging_dir": "`output_dir`, which holds the files of the trackers",
    "log_level log_level_replica log_on_each_node": "`logging.getLogger().setLevel` in `train_rm.py`; the main process logs",
    "include_tokens_per_second include_num_input_tokens_seen skip_memory_metrics": "always logged: `speed/tokens_per_second`, `speed/peak_memory_gb`",
    "save_strategy": "`save_steps`: 0 off, from 1 on steps, below 1 a fraction of the run; `metric_for_best_model` keeps the best",
    "save_safetensors save_only_model save_on_each_node": "always: the main process saves safetensors, the final model without optimizer state",
    "enable_jit_checkpoint restore_callback_states_from_checkpoint ignore_data_skip": "always: a signal saves a checkpoint after the current step, and resuming is exact",
    "hub_always_push push_to_hub_model_id push_to_hub_organization push_to_hub_token": "`hub_model_id=ORGANIZATION/NAME`, `hub_token`, `hub_strategy`",
}
FROM_OTHERS = {  # LLaMA-Factory, OpenRLHF, ms-swift, axolotl
    "model model_id model_path base_model pretrain": "`model_name_or_path`",
    "dataset dataset_path train_dataset": "`dataset_name`",
    "eval_dataset val_dataset test_datasets": "`eval_dataset_name`",
    "val_size val_set_size split_dataset_ratio": "`eval_fraction`",
    "dataset_probs interleave_probs": "`dataset_weights` (passes, not probabilities)",
    "max_samples": "`max_train_samples`, `max_eval_samples`",
    "cutoff_len max_len max_seq_len max_seq_length sequence_len": "`max_length`",
    "template chat_template tokenizer_chat_template apply_chat_template": "`chat_template_path`",
    "preprocessing_num_workers num_proc": "`dataset_num_proc`",
    "lr": "`learning_rate`",
    "optimizer": "`optim`",
    "lr_scheduler": "`lr_scheduler_type`",
    "lr_warmup_ratio": "`warmup_ratio`",
    "num_epochs max_epochs epochs": "`num_train_epochs`",
    "batch_size global_batch_size": "`train_batch_size`",
    "per_device_batch_size micro_batch_size micro_train_batch_size": "`per_device_train_batch_size`",
    "max_norm gradient_clipping": "`max_grad_norm`",
    "finetuning_type train_type tuner_type adapter": "`use_peft`",
    "lora_rank lora_target target_modules": "`lora_r`, `lora_target_modules`",
    "flash_attn flash_attention attn_impl": "`attn_implementation`",
    "save_path ckpt_path": "`output_dir`",
    "use_wandb wandb_project wandb_name wandb_run_name": "`report_to=wandb`, `project`, `run_name`",
    "packing sample_packing packing_samples": "not needed: rows are always packed",
}
# fmt: on


def answer(name: str) -> str | None:
    """What another trainer's option `name` is here, in a line of plain text; None if the name is not known."""
    for trainer, table in (("TRL", FROM_TRL), ("another trainer", FROM_OTHERS)):
        for names, text in table.items():
            if name in names.split():
                return f"'{name}' is the name in {trainer}; here: {text.replace('`', '')}"
    return None
