"""Hours, memory and checkpoint seconds by calculation, for Llama-shaped reward models on H100 GPUs.

    python tests/bench/scaling.py --tokens_per_pair 215

Nothing is measured. Parameters are counted on the meta device. The tokens of a pair are those of tests/bench/tokens.py.
A training step costs 6 FLOPs per token and parameter outside of the embeddings; 8 with gradient checkpointing, which
repeats the forward pass. Attention is left out: in trees of some hundred tokens it is below 5%.
"""

import argparse

from memory import SHAPES, make

PEAK = 989e12  # FLOP/s of an H100 SXM in bf16, dense (NVIDIA's data sheet)
UTILIZATION = 0.4  # assumed share of the peak
DISK = 2e9  # bytes/s that a node of 8 GPUs writes to a shared file system: assumed
SHA256 = 1.5e9  # bytes/s of one process: assumed
ACTIVATIONS = {
    "0.5B": 13.8,
    "8B": 6.4,
    "70B": 25.6,
}  # GB for 8,192 tokens (tests/bench/memory.py); from 8B checkpointed


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens_per_pair", type=float, default=215)
    parser.add_argument("--pairs", type=float, default=1e6)
    args = parser.parse_args()
    tokens = args.tokens_per_pair * args.pairs
    print(
        "| model, GPUs | tokens | FLOPs | hours | state | gathered | activations | GB per GPU | checkpoint | seconds |"
    )
    for name, shape in SHAPES.items():
        label, (hidden, _, layers, *_, vocabulary) = name.split()[0], shape
        model = make(shape, layers, vocabulary, "meta")
        total = sum(p.numel() for p in model.parameters())
        table = vocabulary * hidden
        flops = (6 if label == "0.5B" else 8) * (total - table) * tokens
        layer = (total - table) / layers
        for gpus in (1, 8, 64):
            state = 16 * total / gpus / 1e9
            # two layers and the embeddings in bf16; of one of these the gradient in bf16 and in float32
            gathered = 0 if gpus == 1 else (2 * 2 * layer + 2 * table + (2 + 4) * max(layer, table)) / 1e9
            needed = state + gathered + ACTIVATIONS[label]
            hours = flops / (gpus * PEAK * UTILIZATION) / 3600
            nodes = max(1, gpus // 8)
            seconds = 12 * total / nodes / DISK + 12 * total / gpus / SHA256
            fits = "" if needed < 75 else " (more than 80 GB)"
            work = f"{tokens / 1e6:.0f}e6 | {flops:.1e} | {hours:.2f}"
            memory = f"{state:.1f} | {gathered:.1f} | {ACTIVATIONS[label]} | {needed:.0f}{fits}"
            print(f"| {label}, {gpus} | {work} | {memory} | {12 * total / 1e9:.0f} GB | {seconds:.0f} |")
        print(f"  {label}: {total / 1e9:.2f}e9 parameters, a layer {layer / 1e6:.0f}e6, embeddings {table / 1e6:.0f}e6")


if __name__ == "__main__":
    main()
