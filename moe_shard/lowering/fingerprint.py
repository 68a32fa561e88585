"""Summarize what a compiled step does between devices, short enough for version control.

A fingerprint holds the verdict, the mesh and the collectives added up by stage, pass, kind and mesh
axes: equal for what a person would call the same program. Names, order, source lines and schedules
    are left
out, and so is whether a collective is asynchronous, which the scheduler decides. Memory is compared
with a tolerance: the packing of temporaries changes a little with every release of a compiler; an
additional weight or activation changes it more.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe_shard.errors import UserError
from moe_shard.lowering.differences import CollectiveSums, Lowering, SumKey, compare, from_object
from moe_shard.lowering.verdict_names import VERDICTS

MEMORY_TOLERANCE = 0.05
_FIELDS = ("count", "bytes", "wire_bytes")


@dataclass(frozen=True)
class Fingerprint:
    """Describe one cell of the matrix of models and targets.

    Attributes:
        verdict: one of `verdict_names.VERDICTS`; None where the compiler refused.
        mesh: {axis: size}, axes of size 1 left out.
        sums: the collectives; never marked asynchronous.
        memory_bytes: bytes that a device must hold; 0 where that is unknown.
    """

    verdict: str | None
    mesh: dict[str, int]
    sums: dict[SumKey, CollectiveSums]
    memory_bytes: int

    @classmethod
    def of(cls, report: Mapping[str, Any]) -> Fingerprint:
        """Make the fingerprint of an object of `lowering.json`."""
        lowering = from_object(report, "the report")
        sums = {key: replace(each, asynchronous=0) for key, each in lowering.sums.items()}
        held = "peak_bytes" if lowering.backend == "tpu" else "total_bytes"
        return cls(
            lowering.verdict,
            lowering.large_axes,
            dict(sorted(sums.items())),
            (lowering.memory or {}).get(held, 0),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the object that a golden file holds."""
        return {
            "verdict": self.verdict,
            "mesh": self.mesh,
            "memory_bytes": self.memory_bytes,
            "collectives": [
                " ".join(
                    (
                        *key[:3],
                        ",".join(key[3]) or "-",
                        *(str(getattr(each, name)) for name in _FIELDS),
                    )
                )
                for key, each in self.sums.items()
            ],
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Fingerprint:
        """Read what `to_json` wrote; raise KeyError, ValueError or the like otherwise."""
        sums: dict[SumKey, CollectiveSums] = {}
        for line in content["collectives"]:
            scope, pass_, kind, axes, *numbers = line.split(" ")
            key = (scope, pass_, kind, () if axes == "-" else tuple(axes.split(",")))
            if key in sums:  # as a wrong merge leaves it
                raise ValueError(f"two lines for {scope} {pass_} {kind} {axes}")
            sums[key] = CollectiveSums(**dict(zip(_FIELDS, map(int, numbers), strict=True)))
        verdict = content["verdict"]
        if verdict not in (None, *VERDICTS):
            raise ValueError(f"unknown verdict {verdict!r}")
        mesh = {str(axis): int(size) for axis, size in content["mesh"].items()}
        return cls(verdict, mesh, sums, int(content["memory_bytes"]))

    @property
    def total(self) -> CollectiveSums:
        """Return the sums over all collectives."""
        return sum(self.sums.values(), CollectiveSums())

    @property
    def exchanges(self) -> int:
        """Return the number of all-to-alls per step, ragged ones included."""
        return sum(each.count for key, each in self.sums.items() if "all-to-all" in key[2])

    def differences(self, other: Fingerprint) -> list[tuple[str, str]]:
        """List what changed from this one to another: (where, what), most bytes first."""
        found = []
        if self.verdict != other.verdict:
            verdicts = (each.verdict or "refused by the compiler" for each in (self, other))
            found.append(("verdict", " -> ".join(verdicts)))
        if self.mesh != other.mesh:
            found.append(("mesh", f"{_sizes(self.mesh)} -> {_sizes(other.mesh)}"))
        changes = compare(self._lowering(), other._lowering()).changes
        found += [(" ".join(change.key[:2]), str(change)) for change in changes]
        before, after = self.memory_bytes, other.memory_bytes
        if abs(after - before) > MEMORY_TOLERANCE * before:
            found.append(("memory", f"{before:,} B -> {after:,} B"))
        return found

    def _lowering(self) -> Lowering:
        return Lowering("", "", 0, self.mesh, self.verdict, self.sums, None)


def _sizes(mesh: dict[str, int]) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in mesh.items()) or "one device"


@dataclass(frozen=True)
class Golden:
    """Hold the cells of one model as they were when the goldens were last refreshed.

    Attributes:
        made_with: {package: version}.
        commands: {"h100:8 on": what compiles that cell}.
        cells: {"h100:8 on": fingerprint}, the same names.
    """

    made_with: dict[str, str]
    commands: dict[str, str]
    cells: dict[str, Fingerprint]

    def to_text(self) -> str:
        """Return the text of the file."""
        content = {
            "made_with": self.made_with,
            "cells": {
                name: {"command": self.commands[name], **each.to_json()}
                for name, each in self.cells.items()
            },
        }
        return json.dumps(content, indent=1) + "\n"


def read_golden(path: Path) -> Golden:
    """Read the file of one model.

    Raises:
        UserError: there is no such file, or it is not a golden file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        cells = content["cells"].items()
        return Golden(
            {str(name): str(version) for name, version in content["made_with"].items()},
            {name: str(each["command"]) for name, each in cells},
            {name: Fingerprint.from_json(each) for name, each in cells},
        )
    except FileNotFoundError as error:
        raise UserError(f"there is no {path}\nfix: make goldens") from error
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise UserError(
            f"{path} is no golden file: {type(error).__name__} {str(error)[:80]}\nfix: make goldens"
        ) from error
