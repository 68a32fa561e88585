"""Check the data: what is found, how it is packed, and that a step's number gives its batch."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_shard.config.schema import DataConfig
from moe_shard.data import batches as data
from moe_shard.data.batches import batches
from moe_shard.data.documents import find_documents
from moe_shard.data.packed_text import PackedText
from moe_shard.data.tokenizer import DOCUMENT
from moe_shard.errors import UserError
from tests.counted import counted

FIELDS = ["inputs", "targets", "positions", "segment_ids"]
VOCAB_SIZE = 257  # the 256 bytes and DOCUMENT
WAIT_S = 60
Spec = tuple[str | tuple[str, str] | None, ...]


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
    return root


def corpus(root: Path, documents: int = 12) -> Path:
    text = np.random.default_rng(0)
    return write(
        root,
        {
            f"{n % 3}/{n}.txt": text.integers(1, 256, 20 + 7 * n, np.uint8).tobytes()
            for n in range(documents)
        },
    )


def config(*paths: Path | str, seed: int = 0) -> DataConfig:
    return DataConfig(
        dataset_type="text",
        dataset_path=tuple(map(str, paths)),
        tokenizer_path="",
        seed=seed,
    )


def placed(sizes: tuple[int, ...] = (8,), spec: Spec = (None, "0", None)) -> NamedSharding:
    devices = np.array(jax.devices()[: int(np.prod(sizes))]).reshape(sizes)
    return NamedSharding(Mesh(devices, tuple(map(str, range(len(sizes))))), PartitionSpec(*spec))


def take(source: DataConfig, steps: int, **changes: Any) -> list[dict[str, np.ndarray]]:
    """Fetch the first batches to the host."""
    sizes = {"vocab_size": VOCAB_SIZE, "seq_len": 16, "rows": 8, "microbatches": 1}
    made = batches(source, **{**sizes, "sharding": placed(), **changes})
    try:
        return [{name: np.asarray(x) for name, x in next(made).items()} for _ in range(steps)]
    finally:
        made.close()


def assert_same(left: list[dict[str, np.ndarray]], right: list[dict[str, np.ndarray]]) -> None:
    for a, b in zip(left, right, strict=True):
        assert list(a) == list(b) == FIELDS
        for name in FIELDS:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def names(found: tuple[Path, ...], root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in found]


# The files that dataset_path finds.

TREE = {
    "b.txt": b"b",
    "a/z.txt": b"az",
    "a/deep/er/c.md": b"c",
    "a/.hidden.txt": b"h",
    ".git/config": b"g",
    "a/empty.txt": b"",
    "a/image.bin": b"\x89PNG\0\0",
    "odd[1].txt": b"odd",
}


def test_folders_and_globs_are_sorted_and_pass_over_what_is_no_text(tmp_path: Path) -> None:
    write(tmp_path, TREE)
    everything = ["b.txt", "odd[1].txt", "a/z.txt", "a/deep/er/c.md"]
    assert names(find_documents([str(tmp_path)]), tmp_path) == everything
    found = {
        "*.txt": ["b.txt", "odd[1].txt"],
        "**/*.txt": ["a/z.txt", "b.txt", "odd[1].txt"],
        "a/**/*.md": ["a/deep/er/c.md"],
        "a": ["a/z.txt", "a/deep/er/c.md"],
        "a/*": ["a/deep/er/c.md", "a/z.txt"],
        "?": ["a/z.txt", "a/deep/er/c.md"],
        "odd[1].txt": ["odd[1].txt"],
        "a/.h*": ["a/.hidden.txt"],
    }
    for pattern, expected in found.items():
        assert names(find_documents([f"{tmp_path}/{pattern}"]), tmp_path) == expected, pattern
    assert sorted(names(find_documents([f"{tmp_path}/**"]), tmp_path)) == sorted(everything)


def test_the_order_is_that_of_the_paths_and_a_file_named_twice_counts_once(tmp_path: Path) -> None:
    write(tmp_path, TREE)
    paths = [f"{tmp_path}/{name}" for name in ("b.txt", "a", "*.txt", ".")]
    expected = ["b.txt", "a/z.txt", "a/deep/er/c.md", "odd[1].txt"]
    assert names(find_documents(paths), tmp_path) == expected


def test_paths_may_be_relative_or_below_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, TREE)
    monkeypatch.chdir(tmp_path / "a")
    assert find_documents(["z.txt"]) == (Path("z.txt"),)
    assert find_documents(["../*.txt"]) == (Path("../b.txt"), Path("../odd[1].txt"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_documents(["~/b.txt"]) == (tmp_path / "b.txt",)


def test_links_are_followed_and_cycles_end(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", {"far.txt": b"far", "more/m.txt": b"m"})
    root = write(tmp_path / "root", {"near.txt": b"near", "sub/s.txt": b"s"})
    (root / "far.txt").symlink_to(tmp_path / "elsewhere/far.txt")
    (root / "more").symlink_to(tmp_path / "elsewhere/more")
    (root / "up").symlink_to(root)
    (root / "sub/up").symlink_to(root)
    (root / "sub/up2").symlink_to("../..")
    (root / "broken").symlink_to("nowhere")
    (root / "itself").symlink_to("itself")
    for pattern in (root, f"{root}/**", f"{root}/*"):
        found = {path.name for path in find_documents([str(pattern)])}
        assert found == {"near.txt", "far.txt", "m.txt", "s.txt"}, pattern


def test_the_default_is_the_standard_library_and_starts_at_once() -> None:
    def first() -> tuple[PackedText, Any]:
        text = PackedText(find_documents(()), seq_len=2048, seed=0)
        return text, text[0]

    (text, row), calls = counted(first)
    assert calls < 500_000
    assert len(text) * 2048 > 5_000_000
    assert any(path.endswith("/argparse.py") for path in text.paths)
    assert not any("/test/" in path or "site-packages" in path for path in text.paths)
    assert bytes(row["inputs"][1:50].astype(np.uint8)).isascii()


def bad_paths(root: Path) -> dict[str, tuple[str, str]]:
    write(root, TREE)
    write(root, {"hollow/empty.txt": b"", "hollow/raw.bin": b"\0"})
    os.mkfifo(root / "pipe")
    (root / "loop").symlink_to("loop")
    (root / "bare").mkdir()
    return {
        "missing": ("missing", "matches nothing"),
        "missing glob": ("*.parquet", "matches nothing"),
        "below a file": ("b.txt/c.txt", "matches nothing"),
        "zero byte": ("a\0b*", "dataset_path"),
        "not a glob": ("a/**c/*.txt", "not a glob"),
        "empty": ("a/empty.txt", "is empty"),
        "binary": ("a/image.bin", "is binary"),
        "pipe": ("pipe", "not a regular file"),
        "loop": ("loop", "link to nothing"),
        "hollow": ("hollow", "holds no text: 2 files"),
        "hollow glob": ("hollow/*", "holds no text: 2 files"),
        "bare": ("bare", "holds no text: 0 files"),
    }


def assert_short(error: UserError, *words: str) -> None:
    lines = str(error).splitlines()
    assert len(lines) <= 3, error
    assert lines[-1].startswith("fix: "), error
    for word in words:
        assert word in str(error)


@pytest.mark.parametrize("path", ["/", "/proc", "/dev/", "//sys/."])
def test_what_never_ends_is_no_folder_of_text(path: str) -> None:
    with pytest.raises(UserError) as raised:
        find_documents([path])
    assert_short(raised.value, "dataset_path", "is the system's")


def test_a_path_that_is_no_text_is_a_short_error(tmp_path: Path) -> None:
    for case, (path, words) in bad_paths(tmp_path).items():
        with pytest.raises(UserError) as raised:
            find_documents([f"{tmp_path}/b.txt", f"{tmp_path}/{path}"])
        assert_short(raised.value, "dataset_path", words)
        assert path.split("/")[-1] in str(raised.value) or "\0" in path, case


def test_an_empty_name_does_not_mean_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, TREE)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="matches nothing in"):
        find_documents([""])


def test_what_cannot_be_read_is_an_error_and_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, TREE)

    def deny(path: object, *_args: Any, **_options: Any) -> NoReturn:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:  # permissions do not bind root, so deny by hand
        patch.setattr(Path, "open", deny)
        for path in (tmp_path, tmp_path / "b.txt"):
            with pytest.raises(UserError) as raised:
                find_documents([str(path)])
            assert_short(raised.value, "b.txt", "Permission denied")
    listing = os.scandir
    monkeypatch.setattr(
        os, "scandir", lambda at: deny(at) if str(at).endswith("/a") else listing(at)
    )
    with pytest.raises(UserError) as raised:
        find_documents([str(tmp_path)])
    assert_short(raised.value, "/a ", "Permission denied")


# How the documents are packed.


def plain_rows(documents: list[bytes], seq_len: int) -> list[dict[str, list[int]]]:
    """Compute what `PackedText` does, by appending to lists."""
    stream: list[int] = []
    for document in documents:
        stream += [DOCUMENT, *document]
    rows = []
    for start in range(0, len(stream) - seq_len, seq_len):
        row: dict[str, list[int]] = {name: [] for name in FIELDS}
        position, segment = -1, 1
        for place in range(start, start + seq_len):
            position += 1
            if stream[place] == DOCUMENT and place > start:
                position, segment = 0, segment + 1
            values = (stream[place], stream[place + 1], position, segment)
            for name, value in zip(FIELDS, values, strict=True):
                row[name].append(value)
        rows.append(row)
    return rows


@example(documents=[b"abc"], seq_len=4, seed=0)  # one token too few
@example(documents=[b"abc"], seq_len=3, seed=0)  # just enough
@settings(max_examples=60)
@given(
    documents=st.lists(st.binary(min_size=1, max_size=9), min_size=1, max_size=9),
    seq_len=st.integers(1, 12),
    seed=st.integers(0, 2**32 - 1),
)
def test_rows_equal_a_plain_loop_and_every_token_is_a_target_once(
    documents: list[bytes], seq_len: int, seed: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{n}.txt") for n in range(len(documents))]
        for path, document in zip(paths, documents, strict=True):
            path.write_bytes(document)
        tokens = sum(len(document) + 1 for document in documents)
        if tokens <= seq_len:
            with pytest.raises(UserError, match="max_target_length"):
                PackedText(paths, seq_len=seq_len, seed=seed)
            return
        text = PackedText(paths, seq_len=seq_len, seed=seed)
        shuffled = [Path(path).read_bytes() for path in text.paths]
        rows = [text[i] for i in range(len(text))]
    assert sorted(shuffled) == sorted(documents)
    for row in rows:
        assert {(x.dtype.name, x.shape) for x in row.values()} == {("int32", (seq_len,))}
    assert [{k: v.tolist() for k, v in row.items()} for row in rows] == plain_rows(
        shuffled, seq_len
    )
    stream = [token for document in shuffled for token in (DOCUMENT, *document)]
    targets = np.concatenate([row["targets"] for row in rows]).tolist()
    assert targets == stream[1 : 1 + len(targets)]
    assert len(stream) - 1 - len(targets) < seq_len


def test_the_seed_decides_the_order_of_the_documents(tmp_path: Path) -> None:
    documents = find_documents([str(corpus(tmp_path))])
    orders = [PackedText(documents, seq_len=16, seed=seed).paths for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != tuple(map(str, documents))


def test_a_corpus_larger_than_memory_costs_no_memory(tmp_path: Path) -> None:
    size = 1 << 38  # 256 GiB, sparse on disk
    path = tmp_path / "huge.txt"
    path.write_bytes(b"text" * 1024)
    os.truncate(path, size)
    with path.open("r+b") as file:
        file.seek(size - 4)
        file.write(b"last")
    tracemalloc.start()
    text = PackedText(find_documents([str(path)]), seq_len=128, seed=0)
    row = text[len(text) - 1]
    for i in range(0, len(text), len(text) // 200):
        text[i]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    assert len(text) == size // 128
    assert bytes(row["targets"][-4:].astype(np.uint8)) == b"last"


def test_more_rows_than_can_be_shuffled_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "huge.txt"
    path.write_bytes(b"text" * 1024)
    os.truncate(path, 1 << 38)
    with pytest.raises(UserError) as raised:
        PackedText([path], seq_len=32, seed=0)
    assert_short(raised.value, "max_target_length=32", "max_target_length=128 or more")


def test_a_source_can_be_pickled_and_read_by_many_threads(tmp_path: Path) -> None:
    text = PackedText(find_documents([str(corpus(tmp_path))]), seq_len=16, seed=3)
    again = pickle.loads(pickle.dumps(text))
    with ThreadPoolExecutor(8) as threads:
        rows = list(threads.map(again.__getitem__, [*range(len(text))] * 20))
    assert_same(rows, [text[i] for i in range(len(text))] * 20)


def test_a_file_that_changes_under_the_run_is_an_error(tmp_path: Path) -> None:
    root = write(tmp_path, {"a.txt": b"text" * 100})
    text = PackedText(find_documents([str(root)]), seq_len=16, seed=0)
    made = batches(
        config(root), vocab_size=257, seq_len=16, rows=8, microbatches=1, sharding=placed()
    )
    next(made)
    (root / "a.txt").write_bytes(b"text" * 99)
    with pytest.raises(UserError) as raised:
        text[0]
    assert_short(raised.value, "a.txt", "400 bytes", "changed")
    with pytest.raises(UserError) as raised:
        [next(made) for _ in range(data.READ_AHEAD_STEPS + 2)]
    assert_short(raised.value, "a.txt", "changed")
    with pytest.raises(ValueError, match="closed"):
        next(made)
    (root / "a.txt").unlink()
    with pytest.raises(UserError) as raised:
        text[0]
    assert_short(raised.value, "a.txt", "No such file")


# The batch of a step.


def test_every_epoch_has_every_row_once_in_another_order(tmp_path: Path) -> None:
    source = config(corpus(tmp_path), seed=5)
    text = PackedText(find_documents(source.dataset_path), seq_len=8, seed=5)
    epoch = len(text)
    read = np.concatenate([b["targets"][0] for b in take(source, epoch * 3 // 8 + 1, seq_len=8)])
    whole = sorted(text[i]["targets"].tolist() for i in range(epoch))
    epochs = [read[n * epoch : (n + 1) * epoch].tolist() for n in range(3)]
    assert all(sorted(rows) == whole for rows in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    in_order = [text[i]["targets"].tolist() for i in range(epoch)]
    assert in_order not in epochs
    assert take(config(tmp_path, seed=6), 1)[0]["inputs"].tolist() != read[:8].tolist()


def test_a_run_resumed_at_a_step_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    source = config(corpus(tmp_path))
    whole = take(source, 12, microbatches=2)
    for step in (1, 7, 11):
        assert_same(take(source, 12 - step, microbatches=2, first_step=step), whole[step:])
    far = take(source, 1, first_step=10**12)
    assert_same(far, take(source, 1, first_step=10**12))


def test_the_mesh_does_not_change_the_batch(tmp_path: Path) -> None:
    source = config(corpus(tmp_path))
    expected = take(source, 3, rows=8, microbatches=2)
    one_device = placed((1,), (None, None, None))
    for sharding in (
        one_device,
        placed((8,), (None, None, None)),
        placed((2, 4), (None, ("0", "1"), None)),
        placed((4, 2), (None, ("1", "0"), None)),
        placed((4, 2), (None, "0", "1")),
        placed((2, 4), ("0", "1", None)),
        placed((2, 2, 2), ("2", "0", "1")),
        placed((2, 4), (None, "1")),
    ):
        assert_same(take(source, 3, rows=8, microbatches=2, sharding=sharding), expected)
    # Microbatches only split the same sequences differently.
    joined = [{k: v.reshape(1, 16, 16) for k, v in batch.items()} for batch in expected]
    assert_same(take(source, 3, rows=16), joined)
    moved = shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-moved")
    assert_same(take(config(moved), 3, rows=8, microbatches=2), expected)


def test_arrays_are_placed_as_asked(tmp_path: Path) -> None:
    sharding = placed((4, 2), (None, "0", "1"))
    made = batches(
        config(corpus(tmp_path)),
        vocab_size=300,
        seq_len=16,
        rows=8,
        microbatches=3,
        sharding=sharding,
    )
    batch = next(made)
    made.close()
    made.close()
    assert list(batch) == FIELDS
    for array in batch.values():
        assert array.shape == (3, 8, 16)
        assert array.dtype == np.int32
        assert array.sharding == sharding
        assert {shard.data.shape for shard in array.addressable_shards} == {(3, 2, 8)}


def test_reading_runs_ahead_of_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = config(corpus(tmp_path))
    read, enough = [], threading.Event()
    original = PackedText.__getitem__

    def count(self: PackedText, row: Any) -> Any:
        read.append(row)
        if len(read) == 8 * data.READ_AHEAD_STEPS:
            enough.set()
        return original(self, row)

    monkeypatch.setattr(PackedText, "__getitem__", count)
    made = batches(source, vocab_size=257, seq_len=16, rows=8, microbatches=1, sharding=placed())
    try:
        assert enough.wait(WAIT_S), "nothing was read before the first step asked"
    finally:
        made.close()


def test_a_batch_that_cannot_be_made_is_a_short_error(tmp_path: Path) -> None:
    source = config(corpus(tmp_path))
    cases = [
        ({"vocab_size": 256}, ("vocab_size=256", "257")),
        ({"rows": 6}, ("[1, 6, 16]", "per_device_batch_size")),
        ({"seq_len": 10**6}, ("dataset_path", "max_target_length + 1 = 1000001")),
    ]
    for changes, words in cases:
        with pytest.raises(UserError) as raised:
            take(source, 1, **changes)
        assert_short(raised.value, *words)
    with pytest.raises(UserError, match="matches nothing"):
        take(config(tmp_path / "missing"), 1)


# Other processes.

CHILD = """
import json, sys
port, number, root, out = sys.argv[1:]
from moe_shard.quiet import hide_accelerator_warnings
with hide_accelerator_warnings():  # where `make targets` has put their compilers
    import jax
    if port != "0":
        jax.distributed.initialize(f"localhost:{port}", 2, int(number))
    jax.devices()
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from moe_shard.config.schema import DataConfig
from moe_shard.errors import UserError
from tests.counted import counted
from moe_shard.data import batches as data
from moe_shard.data.packed_text import PackedText

