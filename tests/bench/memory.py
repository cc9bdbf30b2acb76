"""GPU memory by calculation: weights, gradients, optimizer, and activations, for Llama-shaped models.

    python tests/bench/memory.py

Parameters are counted on the meta device. Activations are measured: what autograd saves in one layer for 64 tokens of
one row (bf16 autocast, `sdpa` with a dense mask, as on a GPU), found by its hooks, weights and their casts left out;
times the layers. With gradient checkpointing a layer keeps its input, and one layer at a time is computed again. A GPU
adds what its allocator, its kernels and the CUDA context need.
"""

import argparse

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForSequenceClassification

SHAPES = {  # hidden size, MLP size, layers, heads, key-value heads, vocabulary
    "0.5B (Qwen2.5)": (896, 4864, 24, 14, 2, 151936),
    "8B (Llama 3.1)": (4096, 14336, 32, 32, 8, 128256),
    "70B (Llama 3.1)": (8192, 28672, 80, 64, 8, 128256),
}
TOKENS, MICRO_BATCH_TOKENS = 64, 8192
LORA = dict(r=16, target_modules="all-linear")


def make(shape: tuple, num_layers: int, vocabulary: int, device: str):
    hidden, mlp, _, heads, kv_heads, _ = shape
    sizes = dict(hidden_size=hidden, intermediate_size=mlp, num_attention_heads=heads, num_key_value_heads=kv_heads)
    config = AutoConfig.for_model("llama", num_hidden_layers=num_layers, vocab_size=vocabulary, num_labels=1, **sizes)
    with torch.device(device):
        return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)


def saved_bytes(shape: tuple, num_layers: int, lora: bool) -> int:
    """Bytes that autograd holds after a forward pass of `TOKENS` tokens, without weights."""
    model = make(shape, num_layers, 8, "cpu").model
    if lora:
        model = get_peft_model(model, LoraConfig(**LORA))
        model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    shapes = {shape for p in model.parameters() for shape in (tuple(p.shape), tuple(p.shape[::-1]))}
    saved: dict[int, torch.UntypedStorage] = {}  # holds them, so that no address is given out twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tuple(tensor.shape) not in shapes:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()[None, None]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        output = model(input_ids=torch.zeros(1, TOKENS, dtype=torch.long), attention_mask=mask, use_cache=False)
    assert output.last_hidden_state.requires_grad
    return sum(storage.nbytes() for storage in saved.values())


def main() -> None:
    description = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=description).parse_args()
    for name, shape in SHAPES.items():
        hidden, _, layers, *_, vocabulary = shape
        full = make(shape, layers, vocabulary, "meta")
        num = sum(p.numel() for p in full.parameters())
        adapted = get_peft_model(full, LoraConfig(task_type="SEQ_CLS", **LORA))
        adapter = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        print(f"{name}: {num / 1e9:.2f}e9 parameters; LoRA r=16 on all linear layers: {adapter / 1e6:.1f}e6")
        states = {
            "all weights, float32 (16 bytes each)": 16 * num,
            "all weights, bfloat16 (8 bytes each)": 8 * num,
            "LoRA on bfloat16 (2 bytes, 16 for the adapter)": 2 * num + 16 * adapter,
        }
        for label, size in states.items():
            shares = ", ".join(f"{size / 1e9 / n:.1f} on {n}" for n in (1, 8, 64))
            print(f"    {label}: GB a GPU: {shares}")
        for lora in (False, True):
            layer = (saved_bytes(shape, 1, lora) - saved_bytes(shape, 0, False)) / TOKENS
            whole, kept = layer * layers, 4 * hidden * layers + layer
            print(
                f"    activations{', LoRA' if lora else ''}: {layer / 1e3:.0f} kB a token and layer; "
                f"for a micro-batch of {MICRO_BATCH_TOKENS} tokens {whole * MICRO_BATCH_TOKENS / 1e9:.1f} GB, "
                f"with gradient checkpointing {kept * MICRO_BATCH_TOKENS / 1e9:.1f} GB",
                flush=True,
            )


if __name__ == "__main__":
    main()
