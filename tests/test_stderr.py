"""Check the lines removed from file descriptor 2, their order, and that nothing is left."""

from __future__ import annotations

import os
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from moe_shard.stderr import collect_lines, drop_lines

MARK = "Involuntary full rematerialization"
NAMED = f"W1123 partitioner.cc:656] {MARK}. Of a tensor é"
NAMELESS = f"{MARK}."


def test_lines_without_the_mark_pass_in_order(capfd: pytest.CaptureFixture[str]) -> None:
    with collect_lines(MARK) as lines:
        os.write(2, b"first\n" + NAMED.encode() + b"\nsecond\r\n")
        os.write(2, b"third\n" + NAMELESS.encode() + b"\nunfinished")
    assert lines == [NAMED, NAMELESS]
    os.write(2, b" after\n" + NAMED.encode())
    assert capfd.readouterr().err == f"first\nsecond\r\nthird\nunfinished after\n{NAMED}"


def test_more_than_a_pipe_holds(capfd: pytest.CaptureFixture[str]) -> None:
    text = b"".join(b"line %d\n" % number for number in range(50_000))
    with collect_lines(MARK) as lines:
        os.write(2, text[:300_000])
        os.write(2, text[300_000:])
    assert lines == []
    assert capfd.readouterr().err.encode() == text


def test_when_the_block_raises_nothing_is_lost(capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        os.write(2, b"before\n" + NAMED.encode() + b"\nlast words")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), collect_lines(MARK):
        fail()
    assert capfd.readouterr().err == f"before\nlast words{NAMED}\n"


@contextmanager
def closed_stderr() -> Iterator[None]:
    kept = os.dup(2)
    os.close(2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def test_a_closed_descriptor_stays_closed() -> None:
    with closed_stderr():
        with collect_lines(MARK) as lines, pytest.raises(OSError, match="Bad file descriptor"):
            os.write(2, NAMED.encode())
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(2)
    assert lines == []


def test_a_reader_that_has_gone_ends_nothing() -> None:
    readable, writable = os.pipe()
    with closed_stderr():
        os.dup2(writable, 2)
        os.close(writable)
        os.close(readable)
        with collect_lines(MARK) as lines:
            os.write(2, b"to nobody\n" + NAMED.encode() + b"\n")
    assert lines == [NAMED]


def test_a_block_inside_another_leaves_the_lines_to_it(capfd: pytest.CaptureFixture[str]) -> None:
    def inner() -> None:
        with collect_lines(MARK) as lines:
            os.write(2, NAMED.encode() + b"\n")
        found.append(lines)

    found: list[list[str]] = []
    with collect_lines(MARK) as outer:
        inner()
        thread = threading.Thread(target=inner)
        thread.start()
        thread.join()
    assert found == [[], []]
    assert outer == [NAMED, NAMED]
    assert capfd.readouterr().err == ""


def test_a_child_that_lives_on_holds_nothing_up(capfd: pytest.CaptureFixture[str]) -> None:
    with collect_lines(MARK):
        child = subprocess.Popen(["sh", "-c", "read wait; echo late >&2"], stdin=subprocess.PIPE)
    os.write(2, b"early\n")
    child.communicate(b"\n")
    for thread in threading.enumerate():
        if thread.name == "stderr-lines":
            thread.join(10)
    assert capfd.readouterr().err == "early\nlate\n"


def test_the_descriptors_are_given_back() -> None:
    before = set(os.listdir("/dev/fd"))
    for _ in range(3):
        with collect_lines(MARK):
            os.write(2, b"")
    for thread in threading.enumerate():
        if thread.name == "stderr-lines":
            thread.join(10)
    assert set(os.listdir("/dev/fd")) == before


def test_dropped_lines_do_not_come_and_the_others_do(capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        os.write(2, b"noise 1\nkeep 1\n" * 10_000)  # more than a pipe holds
        os.write(2, b"keep 2")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), drop_lines(re.compile("^noise")):
        fail()
    os.write(2, b"after")
    assert capfd.readouterr().err == "keep 1\n" * 10_000 + "keep 2\nafter"


def test_lines_are_collected_within_a_block_that_drops_some(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with drop_lines(re.compile("noise")), collect_lines(MARK) as lines:
        os.write(2, b"noise\nnews\n" + NAMED.encode() + b"\n")
    assert lines == [NAMED]
    assert capfd.readouterr().err == "news\n"