read = []
original = PackedText.__getitem__
PackedText.__getitem__ = lambda self, row: read.append(row) or original(self, row)
sharding = NamedSharding(Mesh(jax.devices(), "x"), PartitionSpec(None, "x", None))

def make(path):
    return data.batches(
        DataConfig(dataset_type="text", dataset_path=(path,), tokenizer_path="", seed=0),
        vocab_size=257, seq_len=16, rows=8, microbatches=2, sharding=sharding,
    )

made = make(root)
for step in range(3):
    for name, array in next(made).items():
        for shard in array.addressable_shards:
            row = shard.index[1].start or 0
            np.save(f"{out}/{step}-{name}-{row}.npy", np.asarray(shard.data))
report = {"shards": len(array.addressable_shards)}
if port != "0":
    made.close()
    report["read"] = read
    try:
        make(f"{root}/{number}")
    except UserError as error:
        report["refused"] = str(error)
# Alone, nothing is closed: reading ahead must not keep the interpreter from leaving.
print(json.dumps(report))
"""


def start(*arguments: object, devices: int, hash_seed: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", CHILD, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(data.__file__).parents[2],
        env={
            **os.environ,
            "PYTHONHASHSEED": str(hash_seed),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        },
    )


def saved(folder: Path) -> list[dict[str, np.ndarray]]:
    """Read the batches that the children wrote, one file for each device's sequence."""

    def rows(step: int, name: str) -> np.ndarray:
        return np.concatenate([np.load(folder / f"{step}-{name}-{row}.npy") for row in range(8)], 1)

    return [{name: rows(step, name) for name in FIELDS} for step in range(3)]


