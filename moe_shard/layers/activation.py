"""The nonlinearities a gated MLP or an expert can use, by their name in `mlp_activations`."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jaxtyping import Array

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
    "relu": jax.nn.relu,
}
