"""Mixtures: each dataset's share of the sequences, the same for any process and any first step."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_shard.config.schema import DataConfig
from moe_shard.data.batches import batches
from moe_shard.data.mixture import shares, stream_of
from moe_shard.errors import UserError

SIZES: dict[str, Any] = {"vocab_size": 300, "seq_len": 8, "rows": 5, "microbatches": 2}


def written(folder: Path) -> tuple[str, ...]:
    """Write three texts of unlike sizes, each of one letter."""
    for letter, size in (("a", 100), ("b", 3000), ("c", 500)):
        (folder / f"{letter}.txt").write_text(letter * size)
    return tuple(str(folder / f"{letter}.txt") for letter in "abc")


def read(config: DataConfig, first: int, count: int) -> tuple[list[np.ndarray], list[str]]:
    sharding = NamedSharding(Mesh(jax.devices()[:1], "x"), PartitionSpec())
    lines: list[str] = []
    made = batches(config, sharding=sharding, first_step=first, say=lines.append, **SIZES)
    found = [np.asarray(next(made)["targets"]) for _ in range(count)]
    made.close()
    return found, lines


def test_shares_order_and_resume(tmp_path: Path) -> None:
    config = DataConfig(dataset_path=written(tmp_path), dataset_weights=(5.0, 3.0, 2.0), seed=4)
    whole, lines = read(config, 0, 40)
    letters = Counter(chr(row[3]) for batch in whole for row in batch.reshape(-1, 8))
    assert letters == {"a": 200, "b": 120, "c": 80}
    again, _ = read(config, 17, 5)
    for batch, expected in zip(again, whole[17:], strict=False):
        np.testing.assert_array_equal(batch, expected)
    assert f"mixture 1 of 3: 50.0% of the sequences, from {config.dataset_path[0]}" in lines
    assert sum("which" in line and "updates read once" in line for line in lines) == 3


def test_every_sequence_of_a_dataset_comes_before_one_comes_again() -> None:
    class Numbers:
        def __init__(self, first: int, count: int) -> None:
            self.first, self.count, self.bytes_per_token, self.seq_len = first, count, 1.0, 1

        def __len__(self) -> int:
            return self.count

        def __getitem__(self, row: int) -> int:
            return self.first + row

    config = DataConfig(dataset_path=("a", "b"), dataset_weights=(1.0, 3.0))
    assert shares(config) == [0.25, 0.75]
    texts: Any = [Numbers(0, 10), Numbers(100, 7)]
    stream = stream_of(config, texts)
    found = [stream[n] for n in range(80)]
    small, large = ([n for n in found if (n < 100) is wanted] for wanted in (True, False))
    assert (len(small), len(large)) == (20, 60)
    for seen, texts_own in ((small, range(10)), (large, range(100, 107))):
        for epoch in range(len(seen) // len(texts_own)):
            part = seen[epoch * len(texts_own) : (epoch + 1) * len(texts_own)]
            assert sorted(part) == list(texts_own)


@pytest.mark.parametrize(
    ("keys", "part"),
    [
        ({"dataset_weights": (1.0,)}, "are 1 for 2 items"),
        ({"dataset_weights": (1.0, 0.0)}, "out of range"),
        ({"dataset_weights": (1.0, 2.0), "eval_holdout_fraction": 0.1}, "several"),
    ],
)
def test_what_is_no_mixture(keys: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError, match=part):
        DataConfig(dataset_path=("a", "b"), **keys)