def together_and_alone(
    root: Path, folder: Path, wait_s: float = WAIT_S
) -> tuple[list[list[dict[str, np.ndarray]]], list[tuple[str, str]]]:
    """Read a folder by two processes that begin at once, and by one.

    Args:
        root: the text; what each of the two is refused is in its `0` and `1`.
        folder: receives the batches.
        wait_s: seconds that a process may take.

    Returns:
        The batches of the one and of the two; what the two and the one wrote.
    """
    outs = [folder / "alone", folder / "together"]
    for out in outs:
        out.mkdir()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = [
        start(port, 0, root, outs[1], devices=4, hash_seed=1),
        start(port, 1, root, outs[1], devices=4, hash_seed=2),
        start(0, 0, root, outs[0], devices=8, hash_seed=3),
    ]
    try:
        outputs = [child.communicate(timeout=wait_s) for child in children]
    finally:
        for child in children:
            child.kill()
    for child, (stdout, stderr) in zip(children, outputs, strict=True):
        assert child.returncode == 0, stdout + stderr
    return [saved(out) for out in outs], outputs


def test_other_processes_make_the_same_batches_and_read_only_their_rows(tmp_path: Path) -> None:
    # Large enough that no sequence comes twice in all the steps that are read ahead.
    root = corpus(tmp_path / "text", documents=40)
    found, outputs = together_and_alone(root, tmp_path)
    expected = take(config(root), 3, rows=8, microbatches=2)
    for each in found:
        assert_same(each, expected)
    assert outputs[2] == ('{"shards": 8}\n', ""), "noise on the terminal"
    # Gloo prints to standard output first.
    first, second = (json.loads(stdout.splitlines()[-1]) for stdout, _ in outputs[:2])
    assert first["shards"] == second["shards"] == 4
    for report in (first, second):
        assert len(set(report["read"])) == len(report["read"]) >= 3 * 8
        assert_short(UserError(report["refused"]), "some processes", "every host")
    assert not set(first["read"]) & set(second["read"])


