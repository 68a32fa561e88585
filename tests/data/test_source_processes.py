"""Read records by one process and by two, which begin at once with an empty cache."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from tests.data.test_batches import assert_same, config, take, together_and_alone

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
    found, _ = together_and_alone(root, tmp_path, WAIT_S)
    expected = take(config(root), 3, rows=8, microbatches=2)
    for each in found:
        assert_same(each, expected)
