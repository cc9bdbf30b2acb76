"""Fixtures shared by all tests: no network, no tracker account, tiny models from configs."""

import ctypes
import fcntl
import json
import logging
import os
import runpy
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", WANDB_MODE="offline", WANDB_SILENT="true")
ROOT = Path(__file__).resolve().parent.parent
GPU_TESTS = ROOT / "tests" / "gpu"
asked = [Path(word.partition("::")[0]).resolve() for word in sys.argv[1:]]
if "PYTEST_XDIST_WORKER" not in os.environ and not any(path.is_relative_to(GPU_TESTS) for path in asked):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the suite runs on CPUs; workers inherit this
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from examples import preference_data, read, word_tokenizer, write  # noqa: E402
from transformers import AutoConfig, AutoModelForSequenceClassification  # noqa: E402

from rm.data.dataset import PreferenceData  # noqa: E402

if sys.platform == "linux":  # forked children end with us: pytest waits for all who hold the pipe of a worker that hung
    PR_SET_PDEATHSIG, libc = 1, ctypes.CDLL(None)
    os.register_at_fork(after_in_child=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL))
torch.set_num_threads(1)  # tiny models: threads cost more than they give

PAD, EOS, VOCAB = 0, 1, 64
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)  # which a run in this process would keep
HANDLERS = {number: signal.getsignal(number) for number in STOPPING}

COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=256,
    pad_token_id=PAD,
    eos_token_id=EOS,
    bos_token_id=2,
    num_labels=1,
)
CAUSAL = {
    "llama": dict(intermediate_size=48, num_key_value_heads=2),
    "qwen2": dict(intermediate_size=48, num_key_value_heads=2),
    "qwen3": dict(intermediate_size=48, num_key_value_heads=2, head_dim=8),
    "mistral": dict(intermediate_size=48, num_key_value_heads=2, sliding_window=9),
    "gpt2": dict(),
    "gpt_neox": dict(intermediate_size=48),
    "opt": dict(ffn_dim=48, word_embed_proj_dim=32),
    "gemma3_text": dict(
        intermediate_size=48,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=9,
        layer_types=["sliding_attention", "full_attention"],
    ),
}
ENCODERS = {"bert": dict(intermediate_size=48)}


def tiny_classifier(kind: str, **extra):
    """A randomly initialised one-output classifier of architecture `kind`, dropout 0, float32, in eval mode."""
    options = COMMON | (CAUSAL | ENCODERS)[kind] | extra
    config = AutoConfig.for_model(kind, **options)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    for module in model.modules():  # larger weights than the usual init, so that attention matters
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.2)
    return model.eval()


def random_pairs(num_pairs: int = 6, seed: int = 0, max_prefix: int = 12, max_suffix: int = 9) -> PreferenceData:
    """Random pairs with various prefixes (also none)."""
    rng = np.random.default_rng(seed)
    prompts = []
    for i in range(num_pairs):
        prefix = rng.integers(3, VOCAB, rng.integers(0, max_prefix + 1) if i else 0).tolist()
        chosen, rejected = (rng.integers(3, VOCAB, rng.integers(1, max_suffix + 1)).tolist() for _ in range(2))
        rejected[0] = 3 + (chosen[0] - 2) % (VOCAB - 3)  # differs from chosen[0]
        prompts.append([prefix + chosen, prefix + rejected])
    return preference_data(prompts, margin=[[0.25 * i] for i in range(num_pairs)])


@pytest.fixture(autouse=True)
def signal_handlers():
    """A run in this process leaves its handlers behind, also one in a fixture of a module, which runs before this."""
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)
    yield
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)


@pytest.fixture
def pairs() -> PreferenceData:
    return random_pairs()


def tiny_tokenizer(pad_token: str | None = "<pad>"):
    """Word-level tokenizer of the words w3 … w63 (ids 3 … 63); id 0 is `<pad>`, 1 is EOS, 2 is unknown.

    `pad_token`: "<eos>" or None imitate the tokenizers whose pad token is EOS or missing.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>" if pad_token == "<pad>" else "w0", "<eos>", "<unk>"] + [f"w{i}" for i in range(3, VOCAB)]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    options = {} if pad_token is None else {"pad_token": pad_token}
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>", **options)


@pytest.fixture
def tiny_model_folder(tmp_path):
    """make(kind, pad_token, **config) → a folder with a tiny pretrained causal LM (weights, config, tokenizer)."""
    from transformers import AutoModelForCausalLM

    def make(kind: str = "llama", pad_token: str | None = "<pad>", **extra) -> str:
        config = AutoConfig.for_model(kind, **(COMMON | CAUSAL[kind] | extra))
        torch.manual_seed(0)
        folder = tmp_path / f"tiny-{kind}-{pad_token}"
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tiny_tokenizer(pad_token).save_pretrained(folder)
        return str(folder)

    return make


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    """A cache of data sets that is empty."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def tokenizer():
    return word_tokenizer()


