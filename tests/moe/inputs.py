"""Draw float32 parameters, tokens and cotangents, the same for the package and the oracle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Dims = dict[str, Any]
"""Sizes, as `random_inputs` and `build_layer` take them: rows, tokens, model, hidden, experts."""


@dataclass(frozen=True)
class Inputs:
    """Hold the arguments of one forward and backward pass."""

    x: np.ndarray
    params: dict[str, np.ndarray]
    cotangent: np.ndarray


def random_inputs(
    *,
    rows: int,
    tokens: int,
    model: int,
    hidden: int,
    experts: int,
    seed: int = 0,
    biases: tuple[str, ...] = (),
) -> Inputs:
    """Draw inputs of unit scale; the router's scores differ enough to overfill some experts.

    Args:
        biases: names of `oracle.FURTHER`, which are drawn too.
    """
    rng = np.random.default_rng(seed)

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    sizes = {"gate_bias": (experts, hidden), "up_bias": (experts, hidden)}
    sizes |= {"down_bias": (experts, model)}
    inputs = Inputs(
        x=normal(rows, tokens, model),
        params={
            "kernel": normal(model, experts, scale=model**-0.5),
            "gate": normal(experts, model, hidden, scale=model**-0.5),
            "up": normal(experts, model, hidden, scale=model**-0.5),
            "down": normal(experts, hidden, model, scale=hidden**-0.5),
        },
        cotangent=normal(rows, tokens, model),
    )
    inputs.params.update({name: normal(*sizes.get(name, (experts,)), scale=0.3) for name in biases})
    return inputs
