"""Read back what `layers.jsonl` says of a run; lines that are something else are left out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_shard.files import pass_over_hole

NORMS = {
    "grad_norm": "norm of the gradient",
    "param_norm": "norm of the parameters",
    "update_norm": "norm of the update",
}
"""Norms of a record, by kind of parameter, with their names for people."""
BY_LAYER = {
    "expert_load_max_over_mean": "load of the busiest expert, x the mean",
    "expert_load_min_over_mean": "load of the least busy expert, x the mean",
    "expert_load_entropy": "evenness of the load (entropy, 1 = equal)",
    "dropped_token_fraction": "share of dropped token choices",
    "router_z": "router z",
    "router_bias_norm": "norm of the router's bias",
}
"""Lists of a record, by MoE layer, with their names for people."""
_LONGEST_LINE = 1 << 20


@dataclass(frozen=True)
class LayerRecord:
    """Hold a line of `layers.jsonl`.

    Attributes:
        step: its step.
        memory: numbers of bytes.
        memory_of: "device" or "host".
        norms: {one of `NORMS`: {kind: norm}}.
        layers: numbers of the MoE layers.
        by_layer: {one of `BY_LAYER`: a number for each of them, None where it was not finite}.
    """

    step: int
    memory: Mapping[str, float]
    memory_of: str
    norms: Mapping[str, Mapping[str, float]]
    layers: tuple[int, ...]
    by_layer: Mapping[str, tuple[float | None, ...]]

    def worst(self, name: str, *, lowest: bool = False) -> tuple[float, int] | None:
        """Return the highest (or lowest) of a list and its layer; None where there is none."""
        known = [
            (value, layer)
            for value, layer in zip(self.by_layer.get(name, ()), self.layers, strict=False)
            if value is not None
        ]
        if not known:
            return None
        return min(known) if lowest else max(known, key=lambda each: (each[0], -each[1]))


def read_layers(path: Path, most: int = 300) -> tuple[LayerRecord, ...]:
    """Read the records of a run, of many some at equal distances and the last.

    Args:
        path: its `layers.jsonl`.
        most: number of records.

    Raises:
        OSError: it cannot be read.
    """
    if not path.is_file():
        return ()
    with path.open("rb") as file:
        starts, at = [], 0
        while line := file.readline(_LONGEST_LINE):
            if line.strip(b"\0"):
                starts.append(at)
            else:
                pass_over_hole(file)
            at = file.tell()
        count = min(most, len(starts))
        chosen = {len(starts) - 1 - index * len(starts) // count for index in range(count)}
        found = []
        for index in sorted(chosen):
            file.seek(starts[index])
            if record := _parsed(file.readline(_LONGEST_LINE)):
                found.append(record)
    return tuple(found)


def _parsed(line: bytes) -> LayerRecord | None:
    try:
        content: Any = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or type(content.get("step")) is not int:
        return None
    layers = content.get("layers", [])
    if not isinstance(layers, list) or not all(type(each) is int for each in layers):
        layers = []
    by_layer = {}
    for name in BY_LAYER:
        values = content.get(name)
        if isinstance(values, list) and len(values) == len(layers):
            by_layer[name] = tuple(map(finite, values))
    memory: Any = content.get("memory")
    return LayerRecord(
        step=content["step"],
        memory=_numbers(memory),
        memory_of="device" if isinstance(memory, dict) and memory.get("of") == "device" else "host",
        norms={name: _numbers(content.get(name)) for name in NORMS},
        layers=tuple(layers),
        by_layer=by_layer,
    )


def _numbers(content: object) -> dict[str, float]:
    if not isinstance(content, dict):
        return {}
    known = {str(name): finite(value) for name, value in content.items()}
    return {name: value for name, value in known.items() if value is not None}


def finite(value: object) -> float | None:
    """Return a value as a finite number; None if it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
