"""The token cache: what its key covers, damaged files, killed writers, two writers at once, workers."""

import errno
import multiprocessing
import os
import signal

import pytest
from examples import GOOD, HH, WORDS, options, read, word_tokenizer, write
from tokenizers import normalizers

import rm.data.cache
from rm.config.errors import InputError
from rm.config.files import DiskError
from rm.data.mixture import load_data


def rows_of(data) -> str:
    return str(data.dataset[:])  # NaN is not equal to itself


@pytest.fixture
def entries(own_cache):
    """entries() → the folders of the token cache."""
    return lambda: [path for path in (own_cache / "reward_prompts").iterdir() if path.is_dir()]


@pytest.fixture
def calls(monkeypatch):
    """The numbers of rows of every batch that was tokenized."""
    calls, encode = [], rm.data.cache.encode_batch

    def count(batch, indices, **kwargs):
        calls.append(len(indices))
        return encode(batch, indices, **kwargs)

    monkeypatch.setattr(rm.data.cache, "encode_batch", count)
    return calls


def test_cached_for_the_same_options_and_code_only(data_of, tokenizer, calls, monkeypatch):
    rows = [HH, GOOD | {"w": 1}]
    first = data_of(rows, max_length=9)
    tokenizer("a b", padding="max_length", max_length=9, truncation=True)  # leaves traces in the tokenizer
    again = data_of(rows, max_length=9, dataset_num_proc=2, seed=1)
    assert rows_of(again) == rows_of(first) and again.fingerprint == first.fingerprint and calls == [2]
    changes = [{"max_length": 8}, {"overlength": "truncate_left"}, {"add_eos": False}, {"max_eval_samples": 1}]
    for other in [*changes, {"chat_template_kwargs": {"style": "plain"}}]:
        data_of(rows, **({"max_length": 9} | other))
    data_of(rows, word_tokenizer(chat_template="{{ messages[0].content }}"), max_length=9)
    data_of(rows, word_tokenizer(eos_token="<bos>"), max_length=9)
    lower = word_tokenizer()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    data_of(rows, lower, max_length=9)
    assert calls == [2, 2, 2, 2, 1, 2, 2, 2, 2]
    monkeypatch.setattr("inspect.getsource", lambda module: "edited")
    assert rows_of(data_of(rows, max_length=9)) == rows_of(first) and len(calls) == 10


def test_halves_and_columns_have_entries_of_their_own(tokenizer, entries, tmp_path, calls):
    name = write(tmp_path / "rows.jsonl", [GOOD | {"prompt": f"{'defg'[i]} ", "w": i} for i in range(4)])
    for _ in range(2):
        assert list(map(len, load_data(tokenizer, options(dataset_name=name, eval_fraction=0.5)))) == [2, 2]
        assert read(name, tokenizer, weight_column="w").comparisons["weight"].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert calls == [4, 4] and len(entries()) == 2  # both halves are rows of one entry


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGE = {  # (file, its new content; None: the file is gone)
    "empty": ("tokens.arrow", lambda content: b""),
    "truncated": ("tokens.arrow", lambda content: content[:-8]),
    "one bit": ("tokens.arrow", flip),
    "gone": ("tokens.arrow", None),
    "no checksums": ("manifest.json", None),
    "cut checksums": ("manifest.json", lambda content: content[:-5]),
    "no file name": ("manifest.json", lambda content: b'{"a\\u0000b": {}}'),
}


def spoil(folder, name: str) -> None:
    file, change = folder / DAMAGE[name][0], DAMAGE[name][1]
    file.write_bytes(change(file.read_bytes())) if change else file.unlink()


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_entry_is_made_again_with_a_warning(data_of, entries, calls, caplog, name):
    first = data_of([HH, GOOD])
    want, (folder,) = rows_of(first), entries()
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "tokens.arrow"]
    spoil(folder, name)
    again = data_of([HH, GOOD])
    assert rows_of(again) == want and again.fingerprint == first.fingerprint and calls == [2, 2]
    (message,) = caplog.messages
    assert message.startswith(f"the token cache in {folder} is damaged (")
    data_of([HH, GOOD])
    assert calls == [2, 2] and len(caplog.messages) == 1 and entries() == [folder]


def test_a_killed_writer_leaves_no_entry(data_of, entries, monkeypatch, caplog, calls):
    def killed(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(rm.data.cache, "publish_folder", killed)  # all tokens are written, but not verified
    writer = multiprocessing.get_context("fork").Process(target=data_of, args=([HH, GOOD],))
    writer.start()
    writer.join(60)
    assert writer.exitcode == -signal.SIGKILL and [path.name[0] for path in entries()] == ["."]
    monkeypatch.undo()
    assert len(data_of([HH, GOOD])) == 2 and "damaged" not in caplog.text


def test_a_full_disk_is_named(data_of, entries, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")  # as Arrow raises it, without a file name

    monkeypatch.setattr(rm.data.cache.Dataset, "map", full)
    with pytest.raises(DiskError, match="No space left on device: '.*/reward_prompts/"):
        data_of([HH, GOOD])
    assert entries() == []


def test_a_wrong_row_leaves_nothing(data_of, entries):
    with pytest.raises(InputError):
        data_of([GOOD, {"chosen": "a", "rejected": None}])
    assert entries() == []


@pytest.mark.parametrize("is_damaged", [False, True])
def test_several_processes_at_once(tokenizer, entries, tmp_path, is_damaged):
    """All may tokenize; each reads a whole entry."""
    name = write(tmp_path / "rows.jsonl", [HH] * 50)
    if is_damaged:
        read(name, tokenizer)
        spoil(*entries(), "one bit")
    context = multiprocessing.get_context("fork")
    barrier, found = context.Barrier(3), context.SimpleQueue()

    def work():
        barrier.wait(60)
        found.put([read(name, tokenizer).fingerprint for _ in range(4)])

    processes = [context.Process(target=work) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 3 and len(entries()) == 1
    assert [found.get() for _ in processes] == [[read(name, tokenizer).fingerprint] * 4] * 3


# ---------------------------------------------------------------- workers


def test_in_two_processes(data_of):
    rows = [{"chosen": f"a {w}", "rejected": "b", "id": w} for w in WORDS]
    one = data_of(rows)
    two = data_of([row | {"extra": 1} for row in rows], dataset_num_proc=2)
    assert rows_of(two) == rows_of(one) and two.audit == one.audit and len(two.dataset.cache_files) == 2
    again = data_of([row | {"extra": 1} for row in rows])  # from the two files
    assert rows_of(again) == rows_of(one)
    rows[-1]["rejected"] = None
    with pytest.raises(InputError, match=rf"rows.jsonl, row {len(rows)}: 'rejected' is missing \(null\)"):
        data_of(rows, dataset_num_proc=2)


def tell(batch, indices, **_):
    raise InputError(f"SIGTERM does {signal.getsignal(signal.SIGTERM)!r}")


def test_the_workers_inherit_no_handler(data_of, monkeypatch):
    """With one that lets them live, the end of the pool after a wrong row would wait for them for ever."""

    def handler(*_):
        os._exit(1)

    monkeypatch.setattr(rm.data.cache, "encode_batch", tell)
    signal.signal(signal.SIGTERM, handler)
    with pytest.raises(InputError, match="SIGTERM does <Handlers.SIG_DFL: 0>"):
        data_of([GOOD] * 2, dataset_num_proc=2)
    assert signal.getsignal(signal.SIGTERM) is handler
