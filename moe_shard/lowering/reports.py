"""Report which collectives a step runs, as a table and as JSON."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from moe_shard.lowering.collectives import Collective, Extraction, extract_collectives
from moe_shard.lowering.remat_warnings import count_lines, summarize
from moe_shard.lowering.verdicts import judge
from moe_shard.units import human_bytes

_VERDICT_STYLES = {
    "expert-parallel": "bold green",
    "weight-gathered": "bold red",
    "mixed": "bold yellow",
    "no-expert-parallelism": "bold",
    "unknown": "bold magenta",
}

_TEXT_WIDTH = 120

# Text that only one backend leaves in optimized HLO.
_TPU = re.compile(r"\d:T\(\d|\{:T\(\d")
_GPU = re.compile(r'__gpu\$|__cublas|__cudnn|__triton|"gpu_backend_config"|"operation_queue_id"')
_CPU = re.compile(r'__ynn|__onednn\$|"outer_dimension_partitions"|"known_init_step"|xla_cpu')


@dataclass(frozen=True)
class LoweringReport:
    """Describe what a compiled step does between devices.

    Attributes:
        backend: "cpu", "tpu", "gpu" or "unknown".
        num_devices: devices that run the program.
        mesh: {axis: size} in device order; axis_0, axis_1, ... where no names are known.
        verdict: one of `verdict_names.VERDICTS`; None for a step that was not compiled.
        collectives: the collectives, in the order of the program text.
        totals: {kind: {"count", "bytes"}} per step, bytes being output bytes per device.
        memory: bytes per device as of `memory_from_compiled`, or None.
        warnings: what is unknown or not counted, one sentence each.
        rematerializations: how often the partitioner replicated a tensor to re-shard it.
        extraction: what the table was read from; None for a step that was not compiled.
        reasons: the reasons for the verdict, a line each.
    """

    backend: str
    num_devices: int
    mesh: dict[str, int]
    verdict: str | None
    collectives: tuple[Collective, ...]
    totals: dict[str, dict[str, int]]
    memory: dict[str, int] | None
    warnings: tuple[str, ...]
    rematerializations: int = 0
    extraction: Extraction | None = field(default=None, repr=False, compare=False)
    reasons: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the object of `lowering.json` and `moe-shard report --json`."""
        return {
            "backend": self.backend,
            "num_devices": self.num_devices,
            "mesh": self.mesh,
            "verdict": self.verdict,
            "collectives": [each.to_json() for each in self.collectives],
            "totals": self.totals,
            "memory": self.memory,
        }

    def __str__(self) -> str:
        """Return the table, the verdict, the memory and the warnings as plain text."""
        page = StringIO()
        self.render_table(Console(file=page, width=_TEXT_WIDTH, color_system=None))
        return "\n".join(line.rstrip() for line in page.getvalue().splitlines())

    def __rich__(self) -> Group:
        """Return what `rich.print` and notebooks show."""
        return Group(self._table(), *self._lines())

    def render_table(self, console: Console) -> None:
        """Print the table, the verdict, the memory and the warnings."""
        console.print(self._table())
        for line in self._lines():  # a terminal wraps them; a pipe gets each whole
            console.print(line, soft_wrap=True)

    def _lines(self) -> list[Text]:
        """List what is printed under the table, with rich's markup rendered."""
        lines = []
        if self.verdict is not None:
            style = _VERDICT_STYLES[self.verdict]
            lines.append(f"verdict: [{style}]{self.verdict}[/] (as compiled for {self.backend})")
            lines += [f"  {escape(reason)}" for reason in self.reasons]
        if self.memory is not None:
            sizes = (
                f"{key.removesuffix('_bytes')} {human_bytes(n)}" for key, n in self.memory.items()
            )
            lines.append(f"memory per device: {', '.join(sizes)}")
        lines += [f"[yellow]warning:[/] {escape(warning)}" for warning in self.warnings]
        return [Text.from_markup(line) for line in lines]

    def _table(self) -> Table:
        mesh = ", ".join(f"{axis} {size}" for axis, size in self.mesh.items() if size > 1)
        title = f"collectives per step, {self.num_devices} devices ({self.backend})"
        table = Table(title=f"{title}: {escape(mesh)}" if mesh else title, box=box.SIMPLE_HEAD)
        for name in ("collective", "axis", "stage", "pass"):
            table.add_column(name, no_wrap=name != "axis")
        for name in ("count", "bytes each", "bytes"):
            table.add_column(name, justify="right", no_wrap=True)
        for (kind, axes, scope, pass_, size), times in _aggregate(self.collectives).items():
            table.add_row(
                kind,
                escape(axes),
                scope,
                pass_,
                str(times),
                human_bytes(size),
                human_bytes(times * size),
            )
        table.add_section()
        count = sum(each["count"] for each in self.totals.values())
        total = sum(each["bytes"] for each in self.totals.values())
        table.add_row("total", "", "", "", str(count), "", human_bytes(total), style="bold")
        return table


