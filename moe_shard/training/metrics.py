"""Write one record per step to `metrics.jsonl` and to TensorBoard."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import scalar

from moe_shard.errors import Finding, UserError
from moe_shard.files import next_numbered, write_bytes
from moe_shard.training.appended import AppendedFile

Record = dict[str, float | int | None]
_LONGEST_LINE = 1 << 20


class MetricsWriter:
    """Append records to a run's files.

    A resumed run repeats the steps after its checkpoint. Their old records are removed first, so
    that the file holds each step once, even if a kill cut off the last line.

    On a full disk training goes on: records are held, and written whole once there is room.
    TensorBoard's own writer is not used: its thread would die there, and the run wait for it.

    Args:
        folder: folder of the run.
        first_step: first step of this process.
        tensorboard: write `tensorboard/` as well.
        enabled: write at all; False on all processes but one.
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
        say: Callable[[str], object] = lambda _: None,
    ) -> None:
        self._file: AppendedFile | None = None
        self._events: AppendedFile | None = None
        self._say = say
        if enabled:
            path = folder / "metrics.jsonl"
            _keep_before(path, first_step, say)
            self._file = AppendedFile(path, say)
        if enabled and tensorboard:
            self._events = _open_events(folder / "tensorboard", first_step, say)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for file in (self._file, self._events):
            if file is not None:
                file.close()
        if self._events is not None and self._events.missing:
            self._say(f"tensorboard/ lacks the last {self._events.missing} steps")
        if kind is None and self._file is not None and self._file.missing:
            raise Finding(
                f"metrics.jsonl lacks {self._file.missing} records: {self._file.refused}\n"
                "fix: make room on that disk; the same command continues from the last checkpoint"
            )

    def write(self, record: Record) -> None:
        """Append the record of one step, numbered by its key `step`."""
        if self._file is not None:
            self._file.write(json.dumps(record).encode() + b"\n")
        if self._events is not None:
            now, step = time.time(), int(record["step"] or 0)
            self._events.write(
                b"".join(
                    _event(Event(wall_time=now, step=step, summary=scalar(name, value)))
                    for name, value in record.items()
                    if name != "step" and value is not None
                )
            )


def read_metrics(path: Path) -> list[Record]:
    """Read the records of a `metrics.jsonl`; lines that are none are left out.

    Raises:
        OSError: it cannot be read.
    """
    if not path.is_file():
        return []
    return [record for _, record in _lines(path) if record is not None]


def _lines(path: Path) -> Iterator[tuple[bytes, Record | None]]:
    """Yield every line and the record in it; None where it is torn, or something else.

    What has no line breaks, such as the zeros that a crash of the machine leaves, comes in pieces.
    """
    with path.open("rb") as file:
        while line := file.readline(_LONGEST_LINE):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            is_record = isinstance(record, dict) and type(record.get("step")) is int
            yield line, record if is_record else None


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


def _open_events(folder: Path, first_step: int, say: Callable[[str], object]) -> AppendedFile:
    """Start a file of TensorBoard's events; a reader drops earlier events from a step on.

    Raises:
        UserError: the folder cannot be made.
        OSError: the file cannot be made.
    """
    try:
        folder.mkdir(exist_ok=True)
    except FileExistsError as error:
        raise UserError(
            f"{folder} is no folder, and TensorBoard's files go there\n"
            "fix: move it away, or enable_tensorboard=false"
        ) from error
    now = time.time()
    name = f"events.out.tfevents.{int(now)}.{socket.gethostname()}.{os.getpid()}"
    events = AppendedFile(folder / name, say)
    log = SessionLog(status=SessionLog.START)
    events.write(
        _event(Event(wall_time=now, file_version="brain.Event:2"))
        + _event(Event(wall_time=now, step=first_step, session_log=log))
    )
    return events


def _event(event: Event) -> bytes:
    """Frame an event as TFRecord does: length, its checksum, content, its checksum."""
    content = event.SerializeToString()
    length = struct.pack("<Q", len(content))
    return (
        length
        + struct.pack("<I", masked_crc32c(length))
        + content
        + struct.pack("<I", masked_crc32c(content))
    )
