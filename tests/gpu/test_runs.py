"""Whole runs of the program on a GPU: losses of the CPU, each kernel and dtype, determinism, memory, fp16, FSDP2."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from runs import ROOT, SMALL, assert_same_bits, lines, merged, wait_until

TOY = ["--dataset_name=toy", *SMALL]


def program(cwd, *options: str, device, launcher=(sys.executable,), wait=True):
    """A process of train_rm.py that sees the GPU, or with a CPU as `device` does not."""
    visible = {} if device.type == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    command = [*launcher, str(ROOT / "train_rm.py"), *merged([*TOY, *options])]
    log = open(cwd / "log", "w+")
    process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | visible, cwd=cwd)
    if wait:
        code = process.wait(timeout=560)
        log.seek(0)
        text = log.read()
        assert code == 0, text[-3000:]
        return text
    return process


def test_ten_steps_have_the_losses_of_a_cpu(gpu, tmp_path):
    for name, device in (("cpu", torch.device("cpu")), ("gpu", gpu)):
        program(
            tmp_path,
            "--max_steps=10",
            f"--output_dir={name}",
            "--tf32=false" if device.type == "cuda" else "--tf32=none",
            device=device,
        )
    np.testing.assert_allclose(lines(tmp_path / "gpu"), lines(tmp_path / "cpu"), atol=1e-3)


@pytest.mark.parametrize("precision", ["", "--mixed_precision=bf16", "--mixed_precision=fp16", "--dtype=bfloat16"])
@pytest.mark.parametrize("kernel", ["sdpa", "eager", "flash_attention_2"])
@pytest.mark.parametrize("layout", ["auto", "concatenated"])
def test_a_complete_run_with_each_kernel_and_dtype(gpu, tmp_path, kernel, precision, layout):
    """Training, evaluation, export check; then `rm.evaluate` with the kernel of the run."""
    if gpu.type == "cpu" and "fp16" in precision:
        pytest.skip("Accelerate has fp16 on GPUs only")
    options = [f"--attn_implementation={kernel}", f"--layout={layout}", *filter(None, [precision])]
    text = program(tmp_path, *options, "--output_dir=out", device=gpu)
    assert "export checked" in text and (tmp_path / "out" / "finished.json").is_file()
    chosen = json.loads((tmp_path / "out" / "results.json").read_text())["layout"]
    print(kernel, precision, chosen)
    is_packed = gpu.type == "cuda" and kernel == "flash_attention_2" and precision
    assert "dense masks" not in chosen or not is_packed
    command = [sys.executable, "-m", "rm.evaluate", "--model", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    loss = json.loads(done.stdout.splitlines()[-1])["eval/loss"]
    assert loss == pytest.approx(lines(tmp_path / "out", "eval/loss")[-1], abs=2e-2)


@pytest.mark.parametrize("kernel", ["sdpa", "flash_attention_2"])
def test_full_determinism_survives_a_kill(gpu, tmp_path, kernel):
    """The resumed run has the bits of one that was not killed."""
    options = ["--full_determinism", "--save_steps=4", "--max_steps=40", f"--attn_implementation={kernel}"]
    options += ["--mixed_precision=bf16", "--logging_steps=1", "--save_total_limit=2"]
    program(tmp_path, *options, "--output_dir=whole", device=gpu)
    process = program(tmp_path, *options, "--output_dir=parts", device=gpu, wait=False)
    wait_until(lambda: (tmp_path / "parts" / "checkpoints" / "step-8").exists() or process.poll() is not None, 300)
    process.send_signal(signal.SIGKILL)
    process.wait()
    program(tmp_path, *options, "--output_dir=parts", "--resume_from_checkpoint=latest", device=gpu)
    assert_same_bits(tmp_path / "whole", tmp_path / "parts", also_kept=False)


def test_the_fp16_scaler_settles(cuda, tmp_path):
    """Steps are skipped while the scale is too large, and not after that."""
    program(tmp_path, "--mixed_precision=fp16", "--max_steps=60", "--output_dir=out", device=cuda)
    skipped = lines(tmp_path / "out", "optim/skipped_steps")
    assert skipped[-1] == skipped[30] < 30 and np.isfinite(lines(tmp_path / "out")).all()


def wide_data(folder, num_pairs: int, length: int):
    """A model of two wide layers with random weights, and pairs of token ids; the options to train on them."""
    model = folder / "model"
    model.mkdir()
    config = json.loads((ROOT / "configs" / "tiny_llama" / "config.json").read_text())
    config |= {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2}
    config |= {"max_position_embeddings": 4096, "initializer_range": 0.02}
    for path in (ROOT / "configs" / "tiny_llama").iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    (model / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    with open(folder / "pairs.jsonl", "w") as file:
        for _ in range(num_pairs):
            start, *ends = (rng.integers(3, 130, n).tolist() for n in (length // 2, length // 4, length // 4))
            sides = {f"input_ids_{side}": start + end for side, end in zip(("chosen", "rejected"), ends, strict=True)}
            file.write(json.dumps(sides) + "\n")
    given = [f"--model_name_or_path={model}", f"--dataset_name={folder / 'pairs.jsonl'}", "--eval_fraction=0.01"]
    return [*given, "--max_length=none", "--max_train_samples=none", "--max_eval_samples=none"]


def test_auto_find_batch_size_from_four_million_tokens(gpu, tmp_path):
    """One step of 4 million tokens (CPU: of 4,000, which fit)."""
    num_pairs, length = (2100, 2048) if gpu.type == "cuda" else (20, 256)
    options = wide_data(tmp_path, num_pairs, length)
    options += ["--auto_find_batch_size", "--micro_batch_tokens=4000000", "--max_steps=1", "--mixed_precision=bf16"]
    options += [f"--train_batch_size={num_pairs}", "--attn_implementation=flash_attention_2", "--output_dir=out"]
    text = program(tmp_path, *options, "--eval_micro_batch_tokens=16384", device=gpu)
    assert ("out of memory: step 1 is repeated with micro_batch_tokens=" in text) is (gpu.type == "cuda")


def test_peak_memory_is_the_calculated_one(cuda):
    """Within 20% of what tests/bench/memory.py calculates: 16 bytes per weight, and activations in bf16 autocast."""
    sys.path.insert(0, str(ROOT / "tests" / "bench"))
    import memory

    shape, layers, tokens, vocabulary = memory.SHAPES["0.5B (Qwen2.5)"], 8, 8192, 4096
    expected = tokens / memory.TOKENS * (memory.saved_bytes(shape, 1, False) - memory.saved_bytes(shape, 0, False))
    model = memory.make(shape, layers, vocabulary, "cuda")
    expected = expected * layers + 16 * sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    mask = torch.ones(256, 256, dtype=torch.bool, device="cuda").tril()[None, None]
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            ids = torch.zeros(tokens // 256, 256, dtype=torch.long, device="cuda")
            hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            model.score(hidden[:, -1]).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    print(f"peak {torch.cuda.max_memory_allocated() / 1e9:.2f} GB, calculated {expected / 1e9:.2f} GB")
    assert torch.cuda.max_memory_allocated() == pytest.approx(expected, rel=0.2)


def test_fsdp2_with_one_process(cuda, tmp_path):
    """The launcher file of the docs gives the losses of one process."""
    program(tmp_path, "--mixed_precision=bf16", "--output_dir=one", device=cuda)
    file = str(ROOT / "configs" / "accelerate" / "fsdp2.yaml")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", file, "--num_processes=1"]
    text = program(tmp_path, "--output_dir=fsdp", device=cuda, launcher=launcher)
    np.testing.assert_allclose(lines(tmp_path / "fsdp"), lines(tmp_path / "one"), atol=0.05)
    assert "export checked" in text
