"""Choose which of a command's programs are shown, and check an expectation."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moe_shard.errors import UserError, first_line
from moe_shard.lowering.reports import LoweringReport, report_from_text
from moe_shard.lowering.sources import before_optimization, dumped_memory, read_text
from moe_shard.lowering.work import flops_by_scope

SMALLER = 100
"""A program with less than this fraction of the FLOPs of the largest so far is not shown."""

NO_EXPERTS = "no-expert-parallelism"
_NAME = re.compile(r"HloModule ([^\s,]+)")
_DEVICES = re.compile(r"\b(?:num_partitions|replica_count)=(\d+)")
# What jax calls an operation of a backward pass.
_BACKWARD = re.compile(r'op_name="[^"]*transpose\(')
# Kernels whose FLOPs may be unknown.
_KERNEL = re.compile(r'custom_call_target="(?:tpu_custom_call|mosaic|__gpu\$xla\.gpu\.triton)')


@dataclass(frozen=True)
class WatchedProgram:
    """Describe a compiled program.

    Attributes:
        name: name of the module, such as "jit_train_step".
        file: the file that XLA wrote.
        report: its collectives and verdict.
        flops: FLOPs of its products on one device, in one execution.
        trains: whether it has a backward pass.
    """

    name: str
    file: str
    report: LoweringReport
    flops: int
    trains: bool

    def to_json(self) -> dict[str, Any]:
        """Return the program's object in `moe-shard watch --json`."""
        return {
            "program": self.name,
            "file": self.file,
            "flops": self.flops,
            "trains": self.trains,
            **self.report.to_json(),
            "warnings": list(self.report.warnings),
        }


@dataclass
class Programs:
    """Collect the programs of one command as they are compiled.

    Attributes:
        mesh: {axis: size} as given, or None.
        expert_axes: the mesh axes of the experts, as given, or None.
        stages: {a word in a scope: the stage it stands for}, or None.
        everything: whether all of them are shown.
        shown: the programs that were shown.
        passed_over: number of programs that were not shown.
        repeated: number of programs with the text of an earlier one, from another process or
            compiled again.
        unread: {file: why it could not be read}.
    """

    mesh: Mapping[str, int] | None = None
    expert_axes: Sequence[str] | None = None
    stages: Mapping[str, str] | None = None
    everything: bool = False
    shown: list[WatchedProgram] = field(default_factory=list)
    passed_over: int = 0
    repeated: int = 0
    unread: dict[str, str] = field(default_factory=dict)
    _largest: int = 0
    _texts: set[bytes] = field(default_factory=set)

    def add(self, path: Path) -> WatchedProgram | None:
        """Read a program, and return it if it is to be shown.

        Args:
            path: a file of optimized HLO.

        Returns:
            The program if it is to be shown.
        """
        try:
            return self._add(path, read_text(path))
        except UserError as error:
            self.unread[path.name] = first_line(error, 300)
        except Exception as error:  # no failure may end the watched command
            self.unread[path.name] = f"{type(error).__name__}: {first_line(error, 300)}"
        return None

    def _add(self, path: Path, text: str) -> WatchedProgram | None:
        digest = hashlib.sha256(text.encode()).digest()
        if digest in self._texts:
            self.repeated += 1
            return None
        self._texts.add(digest)
        header = text.partition("\n")[0]
        devices = math.prod(int(each) for each in _DEVICES.findall(header))
        if devices == 1 and not self.everything:
            self.passed_over += 1
            return None
        report = self._report(path, text, devices)
        assert report.extraction is not None
        flops = sum(flops_by_scope(report.extraction.walk).values())
        self._largest = max(self._largest, flops)
        large = flops * SMALLER >= self._largest > 0 or _KERNEL.search(text) is not None
        if not large and not self.everything:
            self.passed_over += 1
            return None
        name = _NAME.match(header)
        program = WatchedProgram(
            name=name[1] if name else path.name,
            file=path.name,
            report=report,
            flops=flops,
            trains=_BACKWARD.search(text) is not None,
        )
        self.shown.append(program)
        return program

    def _report(self, path: Path, text: str, devices: int) -> LoweringReport:
        given = self.mesh and math.prod(self.mesh.values())
        fits = given is None or given == devices
        report = report_from_text(
            text,
            mesh=self.mesh if fits else None,
            expert_axes=self.expert_axes if fits else None,
            before=before_optimization(path),
            stages=self.stages,
            memory=dumped_memory(path),
        )
        if fits:
            return report
        # A command may also compile programs for some of its devices.
        note = f"--mesh has {given} devices and this program {devices}: --mesh is not used"
        return replace(report, warnings=(note, *report.warnings))


@dataclass(frozen=True)
class Expectation:
    """Expect a verdict of every program that is large enough to be shown.

    Attributes:
        verdict: one of `verdict_names.VERDICTS`.
    """

    verdict: str

    def is_broken_by(self, program: WatchedProgram) -> bool:
        """Return whether this one program shows that the expectation does not hold.

        A program without experts counts only if it trains: a command also compiles programs that
        initialize or evaluate.
        """
        found = program.report.verdict
        if found == NO_EXPERTS and not program.trains:
            return False
        return found != self.verdict

    def failure(self, programs: Sequence[WatchedProgram]) -> str | None:
        """Return why the expectation does not hold; None if it does.

        Args:
            programs: all that were shown.
        """
        broken = next((each for each in programs if self.is_broken_by(each)), None)
        if broken is not None:
            found = broken.report.verdict or "no verdict"
            return f"expected {self.verdict}, found {found} in {broken.name}"
        if any(each.report.verdict == self.verdict for each in programs):
            return None
        if programs:
            return f"expected {self.verdict}, found {NO_EXPERTS} in every program shown"
        return f"expected {self.verdict}, but no program over several devices was seen"
