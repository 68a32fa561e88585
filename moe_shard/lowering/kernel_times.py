"""Show where the time of a step went, by stage of the model and pass, as a table and as JSON.

Nothing here is an estimate: the times are those of a profile, see `kernel_sums`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moe_shard.lowering.kernel_stages import OTHER, KernelStage
from moe_shard.units import human_count

PASSES = ("forward", "backward", "optimizer", "unknown")
_SHOWN = 8
"""Kernels that the table lists."""


@dataclass(frozen=True)
class StageTime:
    """Hold the time of one stage, in seconds of a step.

    Attributes:
        stage: one of `kernel_stages.STAGES`.
        by_pass: {pass: seconds}, the mean over devices.
        worst: seconds on the device where they are most.
    """

    stage: str
    by_pass: dict[str, float]
    worst: float

    @property
    def seconds(self) -> float:
        """Return the seconds of all passes, the mean over devices."""
        return sum(self.by_pass.values())


@dataclass(frozen=True)
class KernelTime:
    """Hold the time of one kernel, in seconds of a step, the mean over devices.

    Attributes:
        kernel: the instruction, or the profile's name of a kernel of none.
        seconds: its time.
        executions: how often a step runs it.
        known: what it is for; None where the program does not show it.
    """

    kernel: str
    seconds: float
    executions: float
    known: KernelStage | None


@dataclass(frozen=True)
class KernelTimes:
    """Say where the time of the profiled steps went; times are in seconds of one step.

    Attributes:
        devices: how many devices the profile has.
        steps: how many steps it has.
        step: time from the first kernel to the last, over the number of steps; mean over devices.
        worst_step: the same, of the slowest device.
        stages: a row for each stage that took time, in the order of `STAGES`.
        idle: time in which a device ran nothing; mean over devices.
        worst_idle: the most.
        overlapped: what the kernels' times add up to beyond the time in which any ran.
        other_programs: kernel time of other programs in the same window.
        unattributed: kernel time of what the program's text does not show.
        kernels: those that took most.
        on_cpu: whether the devices are simulated on a CPU.
    """

    devices: int
    steps: int
    step: float
    worst_step: float
    stages: tuple[StageTime, ...]
    idle: float
    worst_idle: float
    overlapped: float
    other_programs: float
    unattributed: float
    kernels: tuple[KernelTime, ...]
    on_cpu: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the object of `kernel_times.json`; times in seconds of one step."""
        return {
            "devices": self.devices,
            "steps": self.steps,
            "step_s": self.step,
            "worst_step_s": self.worst_step,
            "stages": [
                {
                    "stage": each.stage,
                    "seconds": each.seconds,
                    "share": self._share(each.seconds),
                    "worst_s": each.worst,
                    **{f"{name}_s": each.by_pass.get(name, 0.0) for name in PASSES},
                }
                for each in self.stages
            ],
            "idle_s": self.idle,
            "idle_share": self._share(self.idle),
            "worst_idle_s": self.worst_idle,
            "overlapped_s": self.overlapped,
            "other_programs_s": self.other_programs,
            "unattributed_s": self.unattributed,
            "unattributed_share": self._share(self.unattributed),
            "kernels": [
                {
                    "kernel": each.kernel,
                    "seconds": each.seconds,
                    "share": self._share(each.seconds),
                    "executions": each.executions,
                    "stage": each.known.stage if each.known else OTHER,
                    "pass": each.known.pass_ if each.known else "unknown",
                    "op_name": each.known.op_name if each.known else "",
                    "source": each.known.source if each.known else None,
                }
                for each in self.kernels
            ],
        }

    def render_table(self, console: Console) -> None:
        """Print the table, what it leaves out, and the kernels that took most."""
        console.print(self._table())
        for line in self._notes():
            console.print(line, soft_wrap=True, markup=False)
        console.print(self._largest())

    def _share(self, seconds: float) -> float:
        return seconds / self.step if self.step else 0.0

    def _table(self) -> Table:
        devices = human_count(self.devices, "device")
        title = f"kernel time of a step, mean of {devices} and {human_count(self.steps, 'step')}"
        table = Table(title=title, box=box.SIMPLE_HEAD)
        table.add_column("stage", no_wrap=True)
        for name in ("forward", "backward", "ms", "share", "worst device"):
            table.add_column(name, justify="right", no_wrap=True)
        for each in self.stages:
            passes = (each.by_pass.get(name, 0.0) for name in ("forward", "backward"))
            cells = [_ms(seconds) if seconds else "" for seconds in passes]
            table.add_row(each.stage, *cells, *self._cells(each.seconds, each.worst))
        table.add_section()
        table.add_row("idle", "", "", *self._cells(self.idle, self.worst_idle))
        if self._share(self.overlapped) >= 0.001:
            table.add_row("overlapped", "", "", *self._cells(-self.overlapped))
        table.add_row("step", "", "", *self._cells(self.step, self.worst_step), style="bold")
        return table

    def _cells(self, seconds: float, worst: float | None = None) -> list[str]:
        shown = "" if worst is None else _ms(worst)
        return [_ms(seconds), f"{100 * self._share(seconds):.1f}%", shown]

    def _notes(self) -> list[str]:
        notes: list[str] = []
        if self.unattributed:
            share = 100 * self._share(self.unattributed)
            notes.append(f"{share:.1f}% of the step is in kernels that its text does not name")
        if self.on_cpu:
            notes.append(
                "simulated devices share the CPU's cores: a kernel's time includes waiting for a"
                " core, and a collective's waiting for the other devices"
            )
        if self._share(self.other_programs) >= 0.001:
            shown = _ms(self.other_programs)
            notes.append(f"not counted: {shown} ms a step in kernels of other programs")
        return notes

    def _largest(self) -> Table:
        table = Table(title="the kernels that took most", box=box.SIMPLE_HEAD)
        for name in ("ms", "share", "runs"):
            table.add_column(name, justify="right", no_wrap=True)
        for name in ("stage", "pass", "kernel"):
            table.add_column(name, no_wrap=True)
        table.add_column("operation", overflow="fold")
        for each in self.kernels[:_SHOWN]:
            known = each.known
            table.add_row(
                *self._cells(each.seconds)[:2],
                f"{each.executions:.3g}",
                known.stage if known else OTHER,
                known.pass_ if known else "",
                escape(each.kernel[:40]),
                escape("/".join(known.op_name.split(";")[0].split("/")[-3:]) if known else ""),
            )
        return table


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.2f}"
