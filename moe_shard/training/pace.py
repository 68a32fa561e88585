"""Make the record of a step from what it computed and the time it took."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from moe_shard.training.metrics import Record

_FIRST = ("loss", "ce_loss", "aux_loss", "grad_norm", "learning_rate")
_LAST = ("dropped_token_fraction", "expert_load_max_over_mean", "update_norm")
"""Metrics of the compiled step that a record has as they are."""


@dataclass(frozen=True)
class Pace:
    """Hold the work of a step, by which its time becomes speed.

    Attributes:
        tokens: of one device.
        flops_per_token: useful ones, see `models.flops`.
        peak_flops: of a device, per second; None where it is unknown.
    """

    tokens: float
    flops_per_token: float
    peak_flops: float | None

    def record(self, step: int, values: Mapping[str, float], seconds: float) -> Record:
        """Return the record of a step.

        Args:
            step: its number.
            values: what it computed; a number that is not finite is recorded as null.
            seconds: the time it took.
        """
        tokens_per_second = self.tokens / seconds
        flops = tokens_per_second * self.flops_per_token
        return {
            "step": step,
            **{name: _number(values[name]) for name in _FIRST},
            "step_time_s": seconds,
            "tokens_per_sec_per_device": tokens_per_second,
            "tflops_per_sec_per_device": flops / 1e12,
            "mfu": flops / self.peak_flops if self.peak_flops else None,
            **{name: _number(values[name]) for name in _LAST},
            "skipped": int(values["skipped"]),
        }


def _number(value: float) -> float | None:
    """Return a number, or None where JSON has no word for it."""
    return value if math.isfinite(value) else None
