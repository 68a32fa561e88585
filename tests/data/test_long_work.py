"""Check what is said of long work, and that one process makes what several wait for."""

from __future__ import annotations

import fcntl
import gzip
import json
import re
import threading
import time
from pathlib import Path

import pytest

from moe_shard.config.schema import DataConfig
from moe_shard.data import long_work
from moe_shard.data.found_text import find_text
from moe_shard.data.long_work import LongWork, sole_writer


def test_a_line_comes_every_ten_seconds_and_none_of_short_work() -> None:
    now, said = [0.0], list[str]()
    work = LongWork(said.append, clock=lambda: now[0])
    for second in range(35):
        now[0] = second
        work.tell(lambda: "half")
    assert said == ["half, 10 s", "half, 20 s", "half, 30 s"]
    assert work.long
    assert not LongWork(said.append, clock=lambda: 0.0).long


def test_reading_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(long_work, "LINE_SECONDS", -1.0)
    for name in "ab":
        (tmp_path / f"{name}.jsonl.gz").write_bytes(
            gzip.compress(json.dumps({"text": "x" * 10**6}).encode())
        )
    config = DataConfig(dataset_type="text", dataset_path=(f"{tmp_path}/*.gz",), tokenizer_path="")
    lines: list[str] = []
    find_text(config, config.dataset_path, say=lines.append)
    assert [re.sub(r"\d+ s$", "0 s", line) for line in lines] == [
        "text: 1 MB of text read so far, 0 of 2 files done, 0 s",
        "text: 2 MB of text read so far, 1 of 2 files done, 0 s",
        "text: 2 MB of text read in 0 s",
    ]


def test_what_a_killed_process_has_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / "cache" / ".name.0123456789ab"
    left.mkdir(parents=True)
    (left / "text").write_bytes(b"half")
    other = left.with_name(".other.0123456789ab")
    other.mkdir()
    with sole_writer(tmp_path / "cache" / "name"):
        assert [path.name for path in sorted(left.parent.iterdir())] == [".name.lock", other.name]
    assert [*left.parent.iterdir()] == [other]


def test_one_waits_for_another_and_never_holds_a_lock_that_is_gone(tmp_path: Path) -> None:
    folder, inside, most = tmp_path / "name", [0], [0]

    def make() -> None:
        for _ in range(20):
            with sole_writer(folder):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.0005)
                inside[0] -= 1

    threads = [threading.Thread(target=make) for _ in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert most == [1]


def test_where_locks_do_not_work_nothing_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    left = tmp_path / ".name.0123456789ab"
    left.mkdir()
    with sole_writer(tmp_path / "name"):
        assert left.is_dir()