@pytest.fixture
def data_of(tokenizer, own_cache, tmp_path):
    """data_of(rows, tokenizer, **options) → the data of a file rows.jsonl."""

    def make(rows, other_tokenizer=None, **changes):
        return read(write(tmp_path / "rows.jsonl", rows), other_tokenizer or tokenizer, **changes)

    return make


@pytest.fixture(scope="session")
def zygote():
    """Starts real processes of train_rm.py in no time."""
    from zygote import Zygote

    zygote = Zygote()
    yield zygote
    zygote.close()


@pytest.fixture(scope="session")
def fsdp_zygote():
    """The same under FSDP2."""
    from zygote import Zygote

    zygote = Zygote("fsdp_on_cpu")
    yield zygote
    zygote.close()


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory) -> str:
    """A folder with a tiny pretrained Llama that has a chat template for the toy data."""
    folder = tmp_path_factory.mktemp("pretrained")
    config = AutoConfig.from_pretrained(ROOT / "configs" / "tiny_llama", num_labels=1)
    torch.manual_seed(1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    for path in (ROOT / "configs" / "tiny_llama").glob("*"):
        if path.name != "config.json":
            shutil.copy(path, folder)
    return str(folder)


@pytest.fixture
def train(tmp_path, monkeypatch, capsys, request):
    """train(name, *options) → (summary, output folder) of a run in this process; without its report, which takes two
    seconds, but for tests that ask for `drawn`."""
    monkeypatch.chdir(tmp_path)

    from runs import SMALL, merged, reset_accelerate

    import train_rm

    if "drawn" not in request.fixturenames:
        monkeypatch.setattr("rm.train.finish.write_report", lambda folder: (folder / "report.html").write_text("-"))

    def run(name: str, *options: str):
        reset_accelerate()
        folder = tmp_path / name
        summary = train_rm.main(merged([*SMALL, f"--output_dir={folder}", *options]))
        assert json.loads(capsys.readouterr().out.strip().splitlines()[-1]) == summary
        return summary, folder

    return run


@pytest.fixture
def ends(tmp_path, monkeypatch, capsys, caplog):
    """ends(*options) → (exit code, last line on stderr, log) of a run in the folder `run`, in this process."""
    from runs import merged, reset_accelerate

    import train_rm

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rm.train.finish.write_report", lambda folder: (folder / "report.html").write_text("-"))
    monkeypatch.setattr("rm.train.processes.StopSignal.listen", lambda self: None)

    def run(*options: str) -> tuple[int, str, str]:
        reset_accelerate()
        caplog.clear()
        monkeypatch.setattr("sys.argv", ["train_rm.py", *merged(["--output_dir=run", *options])])
        code = train_rm.run()
        return code, (capsys.readouterr().err.strip().splitlines() or [""])[-1], caplog.text

    return run


@pytest.fixture
def gpu():
    """The device of the tests in gpu/, for one test at a time, since workers share it. `GPU_TESTS_DEVICE=cpu` rehearses
    those that a CPU can run."""
    device = os.environ.get("GPU_TESTS_DEVICE") or ("cuda" if torch.cuda.is_available() else "")
    if not device:
        pytest.skip("needs a GPU")
    with open(Path(tempfile.gettempdir()) / f"gpu-tests-{os.getuid()}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield torch.device(device)
        if device == "cuda":
            torch.cuda.empty_cache()


@pytest.fixture
def cuda(gpu):
    """The device of a test that a CPU cannot rehearse."""
    if gpu.type != "cuda":
        pytest.skip("needs a GPU, also to rehearse")
    return gpu


@pytest.fixture(autouse=True)
def same_log_level():
    """The program sets the level of the root logger; the next test starts with the one before."""
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)


@pytest.fixture
def fails(tmp_path, monkeypatch, capsys):
    """fails(*options) → the one line with which the program ends, with exit code 2; module: another program."""
    import datasets
    from runs import SMALL, merged, reset_accelerate

    import train_rm

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def run(*options: str, module: str | None = None) -> str:
        reset_accelerate()
        if module is None:
            some = [*SMALL, "--max_train_samples=none", "--max_eval_samples=none"]
            monkeypatch.setattr(sys, "argv", ["train_rm.py", *merged([*some, "--output_dir=out", *options])])
            code = train_rm.run()
        else:
            monkeypatch.setattr(sys, "argv", [module, *options])
            with pytest.raises(SystemExit) as end:
                runpy.run_module(module, run_name="__main__")
            code = end.value.code
        err = capsys.readouterr().err
        lines = err.strip().splitlines()
        assert code == 2, err
        assert "Traceback" not in err and [line for line in lines if "rror" in line] == lines[-1:], err
        assert lines[-1].startswith("error: ") and len(lines[-1]) < 600
        return lines[-1].removeprefix("error: ")

    return run


@pytest.fixture
def config():
    """config("wandb", ...): the options that `RunLog` reads."""
    return lambda *report_to: SimpleNamespace(project="p", report_to=list(report_to))
