"""Say how a run is doing in lines of text."""

from __future__ import annotations

from collections.abc import Iterator

from moe_shard.training.layer_history import LayerRecord, finite
from moe_shard.training.run_status import RunStatus
from moe_shard.units import human_bytes, human_time_left


def status_lines(status: RunStatus) -> Iterator[str]:
    """Say in a line each how far the run is, how well it learns, and what is kept."""
    of = "" if status.steps is None else f" of {status.steps}"
    state = "running" if status.running else "not running on this machine"
    left = "" if status.left_s is None else f", {human_time_left(status.left_s)} left at this pace"
    age = "" if status.age_s is None else f", last written {human_time_left(status.age_s)} ago"
    yield f"{state}: step {status.updates}{of}{left}{age}"
    if status.verdict:
        yield f"its step is {status.verdict}"
    if status.goodput:
        yield status.goodput.line()
    yield from _evaluation_lines(status)
    if status.checkpoints:
        kept = ", ".join(map(str, status.checkpoints[-5:]))
        sizes = (("the newest", status.newest_bytes), ("free on its disk", status.disk_free_bytes))
        room = ", ".join(f"{what} {human_bytes(size)}" for what, size in sizes if size is not None)
        more = "..., " if len(status.checkpoints) > 5 else ""
        yield f"checkpoints after steps {more}{kept} ({room})"
    if status.layers:
        yield from _layer_lines(status.layers[-1])


def _evaluation_lines(status: RunStatus) -> Iterator[str]:
    for dataset, last in status.last_evaluations().items():
        loss, bits = finite(last.get("loss")), finite(last.get("bits_per_byte"))
        known = [
            (value, int(each["step"] or 0))
            for each in status.evaluations
            if str(each.get("dataset")) == dataset
            and (value := finite(each.get("loss"))) is not None
        ]
        if loss is None or not known:
            yield f"held-out loss of {dataset} after step {last['step']}: not finite"
            continue
        best, at = min(known)
        per_byte = "" if bits is None else f" ({bits:.4g} bits/byte)"
        lowest = "the lowest" if at == last["step"] else f"lowest {best:.4g} after step {at}"
        after = f"held-out loss of {dataset} after step {last['step']}"
        yield f"{after}: {loss:.4g}{per_byte}, {lowest}"


def _layer_lines(last: LayerRecord) -> Iterator[str]:
    parts = []
    for name, words, lowest, form in (
        ("expert_load_max_over_mean", "busiest expert {} x the mean", False, ".3g"),
        ("expert_load_min_over_mean", "least busy {} x", True, ".2g"),
        ("expert_load_entropy", "evenness {}", True, ".3g"),
        ("dropped_token_fraction", "dropped {}", False, ".1%"),
        ("router_z", "router z {}", False, ".3g"),
        ("router_bias_norm", "bias norm {}", False, ".3g"),
    ):
        if worst := last.worst(name, lowest=lowest):
            parts.append(f"{words.format(format(worst[0], form))} (layer {worst[1]})")
    if parts:
        yield f"worst layers at step {last.step}: {', '.join(parts)}"
    if last.memory:
        of = "a device" if last.memory_of == "device" else "the host (process)"
        sizes = {name: human_bytes(value) for name, value in last.memory.items()}
        limit = f" of {sizes['limit_bytes']}" if "limit_bytes" in sizes else ""
        now, peak = sizes.get("in_use_bytes", "?"), sizes.get("peak_bytes", "?")
        yield f"memory of {of}: {now}, at the peak {peak}{limit}"


def norm_rows(last: LayerRecord) -> list[tuple[str, ...]]:
    """Return a table of the norms by kind, its head first: kind, parameters, gradient, update."""
    found: list[tuple[str, ...]] = [
        ("kind", "parameters", "gradient", "update", "update/parameters")
    ]
    for kind, size in last.norms.get("param_norm", {}).items():
        grad, update = (last.norms.get(name, {}).get(kind) for name in ("grad_norm", "update_norm"))
        ratio = None if update is None or not size else update / size
        numbers = (size, grad, update, ratio)
        found.append((kind, *("-" if each is None else f"{each:.3g}" for each in numbers)))
    return found if len(found) > 1 else []
