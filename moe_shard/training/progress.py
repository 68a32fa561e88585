"""Show the progress of a run; plain lines come rarely, but always of the first and last step."""

from __future__ import annotations

import math
import time

from rich.console import Console
from rich.progress import MofNCompleteColumn, TextColumn

from moe_shard.terminal import PLAIN_SECONDS, live_line
from moe_shard.training.metrics import Record
from moe_shard.units import human_time_left


class ProgressLine:
    """Show step, loss, speed and the time left.

    Args:
        console: where to print.
        first_step: first step of this process.
        steps: steps of the whole run.
        log_period: steps between two updates of the line.
        bytes_per_token: bytes of text per token, for the loss in bits per byte; 0 for no text.
    """

    def __init__(
        self,
        console: Console,
        *,
        first_step: int,
        steps: int,
        log_period: int,
        bytes_per_token: float,
    ) -> None:
        self._console = console
        self._first, self._steps, self._period = first_step, steps, log_period
        self._bytes_per_token = bytes_per_token
        self._started = time.monotonic()
        self._last_line = -math.inf
        text = TextColumn("{task.description}")
        self._live = live_line(console, "step", MofNCompleteColumn(), text, transient=False)
        self._task = self._live.add_task("compiled", total=steps, completed=first_step)

    def __enter__(self) -> ProgressLine:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, record: Record) -> None:
        """Show the record of a finished step."""
        done = int(record["step"] or 0) + 1
        last = done == self._steps
        if done % self._period and not last and done > self._first + 1:
            return
        text = self._describe(record)
        self._live.update(self._task, completed=done, description=text)
        if self._console.is_terminal:
            return
        now = time.monotonic()
        if last or now - self._last_line >= PLAIN_SECONDS:
            self._last_line = now
            left = (now - self._started) / (done - self._first) * (self._steps - done)
            self._console.print(f"step {done}/{self._steps}  {text}  left {human_time_left(left)}")

    def _describe(self, record: Record) -> str:
        if record.get("skipped"):
            return "skipped"
        ce_loss = float(record["ce_loss"] or 0.0)
        parts = [f"loss {record['loss']:.3f}"]
        if self._bytes_per_token:
            parts.append(f"bits/byte {ce_loss / math.log(2) / self._bytes_per_token:.2f}")
        parts.append(f"grad norm {record['grad_norm']:.2f}")
        parts.append(f"dropped {100 * float(record['dropped_token_fraction'] or 0):.1f}%")
        parts.append(f"{record['tokens_per_sec_per_device']:,.0f} tok/s/device")
        if record["mfu"] is not None:
            parts.append(f"MFU {100 * record['mfu']:.1f}%")
        return "  ".join(parts)
