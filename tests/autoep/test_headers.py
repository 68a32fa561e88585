"""Read headers from untrusted files, and refuse every kind of malformed header."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_shard.autoep.headers import TensorHeader, read_headers
from moe_shard.errors import UserError
from tests.autoep.directory import write_file, write_raw

NAME = "model.safetensors"
INDEX = "model.safetensors.index.json"
ONE = {"a": ("BF16", [2, 3])}
OTHER = {"b": ("F32", [4])}


def fails(directory: Path, *words: str) -> None:
    """Expect reading to fail with what, where and a fix, in at most three lines."""
    with pytest.raises(UserError) as caught:
        read_headers(directory)
    text = str(caught.value)
    assert text.count("\n") <= 2
    assert "fix: " in text.splitlines()[-1]
    assert str(directory) in text
    for word in words:
        assert word in text


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_one_file(tmp_path: Path) -> None:
    path = tmp_path / NAME
    tensors = {"z": ("F32", [2, 3]), "a": ("BF16", []), "none": ("F16", [0, 4])}
    write_file(path, tensors)
    start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert read_headers(tmp_path) == {
        "z": TensorHeader(path, "F32", (2, 3), start, start + 24),
        "a": TensorHeader(path, "BF16", (), start + 24, start + 26),
        "none": TensorHeader(path, "F16", (0, 4), start + 26, start + 26),
    }


def test_notes_of_the_writer_and_padding_are_passed_over(tmp_path: Path) -> None:
    header = json.dumps({"__metadata__": {"format": "pt"}, "a": entry()}) + " " * 7
    write_raw(tmp_path / NAME, header.encode(), 8)
    assert list(read_headers(tmp_path)) == ["a"]


def test_several_files_with_and_without_an_index(tmp_path: Path) -> None:
    write_file(tmp_path / "x.safetensors", ONE)
    write_file(tmp_path / "y.safetensors", OTHER)
    assert {name: head.file.name for name, head in read_headers(tmp_path).items()} == {
        "a": "x.safetensors",
        "b": "y.safetensors",
    }
    # The directory has other files than those that the index names.
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"b": "y.safetensors"}}))
    assert list(read_headers(tmp_path)) == ["b"]
    # A single file for all tensors has priority, as in transformers.
    write_file(tmp_path / NAME, {"c": ("U8", [1])})
    assert list(read_headers(tmp_path)) == ["c"]


def test_weights_are_not_read(tmp_path: Path) -> None:
    # 40 TB in a file that takes a few kB on disk.
    at = 40 * 10**12
    header = json.dumps({"a": {"dtype": "U8", "shape": [at // 4], "data_offsets": [0, at // 4]}})
    write_raw(tmp_path / NAME, header.encode(), at // 4)
    assert read_headers(tmp_path)["a"].shape == (at // 4,)
    assert os.stat(tmp_path / NAME).st_blocks * 512 < 10**6


@pytest.mark.parametrize(
    ("header", "data", "length", "words"),
    [
        (b"{}", 0, 3, ["a header of 3 bytes", "of 10"]),
        (b"{}", 0, 2**63, ["a header of 9,223,372,036,854,775,808 bytes"]),
        (b"{", 0, None, ["not JSON"]),
        (b"\xff\xfe", 0, None, ["not text"]),
        (b"[" * 100_000, 0, None, ["nested too deeply"]),
        (b"[]", 0, None, ["not a JSON object"]),
        (b'{"a": NaN}', 0, None, ["NaN"]),
        (b'{"a": 1, "a": 2}', 0, None, ["key a stands twice"]),
        (b'{"a": ' + b"9" * 5000 + b"}", 0, None, ["not JSON"]),
    ],
)
def test_headers_that_are_none(
    header: bytes, data: int, length: int | None, words: list[str], tmp_path: Path
) -> None:
    write_raw(tmp_path / NAME, header, data, length)
    fails(tmp_path, NAME, *words)


def test_a_header_that_is_too_long_to_be_one(tmp_path: Path) -> None:
    write_raw(tmp_path / NAME, b"{}", 10**9, length=100_000_001)
    fails(tmp_path, "a header of 100,000,001 bytes", "at most 100,000,000")


@pytest.mark.parametrize(
    ("tensors", "data", "words"),
    [
        ({"a": 1}, 8, ["tensor a", "dtype, shape and data_offsets"]),
        ({"a": entry() | {"more": 1}}, 8, ["tensor a", "dtype, shape and data_offsets"]),
        ({"a": entry(dtype="F31")}, 8, ["dtype F31", "BF16"]),
        ({"a": entry(dtype=[])}, 8, ["dtype []"]),
        ({"a": entry(shape=2)}, 8, ["shape 2"]),
        ({"a": entry(shape=[-2])}, 8, ["shape [-2]"]),
        ({"a": entry(shape=[2.0])}, 8, ["shape [2.0]"]),
        ({"a": entry(shape=[True])}, 4, ["shape [true]"]),
        ({"a": entry(shape=[10**30])}, 4, ["shape [1000"]),
        ({"a": entry(shape=[1] * 17, offsets=[0, 4])}, 4, ["shape"]),
        ({"a": entry(offsets=[0])}, 8, ["data_offsets [0]"]),
        ({"a": entry(offsets=[8, 0])}, 8, ["data_offsets [8, 0]"]),
        ({"a": entry(offsets=[0, 4])}, 4, ["data_offsets [0, 4]", "F32 in shape [2]"]),
        ({"a": entry(), "b": entry(offsets=[4, 12])}, 12, ["tensor b overlaps a"]),
        ({"a": entry(), "b": entry()}, 8, ["tensor b overlaps a"]),
        ({"a": entry(), "b": entry(offsets=[12, 20])}, 20, ["tensor b leaves a hole after a"]),
        ({"a": entry(offsets=[4, 12])}, 12, ["tensor a leaves a hole after the header"]),
        ({"a": entry()}, 7, ["is cut off"]),
        ({"a": entry()}, 9, ["bytes after its last tensor"]),
        ({"a\nb": entry(dtype="F31")}, 8, ["tensor a b"]),
    ],
)
def test_entries_that_contradict_the_file(
    tensors: dict[str, Any], data: int, words: list[str], tmp_path: Path
) -> None:
    write_raw(tmp_path / NAME, json.dumps(tensors).encode(), data)
    fails(tmp_path, NAME, *words)


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"")
    fails(tmp_path, "a header of 0 bytes in a file of 0")


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ("{", ["not JSON"]),
        ("[]", ["not a JSON object"]),
        ("{}", ["no weight_map"]),
        ('{"weight_map": []}', ["no weight_map"]),
        ('{"weight_map": {"a": 1}}', ["file of a is 1"]),
        ('{"weight_map": {"a": "x.safetensors", "b": "x.safetensors"}}', ["b is not in x.saf"]),
        ('{"weight_map": {"a": "gone.safetensors"}}', ["gone.safetensors: missing"]),
        ('{"weight_map": {"a": "../x.safetensors"}}', ["../x.safetensors is not the name"]),
        ('{"weight_map": {"a": "/etc/passwd"}}', ["/etc/passwd is not the name"]),
        ('{"weight_map": {"a": "deep/x.safetensors"}}', ["deep/x.safetensors: missing"]),
        ('{"weight_map": {"a": ".."}}', [".. is not the name"]),
        ('{"weight_map": {"a": ""}}', ["is not the name"]),
        ('{"weight_map": {"a": "a\\u0000b"}}', ["is not the name"]),
    ],
)
def test_an_index_that_is_wrong(index: str, words: list[str], tmp_path: Path) -> None:
    write_file(tmp_path / "x.safetensors", ONE)
    (tmp_path / INDEX).write_text(index)
    fails(tmp_path, *words)


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    write_file(tmp_path / "x.safetensors", ONE)
    write_file(tmp_path / "y.safetensors", ONE)
    fails(tmp_path, "tensor a is in x.safetensors and in y.safetensors")
    places = {"a": "x.safetensors", "b": "y.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": places}))
    fails(tmp_path, "tensor a is in x.safetensors and in y.safetensors")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.symlink_to(path), []),
        (lambda path: path.symlink_to(path.with_name("gone")), []),
        (lambda path: path.mkdir(), ["not a file"]),
        (lambda path: os.mkfifo(path), ["not a file"]),
    ],
    ids=["circle", "dead", "directory", "pipe"],
)
def test_files_that_are_none(
    make: Callable[[Path], None], words: list[str], tmp_path: Path
) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    make(directory / NAME)
    fails(directory, *words)


def test_an_index_that_is_a_pipe_does_not_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_shard.files._WAIT_S", 0.1)
    os.mkfifo(tmp_path / INDEX)
    fails(tmp_path, INDEX)


def test_weights_may_be_links_to_shared_storage(tmp_path: Path) -> None:
    write_file(tmp_path / "anywhere", ONE)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / NAME).symlink_to(tmp_path / "anywhere")
    assert list(read_headers(tmp_path / "model")) == ["a"]


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123abcd"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    write_file(blobs / "e3b0c442", ONE)
    (snapshot / NAME).symlink_to(Path("../../blobs/e3b0c442"))
    assert list(read_headers(snapshot)) == ["a"]


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("pytorch_model.bin", ["only pickled weights (pytorch_model.bin)", "save_pretrained"]),
        ("README.md", ["no safetensors file", INDEX]),
    ],
)
def test_no_safetensors(file: str, words: list[str], tmp_path: Path) -> None:
    (tmp_path / file).write_text("")
    fails(tmp_path, *words)
