"""Say what a person should look at in a run, as far as its files show it."""

from __future__ import annotations

from collections.abc import Iterator

from moe_shard.training.layer_history import LayerRecord
from moe_shard.training.run_status import RunStatus
from moe_shard.units import human_bytes, human_count, human_ranges, human_time_left

_RECENT_STEPS = 100


def concerns(status: RunStatus) -> Iterator[str]:
    """Yield a line on each thing that may be wrong; none where nothing is seen.

    They are facts with the numbers they are judged by, not verdicts: an expert that has no token in
    one step may have some in the next.
    """
    step_s, recent_s = status.step_seconds(), status.step_seconds(20)
    unfinished = status.steps is not None and status.updates < status.steps
    silent = status.age_s is None or status.age_s > max(20 * (step_s or 0), 300)
    if status.running and silent and status.age_s is not None:
        yield f"no step for {human_time_left(status.age_s)}" + (
            f"; a step takes {step_s:.2g} s" if step_s else ""
        )
    if not status.running and silent and unfinished:  # else another machine may be at it
        yield "it has not made all its steps, and no process of this machine is at it"
    if step_s and recent_s and len(status.records) > 200 and recent_s > 1.5 * step_s:
        yield f"steps take {recent_s:.3g} s now, and {step_s:.3g} s in the median of the run"
    newest = [step for step in status.skipped() if step >= status.updates - _RECENT_STEPS]
    if newest:
        yield (
            f"{human_count(len(newest), 'step')} of the last {_RECENT_STEPS} skipped, the last "
            f"at {newest[-1]}"
        )
    if status.post_mortems:
        yield f"steps that ended a start: {', '.join(status.post_mortems)}"
    if status.set_aside:
        yield f"set aside as damaged: {', '.join(status.set_aside)}"
    if (
        status.disk_free_bytes is not None
        and status.newest_bytes is not None
        and status.disk_free_bytes < 2 * status.newest_bytes
    ):
        yield (
            f"{human_bytes(status.disk_free_bytes)} are free on its disk, and a checkpoint has "
            f"{human_bytes(status.newest_bytes)}"
        )
    if status.layers:
        yield from _of_layers(status.layers[-1])


def _of_layers(last: LayerRecord) -> Iterator[str]:
    idle = last.by_layer.get("expert_load_min_over_mean", ())
    layers = [layer for layer, load in zip(last.layers, idle, strict=False) if load == 0]
    if layers:
        yield (
            f"an expert has no token at step {last.step} in layer "
            f"{human_ranges(sorted(layers), 8)} ({len(layers)} of {len(last.layers)})"
        )
    for name, values in last.by_layer.items():
        if None in values:
            yield f"{name} is not finite in a layer at step {last.step}"
    peak, limit = last.memory.get("peak_bytes"), last.memory.get("limit_bytes")
    if peak and limit and peak > 0.95 * limit:
        yield f"memory of a device: {human_bytes(peak)} of {human_bytes(limit)} at the peak"
