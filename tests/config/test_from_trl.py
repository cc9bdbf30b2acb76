"""Everything that TRL's RewardTrainer and RewardConfig have is answered: by an option, by an error, in the README."""

import dataclasses
import re

import pytest
from runs import ROOT

from rm.config.cli import parse_config
from rm.config.errors import InputError
from rm.config.options import RewardConfig
from rm.config.trl_names import FROM_TRL, answer

OPTIONS = {field.name for field in dataclasses.fields(RewardConfig)}
TRAINER = """model args data_collator train_dataset eval_dataset tokenizer processing_class model_init compute_metrics
callbacks optimizers optimizer_cls_and_kwargs preprocess_logits_for_metrics max_length quantization_config peft_config
visualize_samples train evaluate predict save_model push_to_hub""".split()
# of RewardConfig, ModelConfig and ScriptArguments in TRL 0.9 and 1.16
CONFIG = """output_dir overwrite_output_dir do_train do_eval do_predict eval_strategy prediction_loss_only
per_device_train_batch_size per_device_eval_batch_size per_gpu_train_batch_size per_gpu_eval_batch_size
gradient_accumulation_steps eval_accumulation_steps eval_delay torch_empty_cache_steps learning_rate weight_decay
adam_beta1 adam_beta2 adam_epsilon max_grad_norm num_train_epochs max_steps lr_scheduler_type lr_scheduler_kwargs
warmup_ratio warmup_steps log_level log_level_replica log_on_each_node logging_dir logging_strategy logging_first_step
logging_steps logging_nan_inf_filter save_strategy save_steps save_total_limit save_safetensors save_on_each_node
save_only_model restore_callback_states_from_checkpoint no_cuda use_cpu use_mps_device seed data_seed jit_mode_eval
use_ipex bf16 fp16 fp16_opt_level half_precision_backend bf16_full_eval fp16_full_eval tf32 local_rank ddp_backend
tpu_num_cores tpu_metrics_debug debug dataloader_drop_last eval_steps dataloader_num_workers dataloader_prefetch_factor
past_index run_name disable_tqdm remove_unused_columns label_names load_best_model_at_end metric_for_best_model
greater_is_better ignore_data_skip fsdp fsdp_min_num_params fsdp_config fsdp_transformer_layer_cls_to_wrap
accelerator_config deepspeed label_smoothing_factor optim optim_args adafactor group_by_length length_column_name
report_to ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers dataloader_pin_memory
dataloader_persistent_workers skip_memory_metrics use_legacy_prediction_loop push_to_hub resume_from_checkpoint
hub_model_id hub_strategy hub_token hub_private_repo hub_always_push gradient_checkpointing
gradient_checkpointing_kwargs include_inputs_for_metrics include_for_metrics eval_do_concat_batches fp16_backend
evaluation_strategy push_to_hub_model_id push_to_hub_organization push_to_hub_token mp_parameters
auto_find_batch_size full_determinism torchdynamo ray_scope ddp_timeout torch_compile torch_compile_backend
torch_compile_mode dispatch_batches split_batches include_tokens_per_second include_num_input_tokens_seen
neftune_noise_alpha optim_target_modules use_liger_kernel eval_use_gather_object max_length dataset_num_proc
center_rewards_coefficient batch_eval_metrics eval_on_start
average_tokens_across_devices activation_checkpointing activation_checkpointing_kwargs liger_kernel_config use_cache
trackio_space_id trackio_bucket_id trackio_static_space_id enable_jit_checkpoint hub_revision parallelism_config
dataloader_multiprocessing_context dataloader_in_order train_sampling_strategy ddp_static_graph model_init_kwargs
eos_token pad_to_multiple_of activation_offloading pad_token disable_dropout chat_template_path project
model_name_or_path model_revision dtype torch_dtype attn_implementation trust_remote_code use_peft lora_r lora_alpha
lora_dropout lora_target_modules lora_target_parameters lora_modules_to_save lora_task_type use_rslora use_dora
load_in_8bit load_in_4bit bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage
dataset_name dataset_config dataset_train_split dataset_test_split dataset_streaming
datasets streaming test_split_size ignore_bias_buffers""".split()
LAUNCHERS = "fsdp fsdp_config deepspeed local_rank use_cpu no_cuda".split()


def rows() -> list[tuple[list[str], str]]:
    """(names, answer) of the README's table."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = re.search(r"^## Coming from TRL\n(.*?)(?=^## )", readme, re.M | re.S)[1]
    cells = re.findall(r"^\| (`.*?) \| (.*) \|$", section, re.M)
    return [(re.findall(r"`(\w+)[^`]*`", names), text) for names, text in cells]


@pytest.mark.parametrize("name", CONFIG)
def test_every_option_is_there_or_answered(name):
    assert (name in OPTIONS) != (answer(name) is not None)
    if name not in OPTIONS:
        for line in ([f"--{name}=1"], ["--" + name.replace("_", "-")], [f"{name}=x"]):
            with pytest.raises(InputError) as error:
                parse_config(line)
            assert str(error.value) == f"command line: '{name}' is TRL's name; here: {answer(name)}"


def test_the_launchers_options_say_where_they_live():
    assert all("launch" in answer(name) for name in LAUNCHERS)
    assert all("train_rm.py" in answer(name) for name in CONFIG if name.startswith("ddp_"))


def test_the_table_is_complete():
    listed = [name for names, _ in rows() for name in names]
    assert not set(CONFIG + TRAINER) - set(listed)
    twice = {name for name in listed if listed.count(name) > 1}
    assert twice <= set(CONFIG) & set(TRAINER)  # an argument of the trainer and an option


def test_the_table_says_what_the_errors_say():
    said = {name: text for names, text in rows() for name in names}
    for names, text in FROM_TRL.items():
        assert {said[name] for name in names.split()} == {text}
        assert not set(names.split()) & OPTIONS


def test_what_the_table_names_exists():
    """Options, files, and functions in files."""
    places = [(text, re.findall(r"`(\w+)` in `([\w/]+\.py)`", text)) for _, text in rows()]
    assert sum(len(found) for _, found in places) > 12
    for text, found in places:
        for name, file in found:
            assert re.search(rf"(def|class) {name}\b|^{name}\b", (ROOT / file).read_text(), re.M), (name, file)
        for path in re.findall(r"(?:configs|rm|tests)/[\w/]+\.(?:py|yaml)", text):
            assert (ROOT / path).exists(), path
        for option in re.findall(r"`(?:--)?([a-z]\w+_\w+|seed|dtype|optim)(?:[=:][^`]*)?`", text):
            known = option in OPTIONS or any(option == name for name, _ in found)
            assert known or option in ("kwargs_handlers",), option


def test_rows_of_the_same_name_are_options():
    for names, text in rows():
        if text.startswith("the same"):
            assert set(names) <= OPTIONS
