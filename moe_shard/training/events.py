"""Write numbers to a file of TensorBoard's events.

TensorBoard's own writer is not used: on a full disk its thread would die, and the run wait for it.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from moe_shard.errors import UserError
from moe_shard.training.appended import AppendedFile


class Events:
    """Append numbers to a file of events of this process; those of earlier ones stay beside it.

    A reader drops the events of earlier files from `first_step` on.

    Args:
        folder: folder of the files; it is made.
        first_step: first step of this process.
        say: receives a line on what cannot be written.

    Raises:
        UserError: the folder cannot be made.
        OSError: the file cannot be made.
    """

    def __init__(self, folder: Path, first_step: int, say: Callable[[str], object]) -> None:
        try:
            folder.mkdir(exist_ok=True)
        except FileExistsError as error:
            raise UserError(
                f"{folder} is no folder, and TensorBoard's files go there\n"
                "fix: move it away, or enable_tensorboard=false"
            ) from error
        self._say = say
        now = time.time()
        name = f"events.out.tfevents.{int(now)}.{socket.gethostname()}.{os.getpid()}"
        self._file = AppendedFile(folder / name, say)
        log = SessionLog(status=SessionLog.START)
        self._file.write(
            _framed(Event(wall_time=now, file_version="brain.Event:2"))
            + _framed(Event(wall_time=now, step=first_step, session_log=log))
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append the numbers of a step, by their tags."""
        # One event for all: a checksum in Python each would take longer than the rest.
        numbers = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._file.write(
            _framed(Event(wall_time=time.time(), step=step, summary=Summary(value=numbers)))
        )

    def close(self) -> None:
        """Write what is held, say what is lost, and close the file."""
        self._file.close()
        if self._file.missing:
            self._say(f"tensorboard/ lacks the last {self._file.missing} blocks of numbers")


def _framed(event: Event) -> bytes:
    """Frame an event as TFRecord does: length, its checksum, content, its checksum."""
    content = event.SerializeToString()
    length = struct.pack("<Q", len(content))
    return (
        length
        + struct.pack("<I", masked_crc32c(length))
        + content
        + struct.pack("<I", masked_crc32c(content))
    )