SYNTHETIC = DataConfig(dataset_type="synthetic", dataset_path=(), tokenizer_path="", seed=3)


def test_synthetic_batches_are_one_batch_wherever_a_run_begins_and_whatever_the_mesh() -> None:
    first, second = take(SYNTHETIC, 2, vocab_size=50, microbatches=2)
    (later,) = take(
        SYNTHETIC, 1, vocab_size=50, microbatches=2, first_step=7, sharding=placed((1,))
    )
    for name, rows in first.items():
        assert rows.shape == (2, 8, 16)
        np.testing.assert_array_equal(rows, second[name])
        np.testing.assert_array_equal(rows, later[name])
    np.testing.assert_array_equal(first["inputs"][..., 1:], first["targets"][..., :-1])
    assert (first["positions"] == np.arange(16)).all()
    assert (first["segment_ids"] == 1).all()
    different = {row.tobytes() for row in first["inputs"].reshape(-1, 16)}
    assert len(different) == 16


def test_synthetic_tokens_are_all_of_the_vocabulary_and_of_the_seed() -> None:
    (batch,) = take(SYNTHETIC, 1, vocab_size=7, rows=64, seq_len=64)
    counts = np.bincount(batch["inputs"].ravel(), minlength=7)
    assert len(counts) == 7
    assert (abs(counts / (4096 / 7) - 1) < 0.2).all()  # four standard deviations
    (other,) = take(replace(SYNTHETIC, seed=4), 1, vocab_size=7, rows=64, seq_len=64)
    assert (other["inputs"] != batch["inputs"]).mean() > 0.8
