"""What a compiled step does between devices, short enough to keep under version control.

A fingerprint holds the verdict, the mesh and the collectives added up by stage, pass, kind and mesh
axes: what a person would call the same program. Names, order, source lines and schedules are left
out, and whether a collective is asynchronous, which is the scheduler's business. Memory is kept to
be looked at, and compared with a tolerance: temporaries move with every release of a compiler.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe_shard.errors import UserError
from moe_shard.lowering.diff import Key, Lowering, Sums, compare, from_object

MEMORY_TOLERANCE = 0.1
_FIELDS = ("count", "bytes", "wire_bytes")


@dataclass(frozen=True)
class Fingerprint:
    """One cell of the matrix.

    Attributes:
        verdict: one of `expect.VERDICTS`.
        mesh: {axis: size}, axes of size 1 left out.
        sums: the collectives; never marked asynchronous.
        memory_bytes: what a device has to hold.
    """

    verdict: str | None
    mesh: dict[str, int]
    sums: dict[Key, Sums]
    memory_bytes: int

    @classmethod
    def of(cls, report: Mapping[str, Any]) -> Fingerprint:
        """That of an object of `lowering.json`."""
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
        """For a golden file."""
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
        """Read what `to_json` wrote; ValueError, KeyError or TypeError for anything else."""
        sums: dict[Key, Sums] = {}
        for line in content["collectives"]:
            scope, pass_, kind, axes, *numbers = line.split(" ")
            key = (scope, pass_, kind, () if axes == "-" else tuple(axes.split(",")))
            sums[key] = Sums(**dict(zip(_FIELDS, map(int, numbers), strict=True)))
        return cls(content["verdict"], dict(content["mesh"]), sums, int(content["memory_bytes"]))

    def differences(self, other: Fingerprint) -> list[tuple[str, str]]:
        """What changed from this one to another: (where, what), the most bytes first."""
        found = []
        if self.verdict != other.verdict:
            found.append(("verdict", f"{self.verdict} -> {other.verdict}"))
        if self.mesh != other.mesh:
            found.append(("mesh", f"{self.mesh} -> {other.mesh}"))
        changes = compare(self._lowering(), other._lowering()).changes
        found += [(" ".join(change.key[:2]), str(change)) for change in changes]
        before, after = self.memory_bytes, other.memory_bytes
        if abs(after - before) > MEMORY_TOLERANCE * before:
            found.append(("memory", f"{before:,} B -> {after:,} B"))
        return found

    def _lowering(self) -> Lowering:
        return Lowering("", "", 0, self.mesh, self.verdict, self.sums, None)


@dataclass(frozen=True)
class Golden:
    """The cells of one model, as they were when somebody last looked.

    Attributes:
        made_with: {package: version}.
        keys: the `key=value` that every cell was compiled with, but for the flag.
        cells: {"h100:8 on": fingerprint}.
    """

    made_with: dict[str, str]
    keys: tuple[str, ...]
    cells: dict[str, Fingerprint]

    def to_text(self) -> str:
        """The file."""
        content = {
            "made_with": self.made_with,
            "keys": list(self.keys),
            "cells": {name: each.to_json() for name, each in self.cells.items()},
        }
        return json.dumps(content, indent=1) + "\n"


def read_golden(path: Path) -> Golden:
    """Read the file of one model.

    Raises:
        UserError: it is not there, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Golden(
            {str(name): str(version) for name, version in content["made_with"].items()},
            tuple(map(str, content["keys"])),
            {name: Fingerprint.from_json(each) for name, each in content["cells"].items()},
        )
    except FileNotFoundError as error:
        raise UserError(f"there is no {path}\nfix: make goldens") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is no golden file: {type(error).__name__} {str(error)[:80]}\nfix: make goldens"
        ) from error