def _aggregate(collectives: Sequence[Collective]) -> Counter[tuple[str, str, str, str, int]]:
    rows = Counter[tuple[str, str, str, str, int]]()
    for each in collectives:
        axes = ", ".join(each.axes) or f"groups of {each.group_size}"
        rows[each.label, axes, each.scope, each.pass_, each.bytes] += each.count
    return rows


def report_from_text(
    text: str,
    *,
    mesh: Mapping[str, int] | None = None,
    expert_axes: Sequence[str] | None = None,
    before: str | None = None,
    stages: Mapping[str, str] | None = None,
    memory: dict[str, int] | None = None,
    backend: str | None = None,
    partitioner_log: Sequence[str] = (),
    count_further_rounds: bool = False,
) -> LoweringReport:
    """Report on HLO text after optimization.

    Args:
        text: `Compiled.as_text()` or the `*after_optimizations.txt` of an XLA dump.
        mesh: {axis: size} in the order in which the devices are laid out; without it, that which
            the text names.
        expert_axes: the mesh axes of the experts; without them, the axis called "expert", or, where
            there is none, those over which the experts' weights are split.
        before: the text of the module before optimization, which names the mesh.
        stages: {a word in a scope: the stage it stands for}, in addition to the known ones.
        memory: bytes per device, see `memory_from_compiled`.
        backend: "cpu", "tpu" or "gpu"; guessed from the text when None.
        partitioner_log: lines with `remat_warnings.MARK` that the compiler wrote meanwhile.
        count_further_rounds: see `extract_collectives`.

    Raises:
        UserError: when the text is not one complete HLO module, or the mesh is not of its size.
    """
    extraction = extract_collectives(
        text,
        mesh,
        expert_axes=expert_axes,
        before=before,
        stages=stages,
        count_further_rounds=count_further_rounds,
    )
    verdict = judge(extraction)
    totals: dict[str, dict[str, int]] = {}
    for each in extraction.collectives:
        total = totals.setdefault(each.kind, {"count": 0, "bytes": 0})
        total["count"] += each.count
        total["bytes"] += each.count * each.bytes
    return LoweringReport(
        backend=backend or guess_backend(text),
        num_devices=extraction.module.num_devices,
        mesh=extraction.mesh.sizes,
        verdict=verdict.name,
        collectives=extraction.collectives,
        totals=totals,
        memory=memory,
        warnings=(
            *extraction.warnings,
            *summarize(partitioner_log, extraction.module),
            *_unnamed(extraction),
        ),
        rematerializations=count_lines(partitioner_log),
        extraction=extraction,
        reasons=verdict.reasons,
    )


def _unnamed(extraction: Extraction) -> list[str]:
    """Warn about a mesh whose axes have no names."""
    if extraction.mesh.origin != "unnamed" or not extraction.collectives:
        return []
    names = ",".join(f"{axis}={size}" for axis, size in extraction.mesh.sizes.items())
    return [f"the text does not name its mesh: it is shown as {names}; name it with --mesh"]


def guess_backend(text: str) -> str:
    """Return the backend that optimized this HLO: "tpu", "gpu", "cpu", or "unknown"."""
    for backend, marks in (("tpu", _TPU), ("gpu", _GPU), ("cpu", _CPU)):
        if marks.search(text):
            return backend
    return "unknown"
