"""Train as `moe_shard.train` does, and keep the tokens of each batch that a step is given.

    RECORDED_BATCHES=FOLDER python -m tests.soak.recorded_batches MODEL [key=value ...]

Each process writes a file of its own, which holds the sequences of its devices.
"""

from __future__ import annotations

import os
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from moe_shard.data import batches as data

FOLDER = "RECORDED_BATCHES"
"""Variable of the environment that names the folder."""


class RecordedBatches(Iterator[data.DeviceBatch]):
    """Pass batches on, and write them to a file.

    Args:
        made: the batches.
        first_step: number of the first.
        path: the file.
    """

    def __init__(self, made: data.Batches, first_step: int, path: Path) -> None:
        self.bytes_per_token = made.bytes_per_token
        self._made, self._step = made, first_step
        self._file = path.open("ab", buffering=0)

    def __next__(self) -> data.DeviceBatch:
        batch = next(self._made)
        inputs, targets = batch["inputs"], batch["targets"]
        both = zip(inputs.addressable_shards, targets.addressable_shards, strict=True)
        for shard, of_targets in both:
            if shard.replica_id:
                continue
            tokens = np.concatenate([np.asarray(shard.data), np.asarray(of_targets.data)], -1)[0]
            rows = np.arange(len(tokens)) + (shard.index[1].start or 0)
            places = np.stack([np.full_like(rows, self._step), rows], 1)
            self._file.write(np.concatenate([places, tokens], 1).astype("<i4").tobytes())
        self._step += 1
        return batch

    def close(self) -> None:
        """Stop prefetching."""
        self._made.close()
        self._file.close()


def read_recorded(folder: Path, seq_len: int) -> Int32[np.ndarray, "n width"]:
    """Read the sequences of all processes and starts of a run.

    Args:
        folder: where they are.
        seq_len: S, tokens of a sequence.

    Returns:
        For each sequence: its step, its number in the batch, S inputs and S targets.
    """
    width = 2 + 2 * seq_len
    parts = [np.fromfile(path, "<i4") for path in sorted(folder.iterdir())]
    whole = [part[: len(part) // width * width] for part in parts]  # a kill may have cut the last
    return np.concatenate(whole).astype(np.int32).reshape(-1, width)


def main() -> None:
    """Run the command line."""
    folder = Path(os.environ[FOLDER])
    folder.mkdir(parents=True, exist_ok=True)
    original = data.batches

    def recorded(*args: Any, first_step: int = 0, **options: Any) -> RecordedBatches:
        made = original(*args, first_step=first_step, **options)
        return RecordedBatches(made, first_step, folder / str(os.getpid()))

    data.batches = recorded  # type: ignore[assignment]
    runpy.run_module("moe_shard.train", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
