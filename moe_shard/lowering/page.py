"""Render the lowering report as one HTML page, two programs side by side.

The page needs no network and runs no script; its content policy forbids both. All text from a
program is escaped: HLO of unknown origin may contain anything.
"""

from __future__ import annotations

import html
import importlib.resources
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moe_shard.lowering.collectives import Collective
from moe_shard.lowering.reports import LoweringReport
from moe_shard.lowering.walk import KINDS
from moe_shard.units import human_bytes

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_MEMORY = {"argument": "parameters and optimizer", "temp": "temporaries", "output": "new outputs"}


@dataclass(frozen=True)
class Panel:
    """Describe one program on the page.

    Attributes:
        title: a title, such as "flag on".
        report: the report on the program.
        lines: more about it, a sentence each (bounds, estimates).
        hbm_bytes: memory that a device has; None where it is not known.
        refusal: why there is no program, in the compiler's words.
    """

    title: str
    report: LoweringReport
    lines: Sequence[str] = ()
    hbm_bytes: int | None = None
    refusal: str | None = None


def render_page(title: str, panels: Sequence[Panel]) -> str:
    """Return the text of the page; the bars of all panels have one scale."""
    style = importlib.resources.files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    widest = max(
        (sum(sizes.values()) for each in panels for sizes in _stages(each).values()), default=0
    )
    most = max((each.hbm_bytes or _held(each) for each in panels), default=0)
    body = "\n".join(_panel(each, widest, most) for each in panels)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>{html.escape(title)}</h1>
<p class="soft">Collectives of one training step, output bytes per device, read from the compiled
program. Both sides have the same scale.</p>
</header>
<main class="panels">
{body}
</main>
</body>
</html>
"""


def _stages(panel: Panel) -> dict[tuple[str, str], dict[str, int]]:
    """Return {(stage, mesh axes): {kind: bytes per step}}, the most bytes first."""
    stages: dict[tuple[str, str], dict[str, int]] = {}
    for each in panel.report.collectives:
        sizes = stages.setdefault((each.scope, _axes(each)), {})
        sizes[each.kind] = sizes.get(each.kind, 0) + each.count * each.bytes
    return dict(sorted(stages.items(), key=lambda item: -sum(item[1].values())))


def _axes(each: Collective) -> str:
    return ", ".join(each.axes) or f"groups of {each.group_size}"


def _panel(panel: Panel, widest: int, most: int) -> str:
    parts = [f"<h2>{html.escape(panel.title)}</h2>", _verdict(panel)]
    if panel.refusal is not None:
        parts.append(f'<p class="warning">{html.escape(panel.refusal)}</p>')
    else:
        stages = _stages(panel)
        parts += ["<h3>Bytes by stage and mesh axis</h3>", *_bars(stages, widest), _legend(stages)]
        parts += ["<h3>Memory of a device</h3>", _memory(panel, most)]
    if panel.lines:
        parts.append("<h3>Compared with the lower bounds</h3>")
        parts += [f"<p>{html.escape(line)}</p>" for line in panel.lines]
    parts += [f'<p class="warning">{html.escape(line)}</p>' for line in panel.report.warnings]
    if panel.report.collectives:
        parts += ["<h3>All collectives and their source lines</h3>", _table(panel.report)]
    return '<section class="panel">\n' + "\n".join(parts) + "\n</section>"


def _verdict(panel: Panel) -> str:
    report = panel.report
    mesh = ", ".join(f"{axis} {size}" for axis, size in report.mesh.items() if size > 1)
    where = f"{report.num_devices} devices ({report.backend}){f': {mesh}' if mesh else ''}"
    verdict = report.verdict or ("not compiled" if panel.refusal else "no mesh, no verdict")
    return (
        f'<p class="verdict {html.escape(verdict.split(" ")[0])}">{html.escape(verdict)}</p>'
        f'<p class="soft">{html.escape(where)}</p>'
    )


def _bars(stages: dict[tuple[str, str], dict[str, int]], widest: int) -> Iterable[str]:
    if not stages:
        return ["<p>none</p>"]
    return [
        _row(scope, f"over {axes}", _segments(sizes, widest), sum(sizes.values()))
        for (scope, axes), sizes in stages.items()
    ]


def _segments(sizes: dict[str, int], whole: int) -> str:
    return "".join(
        f'<span class="bar {html.escape(kind)}" style="width:{100 * size / whole:.4f}%" '
        f'title="{html.escape(kind)} {human_bytes(size)}"></span>'
        for kind, size in sizes.items()
        if size
    )


def _row(name: str, detail: str, segments: str, size: int) -> str:
    return (
        f'<div class="row"><span class="name">{html.escape(name)}'
        f"<small>{html.escape(detail)}</small></span>"
        f'<span class="track">{segments}</span>'
        f'<span class="size">{human_bytes(size)}</span></div>'
    )


def _legend(stages: dict[tuple[str, str], dict[str, int]]) -> str:
    present = {kind for sizes in stages.values() for kind in sizes}
    items = [
        f'<li><span class="bar {kind}"></span>{kind}</li>' for kind in KINDS if kind in present
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


def _held(panel: Panel) -> int:
    memory = panel.report.memory or {}
    return sum(_parts(memory).values())


def _parts(memory: dict[str, int]) -> dict[str, int]:
    """Return what a device holds; outputs that reuse a donated argument are not counted again."""
    if not memory:
        return {}
    new = max(0, memory["output_bytes"] - memory["alias_bytes"])
    return {"argument": memory["argument_bytes"], "temp": memory["temp_bytes"], "output": new}


def _memory(panel: Panel, most: int) -> str:
    parts = _parts(panel.report.memory or {})
    if not parts:
        return "<p>not in the program's text</p>"
    whole = max(most, sum(parts.values()))
    has = f"of {human_bytes(panel.hbm_bytes)}" if panel.hbm_bytes else "total"
    listed = "; ".join(f"{_MEMORY[name]} {human_bytes(size)}" for name, size in parts.items())
    peak = (panel.report.memory or {}).get("peak_bytes")
    listed += f"; at most {human_bytes(peak)} live at once" if peak else ""
    legend = "".join(
        f'<li><span class="bar {name}"></span>{_MEMORY[name]}</li>'
        for name, size in parts.items()
        if size
    )
    return (
        _row("one device", has, _segments(parts, whole), sum(parts.values()))
        + f'<ul class="legend">{legend}</ul><p class="soft">{html.escape(listed)}</p>'
    )


def _table(report: LoweringReport) -> str:
    head = "".join(
        f'<th scope="col"{" class=number" if name in ("count", "each") else ""}>{name}</th>'
        for name in ("collective", "axis", "stage", "pass", "count", "each", "source")
    )
    rows = []
    for each in sorted(report.collectives, key=lambda one: -one.count * one.bytes):
        cells = (each.label, _axes(each), each.scope, each.pass_)
        rows.append(
            "<tr>"
            + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
            + f'<td class="number">{each.count}</td>'
            + f'<td class="number">{human_bytes(each.bytes)}</td><td>{_source(each)}</td></tr>'
        )
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="collectives"><table><thead><tr>'
        f"{head}</tr></thead><tbody>\n" + "\n".join(rows) + "\n</tbody></table></div>"
    )


def _source(each: Collective) -> str:
    """Show file and line, with the full path in the tooltip."""
    if each.source is None:
        return '<span class="soft">not known</span>'
    short = "/".join(each.source.split("/")[-2:])
    whole = html.escape(f"{each.source} {each.op_name}")
    return f'<code title="{whole}">{html.escape(short)}</code>'
