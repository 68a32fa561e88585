"""Name the verdicts; command lines list them without loading what judges."""

from __future__ import annotations

VERDICTS = (
    "expert-parallel",
    "weight-gathered",
    "mixed",
    "no-expert-parallelism",
    "unknown",
)
"""The possible results of `verdicts.judge`."""
