"""Print an explanation for people, 100 columns wide."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from moe_shard.sharding.explain.collisions import Collision
from moe_shard.sharding.explain.explanation import Explanation
from moe_shard.sharding.explain.lint import SEVERITIES, Lint, count_levels
from moe_shard.sharding.explain.placed import PlacedArray
from moe_shard.sharding.rules import Decision
from moe_shard.units import human_bytes, human_count

_STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}
_NAME_WIDTH = 28


def print_explanation(explanation: Explanation, console: Console) -> None:
    """Print header, parameters, activations, conflicts and rule lint."""
    for line in _header(explanation):
        console.print(line)
    for title, arrays in (
        ("parameters", explanation.parameters),
        ("activations", explanation.activations),
    ):
        console.print(_table(title, arrays))
    _print_conflicts(explanation.conflicts, console)
    _print_lint(explanation.lint, console)


def _header(explanation: Explanation) -> Iterator[str]:
    sizes = [f"{axis} {size}" for axis, size in explanation.sizes.items() if size > 1]
    devices = math.prod(explanation.sizes.values())
    yield (
        f"[bold]{escape(explanation.model)}[/] by {escape(explanation.table)} on {devices:,} "
        f"devices: {escape(', '.join(sizes)) or 'no axis is split'}"
    )
    yield (
        f"expert axis (the rule of {explanation.expert_rule}): "
        f"{escape(', '.join(explanation.expert_axes)) or 'none'}"
    )
    here = sum(array.bytes_per_device for array in explanation.parameters)
    all_bytes = sum(array.bytes for array in explanation.parameters)
    state = explanation.state_bytes
    yield (
        f"parameters: {human_bytes(all_bytes)}, {human_bytes(here)} a device"
        + (f"; with the optimizer's state {human_bytes(state)} a device" if state else "")
    )
    for note in explanation.notes:
        yield f"[yellow]note:[/] {escape(note)}"


def _table(title: str, arrays: Sequence[PlacedArray]) -> Table:
    table = Table(
        title=f"{title}: one device's shard, and the rule behind each dim",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    # 96 columns with the gaps: rich would crop the last column before narrowing the others.
    table.add_column("array", width=_NAME_WIDTH, overflow="fold")
    table.add_column("dim", width=23, overflow="fold")
    table.add_column("size", justify="right", width=10, overflow="fold")
    table.add_column("rule", justify="right", width=6)
    table.add_column("mesh axes; rules that lost", width=25, overflow="fold")
    for array in arrays:
        left = [f"[bold]{escape(array.array.name)}[/]", *_shard(array)]
        right = [
            _dim(array, decision, shard)
            for decision, shard in zip(array.resolution.decisions, array.shard_shape, strict=True)
        ]
        for number in range(max(len(left), len(right))):
            name = left[number] if number < len(left) else ""
            table.add_row(name, *(right[number] if number < len(right) else ("",) * 4))
    return table


def _shard(array: PlacedArray) -> list[str]:
    """Write dtype, shape and bytes of one device's shard, on one line if they fit."""
    shape = f"  {array.dtype_name}[{','.join(map(str, array.shard_shape))}]"
    size = human_bytes(array.bytes_per_device)
    return [shape + f" {size}"] if len(shape) + len(size) < _NAME_WIDTH else [shape, f"  {size}"]


def _dim(array: PlacedArray, decision: Decision, shard: int) -> tuple[str, str, str, str]:
    if decision.logical_axis is None:
        return "[dim]-[/]", str(decision.size), "", ""
    size = str(decision.size) if shard == decision.size else f"{decision.size}/{shard}"
    won = array.won(decision)
    text = [escape(", ".join(decision.mesh_axes))] if decision.mesh_axes else []
    for loss in decision.lost:
        axes = ", ".join(loss.taken)
        why = f"lost {axes} to {loss.held_by}" if loss.held_by else f"does not divide {loss.size}"
        text.append(f"[yellow]rule {loss.rule.number} {escape(why)}[/]")
    if decision.is_conflict:
        number = "[bold red]none[/]"
    else:
        number = str(won.number) if won else "[red]no rule[/]"
    return escape(decision.logical_axis), size, number, "; ".join(text)


def _print_conflicts(conflicts: Sequence[Collision], console: Console) -> None:
    style = "bold red" if any(not each.only_if for each in conflicts) else "bold"
    console.print(f"[{style}]conflicts: {len(conflicts) or 'none'}[/]")
    for each in conflicts:
        condition = f" (only with {each.only_if})" if each.only_if else ""
        arrays = ", ".join(each.arrays)
        console.print(f"  '{escape(each.dim)}' of {escape(arrays)} stays unsharded{condition}")
        for name, text in (
            ("cause", each.cause),
            ("means", each.consequence),
            (
                "costs",
                f"{human_bytes(each.bytes_per_device)} a device in "
                f"{human_count(len(each.arrays), 'array')} where "
                f"{human_bytes(each.bytes_if_won)} would do; Flax drops it silently",
            ),
            ("fix", each.fix),
        ):
            console.print(Padding(f"{name}: {escape(text)}", (0, 0, 0, 4)))


def _print_lint(lint: Sequence[Lint], console: Console) -> None:
    counts = count_levels(lint)
    found = ", ".join(human_count(n, level) for level, n in counts.items() if n)
    console.print(f"[bold]rule lint: {found or 'no findings'}[/]")
    for each in sorted(lint, key=lambda each: SEVERITIES.index(each.level)):
        text = f"[{_STYLES[each.level]}]{each.level}[/] {escape(each.text)}"
        console.print(Padding(text, (0, 0, 0, 2)))
