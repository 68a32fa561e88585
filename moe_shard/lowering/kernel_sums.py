"""Sum up the kernels of a profile by stage of the model and pass of the step.

A device is idle where none of its kernels runs; where several run at once, their times add up to
more than the time that passed. Loops and calls count as what they run, so the time in which a loop
only turns is idle. The window is from the first kernel of the program to its last.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moe_shard.lowering.kernel_stages import OTHER, STAGES, KernelStages
from moe_shard.lowering.kernel_times import PASSES, KernelTime, KernelTimes, StageTime

_TOP = 20
"""Kernels that the record lists."""
_UNNAMED = re.compile(r"[^\w]")
_NCCL = re.compile(r"(?:nccl|rccl)\w*?_(AllGather|ReduceScatter|AllReduce|AllToAll)", re.I)
_KINDS = {
    "allgather": "all-gather",
    "reducescatter": "reduce-scatter",
    "allreduce": "all-reduce",
    "alltoall": "all-to-all",
}


@dataclass(frozen=True)
class KernelEvent:
    """Describe one execution of a kernel in a profile.

    Attributes:
        device: name of the device.
        line: name of the stream or thread; what one line runs nests.
        kernel: the profile's name of it.
        start: in nanoseconds.
        duration: in nanoseconds.
        instruction: the instruction of the program it was compiled from; "" where not known.
        program: the program's name; "" where not known.
    """

    device: str
    line: str
    kernel: str
    start: float
    duration: float
    instruction: str = ""
    program: str = ""

    @property
    def is_kernel(self) -> bool:
        """Return whether it is one kernel, never a loop: GPU streams run nothing else."""
        return self.line.startswith("Stream")

    @property
    def end(self) -> float:
        """Return when it ends, in nanoseconds."""
        return self.start + self.duration


def kernel_times(events: Iterable[KernelEvent], stages: KernelStages) -> KernelTimes | None:
    """Attribute the kernels of a profile to the stages of the program that they are of.

    Args:
        events: executions of kernels, of any number of devices, in any order.
        stages: the program.

    Returns:
        The times; None where no kernel is one of the program's.
    """
    by_device: dict[str, list[KernelEvent]] = defaultdict(list)
    for event in events:
        by_device[event.device].append(event)
    found = [each for each in map(_Device, by_device.values(), [stages] * len(by_device)) if each]
    if not found:
        return None
    mean = statistics.fmean
    rows = []
    for stage in STAGES:
        by_pass = {
            pass_: mean(device.seconds[stage, pass_] for device in found) for pass_ in PASSES
        }
        worst = max(sum(device.seconds[stage, each] for each in PASSES) for device in found)
        if worst:
            rows.append(StageTime(stage, by_pass, worst))
    kernels: dict[str, float] = defaultdict(float)
    runs: dict[str, float] = defaultdict(float)
    for device in found:
        for kernel, seconds in device.kernels.items():
            kernels[kernel] += seconds / len(found)
            runs[kernel] += device.runs[kernel] / len(found)
    return KernelTimes(
        devices=len(found),
        steps=max(device.steps for device in found),
        step=mean(device.step for device in found),
        worst_step=max(device.step for device in found),
        stages=tuple(rows),
        idle=mean(device.idle for device in found),
        worst_idle=max(device.idle for device in found),
        overlapped=mean(device.overlapped for device in found),
        other_programs=mean(device.other_programs for device in found),
        unattributed=mean(device.unattributed for device in found),
        kernels=tuple(
            KernelTime(kernel, seconds, runs[kernel], stages.of(kernel))
            for kernel, seconds in sorted(kernels.items(), key=lambda item: -item[1])[:_TOP]
        ),
        on_cpu=any(device.startswith("CPU") for device in by_device),
    )


class _Device:
    """Sum up one device, in seconds of one step; false where it ran nothing of the program."""

    def __init__(self, events: Sequence[KernelEvent], stages: KernelStages) -> None:
        self._stages = stages
        self._spelled = {_UNNAMED.sub("_", name): name for name in stages.names}
        for kernel, name in stages.pallas_kernels.items():
            self._spelled.setdefault(kernel, name)
        named = [(event, self._instruction(event)) for event in events]
        own = [
            (event, name)
            for event, name in named
            if event.program in ("", stages.program)
            and (event.is_kernel or not self._runs_others(name))
        ]
        of_program = [event for event, name in own if stages.of(name) is not None]
        self.steps = self._count_steps(name for _, name in own)
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)
        self.kernels: dict[str, float] = defaultdict(float)
        self.runs: dict[str, float] = defaultdict(float)
        self.unattributed = self.other_programs = 0.0
        if not of_program:
            return
        start = min(event.start for event in of_program)
        end = max(event.end for event in of_program)
        scale = 1e-9 / self.steps
        self.step = (end - start) * scale
        within = [each for each in own if start <= each[0].start < end]
        for event, name, duration in _own_times(within):
            seconds = duration * scale
            stage, pass_ = self._stage(event, name)
            self.seconds[stage, pass_] += seconds
            shown = event.kernel if not name or self._runs_others(name) else name
            self.kernels[shown] += seconds
            self.runs[shown] += 1 / self.steps
            if stage == OTHER and (stages.of(name) is None or self._runs_others(name)):
                self.unattributed += seconds
        busy = _union(event for event, _ in within) * scale
        others = [
            event
            for event in events
            if event.program not in ("", stages.program) and start <= event.start < end
        ]
        self.other_programs = _union(others) * scale
        self.idle = max(self.step - _union([e for e, _ in within] + others) * scale, 0.0)
        self.overlapped = sum(self.seconds.values()) - busy

    def __bool__(self) -> bool:
        return bool(self.seconds)

    def _instruction(self, event: KernelEvent) -> str:
        """Return the instruction of an event: as the profile says, or by the kernel's name.

        The kernels of a CUDA graph are all of the instruction that launches it.
        """
        said = event.instruction
        if self._stages.of(said) is not None and not self._runs_others(said):
            return said
        # XLA names a GPU kernel after its instruction, with underscores.
        return self._spelled.get(_UNNAMED.sub("_", event.kernel), said)

    def _runs_others(self, name: str) -> bool:
        known = self._stages.of(name)
        return known is not None and known.runs_others

    def _stage(self, event: KernelEvent, name: str) -> tuple[str, str]:
        known = self._stages.of(name)
        if known is not None and not known.runs_others:
            return known.stage, known.pass_
        library = _NCCL.search(event.kernel)
        return (_KINDS[library[1].lower()] if library else OTHER), "unknown"

    def _count_steps(self, names: Iterable[str]) -> int:
        """Count the steps by the instructions that each executes once."""
        counts = Counter(name for name in names if name in self._stages.once)
        return Counter(counts.values()).most_common(1)[0][0] if counts else 1


def _own_times(
    events: Iterable[tuple[KernelEvent, str]],
) -> list[tuple[KernelEvent, str, float]]:
    """Return every event's time without that of the events inside it, on its line."""
    found: list[tuple[KernelEvent, str, float]] = []
    lines: dict[str, list[tuple[KernelEvent, str]]] = defaultdict(list)
    for event, name in events:
        lines[event.line].append((event, name))
    for line in lines.values():
        line.sort(key=lambda each: (each[0].start, -each[0].duration))
        open_: list[int] = []
        for event, name in line:
            while open_ and found[open_[-1]][0].end <= event.start:
                open_.pop()
            if open_ and event.end <= found[open_[-1]][0].end:
                outer, outer_name, own = found[open_[-1]]
                found[open_[-1]] = (outer, outer_name, own - event.duration)
            open_.append(len(found))
            found.append((event, name, event.duration))
    return found


def _union(events: Iterable[KernelEvent]) -> float:
    """Return the nanoseconds in which at least one event runs."""
    covered, until = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: event.start):
        if event.end > until:
            covered += event.end - max(event.start, until)
            until = event.end
    return covered
