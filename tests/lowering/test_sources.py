"""Check that what is no program's text is answered, and not read without end."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from moe_shard.errors import UserError
from moe_shard.lowering.sources import parse_mesh, read_text, recorded_mesh


def test_a_device_and_zeros_are_no_text(tmp_path: Path) -> None:
    for path in (Path("/dev/zero"), tmp_path / "zeros"):
        if path.parent == tmp_path:
            path.touch()
            os.truncate(path, 1 << 40)
        with pytest.raises(UserError, match="is not HLO text: it has zero bytes"):
            read_text(path)


def test_a_pipe_without_a_writer_is_empty(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert read_text(tmp_path / "pipe") == ""


def test_a_pipe_is_read_to_its_end() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"HloModule a")
    os.close(writer)
    assert read_text(Path(f"/dev/fd/{reader}")) == "HloModule a"
    os.close(reader)


@pytest.mark.parametrize(
    "record", ["", "[]", "{}", '{"mesh": []}', '{"mesh": {"a": Infinity}}', '{"mesh":' + "[" * 9999]
)
def test_a_record_without_a_mesh_says_the_fix(tmp_path: Path, record: str) -> None:
    (tmp_path / "lowering.json").write_text(record)
    with pytest.raises(UserError, match="--mesh"):
        recorded_mesh(tmp_path / "a.txt")


def test_the_mesh_of_a_record(tmp_path: Path) -> None:
    (tmp_path / "lowering.json").write_text(json.dumps({"mesh": {"expert": 8}}))
    assert recorded_mesh(tmp_path / "a.txt") == {"expert": 8}


@pytest.mark.parametrize("size", ["0", "-1", "x", "", "9" * 5000])
def test_a_size_that_no_axis_has(size: str) -> None:
    with pytest.raises(UserError, match=r"^--mesh: cannot read 'data=.{0,60}'; write it as data=1"):
        parse_mesh(f"expert=8,data={size}")
