"""Read records by one process and by two, which begin at once with an empty cache."""

from __future__ import annotations

import gzip
import json
import socket
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from tests.data.test_batches import assert_same, config, saved, start, take

pytestmark = pytest.mark.survival
WAIT_S = 240


def test_two_processes_have_the_batches_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "text"
    for number in range(2):  # what the children are refused, as it differs between them
        (root / str(number)).mkdir(parents=True)
        (root / str(number) / "a.txt").write_text("x" * (500 + number))
    rng = np.random.default_rng(0)
    rows = ["".join(map(chr, rng.integers(97, 123, 50))) for _ in range(200)]
    lines = "".join(json.dumps({"text": row}) + "\n" for row in rows)
    (root / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pa.parquet.write_table(pa.table({"text": rows[::-1]}), root / "b.parquet")
    outs = [tmp_path / "alone", tmp_path / "together"]
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
        for child in children:
            stdout, stderr = child.communicate(timeout=WAIT_S)
            assert child.returncode == 0, stdout + stderr
    finally:
        for child in children:
            child.kill()
    expected = take(config(root), 3, rows=8, microbatches=2)
    assert_same(saved(outs[0]), expected)
    assert_same(saved(outs[1]), expected)
