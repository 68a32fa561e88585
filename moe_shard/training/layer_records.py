"""Make the record of what a step shows of its MoE layers and of its kinds of parameters.

Simply (DeepMind) logs the load of experts as its maximum, minimum and entropy; the norms are those
of MaxText's `param_norm` and `raw_grad_norm`, by kind.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from moe_shard.config.model_config import ModelConfig
from moe_shard.program.kinds import kinds_of
from moe_shard.program.step import Metrics, Program
from moe_shard.training.device_memory import memory_in_use
from moe_shard.training.layer_history import NORMS


class LayerRecords:
    """Make the records of `layers.jsonl` from the arrays that a step computes.

    Args:
        model: says which layers have experts.
        program: says which kinds of parameters there are.
    """

    def __init__(self, model: ModelConfig, program: Program) -> None:
        self._layers = [at for at, kind in enumerate(model.all_layer_kinds) if kind.moe]
        self._kinds = kinds_of(program.model.specs)

    def record(self, step: int, metrics: Metrics) -> dict[str, Any]:
        """Return the record of a step: its norms by kind, its memory, and lists by MoE layer.

        A number that is not finite is null. All but `memory` follow from the step alone.

        Args:
            step: its number.
            metrics: what it computed.
        """
        arrays = jax.device_get({name: x for name, x in metrics.items() if x.ndim})
        found: dict[str, Any] = {"step": step, "memory": memory_in_use()}
        for name in NORMS:  # of the gradient, of the parameters it is of, and of the update
            found[name] = dict(zip(self._kinds, _plain(arrays[f"{name}_by_kind"]), strict=True))
        if self._layers:
            found["layers"] = self._layers
            loads = expert_loads(arrays["expert_counts"])
            found |= {name: _plain(values) for name, values in loads.items()}
            found["dropped_token_fraction"] = _plain(arrays["dropped_by_layer"])
            found["router_z"] = _plain(arrays["router_z_by_layer"])
        if "router_bias_norm_by_layer" in arrays:
            found["router_bias_norm"] = _plain(arrays["router_bias_norm_by_layer"])
        return found


def expert_loads(counts: Float[np.ndarray, "L E"]) -> dict[str, Float[np.ndarray, "L"]]:
    """Describe how even the load of each layer's experts is.

    Args:
        counts: choices of each expert.

    Returns:
        The highest and the lowest load over the mean, and the entropy of the loads over that of
        equal ones: 1, 1 and 1 for equal loads; E, 0 and 0 where one expert has all.
    """
    counts = np.asarray(counts, np.float64)
    share = counts / counts.sum(axis=1, keepdims=True)
    experts = counts.shape[1]
    surprise = -np.log(np.where(share > 0, share, 1.0))
    entropy = np.sum(share * surprise, axis=1) / math.log(experts) if experts > 1 else share[:, 0]
    return {
        "expert_load_max_over_mean": share.max(axis=1) * experts,
        "expert_load_min_over_mean": share.min(axis=1) * experts,
        "expert_load_entropy": entropy,
    }


def _plain(values: Float[np.ndarray, "N"]) -> list[float | None]:
    """Return numbers with the digits that tell float32 numbers apart, null for one not finite."""
    return [float(str(np.float32(x))) if np.isfinite(x) else None for x in values]
