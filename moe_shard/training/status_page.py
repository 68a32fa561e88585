"""Render how a run is doing as one HTML page, with its curves as SVG.

Like the lowering page it needs no network and runs no script; its content policy forbids both.
"""

from __future__ import annotations

import html
import importlib.resources
from collections.abc import Iterable, Iterator, Sequence

from moe_shard.training.concerns import concerns
from moe_shard.training.goodput import STEPS, Goodput
from moe_shard.training.layer_history import BY_LAYER, LayerRecord, finite
from moe_shard.training.metrics import Record
from moe_shard.training.run_status import RunStatus
from moe_shard.training.status_charts import CHART_STYLE, Points, curve, heat_map, lines
from moe_shard.training.status_lines import norm_rows, status_lines
from moe_shard.units import human_time_left

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_LOW_IS_BAD = frozenset({"expert_load_min_over_mean", "expert_load_entropy"})
_FEW_LAYERS = 12
_STYLE = """
summary { margin: 18px 0 6px; color: var(--soft); cursor: pointer; }
main h2 { margin-top: 34px; }
.bar.steps { background: var(--all-to-all); }
.bar.compile { background: var(--permute); }
.bar.down, .bar.repeated { background: var(--all-gather); }
.bar.save, .bar.restore, .bar.init, .bar.evaluate { background: var(--reduce); }
.bar.data { background: var(--middling); }
.bar.other { background: var(--rest); }
table.numbers { width: auto; }
table.numbers td, table.numbers th { text-align: right; padding-left: 14px; }
table.numbers :first-child { text-align: left; padding-left: 0; }
"""


def render_status(status: RunStatus) -> str:
    """Return the text of the page."""
    css = importlib.resources.files("moe_shard.lowering").joinpath("page.css")
    warnings = "\n".join(f'<p class="warning">{html.escape(line)}</p>' for line in concerns(status))
    said = "\n".join(f"<p>{html.escape(line)}</p>" for line in status_lines(status))
    time = f"<h3>Where the time went</h3>{_time(status.goodput)}" if status.goodput else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(status.name)}</title>
<style>
{css.read_text(encoding="utf-8")}{CHART_STYLE}{_STYLE}</style>
</head>
<body>
<header>
<h1>{html.escape(status.name)}</h1>
{warnings}
{said}
</header>
<main>
{time}
{_charts(_curves(status)) or "<p>no step has been recorded yet</p>"}
{_experts(status.layers)}
{_kinds(status.layers)}
</main>
</body>
</html>
"""


def _curves(status: RunStatus) -> Iterator[tuple[str, str]]:
    """Yield the title and the drawing of each curve."""
    for name, points in status.curves().items():
        yield name, curve(points)
    for key, name in (("loss", "held-out loss"), ("bits_per_byte", "held-out bits per byte")):
        series = _by_dataset(status.evaluations, key)
        if series:
            yield name, lines(series)
    memory = {
        words: [(each.step, size / 1e9) for each in status.layers if (size := each.memory.get(key))]
        for key, words in (("in_use_bytes", "in use"), ("peak_bytes", "peak"))
    }
    if any(memory.values()):
        of = status.layers[-1].memory_of
        yield f"memory of {'a device' if of == 'device' else 'the host'}, GB", lines(memory)


def _by_dataset(evaluations: Sequence[Record], key: str) -> dict[str, Points]:
    series: dict[str, list[tuple[int, float]]] = {}
    for each in evaluations:
        if (value := finite(each.get(key))) is not None:
            series.setdefault(str(each.get("dataset")), []).append((int(each["step"] or 0), value))
    return {name: sorted(points) for name, points in series.items()}


def _experts(records: Sequence[LayerRecord]) -> str:
    """Draw the numbers of each MoE layer over the steps, and list those of the last record."""
    last = records[-1] if records else None
    if last is None or not last.by_layer:
        return ""
    maps = _charts(
        (BY_LAYER[name], heat_map(records, name, low_is_bad=name in _LOW_IS_BAD))
        for name in last.by_layer
    )
    names = {
        "expert_load_max_over_mean": "busiest", "expert_load_min_over_mean": "least busy",
        "expert_load_entropy": "evenness", "dropped_token_fraction": "dropped",
        "router_z": "router z", "router_bias_norm": "bias norm",
    }  # fmt: skip
    head = ("layer", *(names[name] for name in last.by_layer))
    rows = [
        (str(layer), *("-" if x is None else f"{x:.4g}" for x in values))
        for layer, *values in zip(last.layers, *last.by_layer.values(), strict=True)
    ]
    table = _table([head, *rows])
    # Of many layers the maps show the worst, and the numbers are a click away.
    shown = " open" if len(last.layers) <= _FEW_LAYERS else ""
    return (
        f"<h2>Experts, by layer</h2>{maps}<details{shown}><summary>each layer at step {last.step}"
        f"</summary>{table}</details>"
    )


def _kinds(records: Sequence[LayerRecord]) -> str:
    """Draw the norms of each kind of parameter, and list those of the last record."""
    rows = norm_rows(records[-1]) if records else []
    if not rows:
        return ""
    kinds = [row[0] for row in rows[1:]]

    def of(name: str, over: str | None = None) -> dict[str, Points]:
        return {
            kind: [
                (each.step, each.norms[name][kind] / (each.norms[over][kind] if over else 1.0))
                for each in records
                if each.norms[name].get(kind) is not None
                and (not over or each.norms[over].get(kind))
            ]
            for kind in kinds
        }

    charts = _charts(
        (
            ("gradient norm", lines(of("grad_norm"), logarithmic=True)),
            ("update over parameters", lines(of("update_norm", "param_norm"), logarithmic=True)),
            ("parameter norm", lines(of("param_norm"), logarithmic=True)),
        )
    )
    return f"<h2>Parameters, by kind</h2>{charts}<h3>At step {records[-1].step}</h3>{_table(rows)}"


def _charts(drawings: Iterable[tuple[str, str]]) -> str:
    sections = "\n".join(
        f"<section><h3>{html.escape(name)}</h3>{drawing}</section>"
        for name, drawing in drawings
        if drawing
    )
    return f'<div class="charts">\n{sections}\n</div>' if sections else ""


def _table(rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

    body = "".join(line(cells, "td") for cells in rows[1:])
    return f'<div class="scroll"><table class="numbers">{line(rows[0], "th")}{body}</table></div>'


def _time(spent: Goodput) -> str:
    bars = "".join(
        f'<span class="bar {part}" style="width:{100 * seconds / spent.total_s:.3f}%" '
        f'title="{part} {human_time_left(seconds)}"></span>'
        for part, seconds in spent.seconds.items()
    )
    legend = "".join(
        f'<li><span class="bar {part}"></span>{part}{" (kept)" if part == STEPS else ""} '
        f"{100 * seconds / spent.total_s:.1f}%</li>"
        for part, seconds in spent.seconds.items()
    )
    return f'<div class="track">{bars}</div><ul class="legend">{legend}</ul>'
