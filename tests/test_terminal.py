"""Check that a run outlasts the reader of its output, and a disk that is full."""

from __future__ import annotations

import os
from typing import IO, cast

import pytest

from moe_shard.terminal import Console, LastingOutput


def test_lines_are_lost_and_said_once_where_nobody_reads() -> None:
    reader, writer = os.pipe()
    said: list[str] = []
    with open(writer, "w") as stream:
        console = Console(file=cast(IO[str], LastingOutput(stream, said.append)))
        console.print("first é")
        assert os.read(reader, 100) == "first é\n".encode()
        os.close(reader)
        for _ in range(3):
            console.print("lost")
    assert said == ["standard output is lost: Broken pipe; the run goes on"]


def test_a_full_disk_does_not_end_it() -> None:
    said: list[str] = []
    with open("/dev/full", "w") as stream:
        lasting = LastingOutput(stream, said.append)
        for _ in range(3):
            print("lost", file=cast(IO[str], lasting), flush=True)
    assert said == ["standard output is lost: No space left on device; the run goes on"]


def test_a_console_leaves_a_broken_pipe_to_the_command() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w")
    with pytest.raises(BrokenPipeError):
        Console(file=stream).print("x")
    with pytest.raises(BrokenPipeError):
        stream.close()
