"""Write the records of a run: a line of JSON each in files of its folder, and to TensorBoard."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from moe_shard.errors import Finding
from moe_shard.files import next_numbered, pass_over_hole, write_bytes
from moe_shard.training.appended import AppendedFile
from moe_shard.training.events import Events

Record = dict[str, float | int | None]
_LONGEST_LINE = 1 << 20
METRICS, LAYERS = "metrics.jsonl", "layers.jsonl"


class Sink(Protocol):
    """Take the numbers of a run where people look at them."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Take the numbers of a step, by their tags."""

    def close(self) -> None:
        """Finish; nothing more is written."""


class MetricsWriter:
    """Append records to a run's files.

    A resumed run repeats the steps after its checkpoint. Their old records are removed first, so
    that a file holds each step once, even if a kill cut off the last line.

    On a full disk training goes on: records are held, and written whole once there is room.

    Args:
        folder: folder of the run.
        first_step: first step of this process.
        tensorboard: write `tensorboard/` as well.
        enabled: write at all; False on all processes but one.
        sinks: take the same numbers as TensorBoard.
        say: receives a line on what was repaired, or cannot be written.

    Raises:
        UserError: something else has the name of one of the files.
        OSError: a file cannot be opened.
    """

    def __init__(
        self,
        folder: Path,
        *,
        first_step: int,
        tensorboard: bool,
        enabled: bool = True,
        sinks: Sequence[Sink] = (),
        say: Callable[[str], object] = lambda _: None,
    ) -> None:
        self._files: dict[str, AppendedFile] = {}
        self._sinks: list[Sink] = [*sinks]
        if not enabled:
            return
        for name in (METRICS, LAYERS):
            _keep_before(folder / name, first_step, say)
            self._files[name] = AppendedFile(folder / name, say)
        if tensorboard:
            self._sinks.append(Events(folder / "tensorboard", first_step, say))

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for file in self._files.values():
            file.close()
        for sink in self._sinks:
            sink.close()
        lacking = {name: file for name, file in self._files.items() if file.missing}
        if kind is None and lacking:
            what = ", ".join(
                f"{name} lacks {file.missing} records" for name, file in lacking.items()
            )
            why = next(iter(lacking.values())).refused
            raise Finding(
                f"{what}: {why}\n"
                "fix: make room on that disk; the same command continues from the last checkpoint"
            )

    def write(self, record: Record) -> None:
        """Append the record of one step, numbered by its key `step`."""
        self._append(METRICS, record)

    def write_layers(self, record: Mapping[str, Any]) -> None:
        """Append what a step shows of layers and kinds of parameters, see `layer_records`."""
        self._append(LAYERS, record)

    def write_evaluation(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Pass an evaluation on, of which `eval.jsonl` has the records.

        It is shown with the last step before it, whose number a continued run does not repeat.
        """
        for record in records:
            shown = {
                name: value for name, value in record.items() if name not in {"step", "dataset"}
            }
            self._show(int(record["step"]) - 1, {f"eval_{record['dataset']}": shown})

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        if name in self._files:
            self._files[name].write(json.dumps(record).encode() + b"\n")
            self._show(int(record["step"]), {key: x for key, x in record.items() if key != "step"})

    def _show(self, step: int, content: Mapping[str, Any]) -> None:
        values = dict(tagged(content))
        for sink in self._sinks:
            sink.write(step, values)


def tagged(content: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the numbers of a record with a tag each, such as `grad_norm/router`.

    Of a list the tag has the number of the layer, from the record's `layers`; what is null is left
    out.
    """
    layers = content.get("layers", ())
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{tag}", each) for tag, each in tagged(value))
        elif isinstance(value, Sequence) and not isinstance(value, str) and name != "layers":
            pairs = zip(layers, value, strict=True)
            yield from ((f"{name}/layer_{at:02d}", each) for at, each in pairs if each is not None)
        elif isinstance(value, int | float):
            yield name, value


def read_metrics(path: Path) -> list[Record]:
    """Read the records of a `metrics.jsonl`; lines that are none are left out.

    Raises:
        OSError: it cannot be read.
    """
    if not path.is_file():
        return []
    return [record for _, record in _lines(path, over_holes=True) if record is not None]


def _lines(path: Path, *, over_holes: bool = False) -> Iterator[tuple[bytes, Record | None]]:
    """Yield every line and the record in it; None where it is torn, or something else.

    What has no line breaks, such as the zeros that a crash of the machine leaves, comes in pieces;
    with `over_holes`, zeros that no disk has do not come.
    """
    with path.open("rb") as file:
        while line := file.readline(_LONGEST_LINE):
            try:
                record = json.loads(line) if line.lstrip().startswith(b"{") else None
            except (ValueError, RecursionError):
                record = None
            is_record = isinstance(record, dict) and type(record.get("step")) is int
            yield line, record if is_record else None
            if over_holes and not line.strip(b"\0"):
                pass_over_hole(file)


def _keep_before(path: Path, first_step: int, say: Callable[[str], object]) -> None:
    """Remove the records from a step on, and what is no record, of which a copy is kept."""
    if not path.exists():
        return
    keeping: list[bytes] = []
    read = kept = damaged = last = 0
    in_place, line = True, b""
    for line, record in _lines(path):
        if record is not None and int(record["step"] or 0) < first_step:
            in_place &= kept == read and line.endswith(b"\n")
            keeping.append(line if line.endswith(b"\n") else line + b"\n")
            kept += len(line)
        elif record is None and line.strip():
            damaged += 1
            last = read
        read += len(line)
    # A kill in the middle of a write leaves a last line like this, which holds nothing to keep.
    if damaged == 1 and last + len(line) == read and not line.endswith(b"\n"):
        damaged = 0
    if damaged:
        copy = _keep_copy(path)
        say(f"{path.name}: {damaged} lines are no records; the file as it was is {copy}")
    if in_place and not damaged:
        os.truncate(path, kept)  # needs no room on the disk
    else:
        write_bytes(path, b"".join(keeping))


def _keep_copy(path: Path) -> str:
    """Keep a file under the next number, and return that name; it is about to be replaced."""
    copy = next_numbered(path)
    try:
        os.link(os.path.realpath(path), copy)  # needs no room on the disk
    except OSError:  # links are not made there, or it is on another disk
        shutil.copyfile(path, copy)
    return copy.name
