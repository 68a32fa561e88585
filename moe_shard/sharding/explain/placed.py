"""Describe how one array is placed: the shard on each device, and the rule behind each dim."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from moe_shard.sharding.annotate import AnnotatedArray
from moe_shard.sharding.rules import Decision, NumberedRule, Resolution


@dataclass(frozen=True)
class PlacedArray:
    """Hold an array and its placement.

    Attributes:
        array: its name, logical axes, shape and dtype.
        resolution: a decision per dim.
        sizes: mesh axis -> size.
        num_rules: number of rules in the table as written; higher numbers stand for missing rules.
    """

    array: AnnotatedArray
    resolution: Resolution
    sizes: Mapping[str, int]
    num_rules: int

    @property
    def shard_shape(self) -> tuple[int, ...]:
        """Return the shape on one device, rounded up where the mesh does not divide a dim."""
        return tuple(-(-d.size // self.parts(d.mesh_axes)) for d in self.resolution.decisions)

    @property
    def bytes(self) -> int:
        """Return the bytes on all devices together, copies not counted."""
        return math.prod(self.array.shape) * self._item_bytes

    @property
    def bytes_per_device(self) -> int:
        """Return the bytes on one device."""
        return math.prod(self.shard_shape) * self._item_bytes

    @property
    def _item_bytes(self) -> int:
        assert self.array.dtype is not None, self.array
        return jnp.dtype(self.array.dtype).itemsize

    @property
    def dtype_name(self) -> str:
        """Return the dtype as jax abbreviates it: f32, bf16, i32."""
        name = jnp.dtype(self.array.dtype).name
        return name.replace("float", "f").replace("uint", "u").replace("int", "i")

    def parts(self, mesh_axes: Iterable[str]) -> int:
        """Return how many parts these axes split a dim into."""
        return math.prod(self.sizes[axis] for axis in mesh_axes)

    def won(self, decision: Decision) -> NumberedRule | None:
        """Return the rule that placed a dim; None also where the table has no rule for it."""
        rule = decision.won
        return rule if rule is not None and rule.number <= self.num_rules else None

    def to_json(self) -> dict[str, Any]:
        """Return an object of `moe-shard explain --json`."""
        return {
            "name": self.array.name,
            "dtype": jnp.dtype(self.array.dtype).name,
            "shape": list(self.array.shape),
            "logical_axes": list(self.array.logical_axes),
            "spec": [list(decision.mesh_axes) for decision in self.resolution.decisions],
            "shard_shape": list(self.shard_shape),
            "bytes": self.bytes,
            "bytes_per_device": self.bytes_per_device,
            "dims": [
                {
                    "logical_axis": decision.logical_axis,
                    "size": decision.size,
                    "shard": shard,
                    "mesh_axes": list(decision.mesh_axes),
                    "won": rule_json(self.won(decision)),
                    "lost": [
                        {
                            **(rule_json(loss.rule) or {}),
                            "contested": list(loss.taken),
                            "held_by": loss.held_by or None,
                            "reason": loss.reason,
                            "size": loss.size,
                        }
                        for loss in decision.lost
                    ],
                }
                for decision, shard in zip(self.resolution.decisions, self.shard_shape, strict=True)
            ],
        }


def rule_json(rule: NumberedRule | None) -> dict[str, Any] | None:
    """Return an object of `moe-shard explain --json`."""
    if rule is None:
        return None
    return {
        "row": rule.number,  # keys of the JSON are published and stay
        "logical_axis": rule.logical_axis,
        "mesh_axes": list(rule.mesh_axes),
    }
