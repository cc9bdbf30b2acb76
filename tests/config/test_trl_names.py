"""Every option of TRL is an option or answered; generated pages are up to date."""

import re

import pytest
import yaml
from runs import ROOT

from docs import generate
from rm.config.cli import OTHER_NAMES, parse_config
from rm.config.errors import InputError
from rm.config.options import RewardConfig
from rm.config.section import fields_of

OPTIONS = set(fields_of(RewardConfig))
TABLES = yaml.safe_load(OTHER_NAMES.read_text(encoding="utf-8"))
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


@pytest.mark.parametrize("name", CONFIG)
def test_every_option_of_trl_is_there_or_answered(name):
    assert (name in OPTIONS) != any(name in names.split() for names in TABLES["TRL"])
    if name not in OPTIONS:
        for line in ([f"--{name}=1"], ["--" + name.replace("_", "-")], [f"{name}=x"]):
            with pytest.raises(InputError, match=f"command line: '{name}' is the name in TRL; here: "):
                parse_config(line)


def test_tables():
    names = [name for table in TABLES.values() for line in table for name in line.split()]
    assert len(names) == len(set(names)) and not set(names) & OPTIONS


def test_what_the_pages_name_exists():
    """Arguments of the trainer, options, files, and functions in files."""
    page = (ROOT / "docs" / "migration_from_trl.md").read_text()
    text = re.sub(r"\n  ", " ", page)
    assert all(f"`{name}" in page for name in TRAINER)
    for name, file in re.findall(r"`(\w+)` in `([\w/]+\.py)`", text):
        assert re.search(rf"(def|class) {name}\b|^{name}\b", (ROOT / file).read_text(), re.M), (name, file)
    for path in re.findall(r"(?:configs|rm|tests)/[\w/]+\.(?:py|yaml)", text.replace("NAME", "ddp")):
        assert (ROOT / path).exists(), path
    for line in (line for table in TABLES.values() for line in table.values()):
        for option in re.findall(r"`(?:--)?([a-z]+_\w+|seed|dtype|optim)(?:=[^`]*)?`", line):
            assert option in OPTIONS or (ROOT / f"{option}.py").exists(), option


@pytest.mark.parametrize("name", generate.PAGES)
def test_generated_pages_are_up_to_date(name):
    if name == "metrics":
        pytest.importorskip("rm.evaluate.metrics", reason="no registry").__dict__.get("METRICS") or pytest.skip()
    path = ROOT / "docs" / f"{name}.md"
    assert path.read_text(encoding="utf-8") == generate.page(path), "run: python -m docs.generate"
