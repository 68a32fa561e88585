"""Write one record per step to `metrics.jsonl` and to TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import TextIO

from tensorboardX import SummaryWriter

from moe_shard.files import write_text

Record = dict[str, float | int | None]


class MetricsWriter:
    """Append records to a run's files.

    A resumed run repeats the steps after its checkpoint. Their old records are removed first, so
    that the file holds each step once, even if a kill cut off the last line.

    Args:
        folder: folder of the run.
        first_step: first step of this process.
        tensorboard: write `tensorboard/` as well.
        enabled: write at all; False on all processes but one.
    """

    def __init__(
        self, folder: Path, *, first_step: int, tensorboard: bool, enabled: bool = True
    ) -> None:
        self._file: TextIO | None = None
        self._tensorboard: SummaryWriter | None = None
        if enabled:
            path = folder / "metrics.jsonl"
            _keep_before(path, first_step)
            self._file = path.open("a", encoding="utf-8", buffering=1)
        if enabled and tensorboard:
            self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def write(self, record: Record) -> None:
        """Append the record of one step, numbered by its key `step`."""
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
        if self._tensorboard is not None:
            for name, value in record.items():
                if name != "step" and value is not None:
                    self._tensorboard.add_scalar(name, value, record["step"])


def read_metrics(path: Path) -> list[Record]:
    """Read the records of a `metrics.jsonl`, without a last line that was cut off."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _keep_before(path: Path, first_step: int) -> None:
    kept = [record for record in read_metrics(path) if (record["step"] or 0) < first_step]
    write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
