"""Compute the dense MLP, `down(act(gate(x)) * (up(x) + offset))` (arXiv 2002.05202).

Without a gate it is `down(act(up(x)))`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.nn.initializers import variance_scaling
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from moe_shard.config.model_config import GatingConfig
from moe_shard.layers.activation import activated
from moe_shard.layers.adapter import adapter_of
from moe_shard.sharding.annotate import Sharding
from moe_shard.sharding.parameter import parameter

WEIGHT_IN, WEIGHT_OUT = ("embed", "mlp"), ("mlp", "embed")


class MLP(nnx.Module):
    """Apply an MLP.

    Args:
        model_dim: M, the model dim.
        hidden_dim: F, the hidden dim.
        gating: activation, gate, clamps, offset, biases.
        dtype: dtype of the products.
        weight_dtype: dtype of the parameters.
        sharding: the mesh and its rules.
        rngs: source of the initial weights.
    """

    def __init__(
        self,
        *,
        model_dim: int,
        hidden_dim: int,
        gating: GatingConfig,
        dtype: DTypeLike,
        weight_dtype: DTypeLike,
        sharding: Sharding,
        rngs: nnx.Rngs,
    ) -> None:
        init = variance_scaling(1.0, "fan_in", "truncated_normal")
        shape_in, shape_out = (model_dim, hidden_dim), (hidden_dim, model_dim)

        def inward() -> nnx.Param[Array]:
            return parameter(init(rngs.params(), shape_in, weight_dtype), WEIGHT_IN)

        self.gate = inward() if gating.has_gate else None
        self.up = inward()
        self.down = parameter(init(rngs.params(), shape_out, weight_dtype), WEIGHT_OUT)

        def bias(size: int, axis: str) -> nnx.Param[Array] | None:
            if not gating.mlp_bias:
                return None
            return parameter(jnp.zeros((size,), weight_dtype), (axis,))

        self.gate_bias = bias(hidden_dim, "mlp") if gating.has_gate else None
        self.up_bias = bias(hidden_dim, "mlp")
        self.down_bias = bias(model_dim, "norm")
        self.gating = gating
        self.dtype = dtype
        self.sharding = sharding

    def __call__(self, x: Float[Array, "B S M"]) -> Float[Array, "B S M"]:
        """Apply the MLP."""
        with jax.named_scope("mlp"):
            inward = []
            if self.gate is not None:
                inward.append(self._project(x, self.gate, self.gate_bias, "mlp gate"))
            inward.append(self._project(x, self.up, self.up_bias, "mlp up"))
            inward = [checkpoint_name(each, f"mlpwi_{n}") for n, each in enumerate(inward)]
            down = self.sharding.use_weight(
                self.down[...].astype(self.dtype),
                WEIGHT_OUT,
                ("activation_mlp", None),
                name="mlp down",
            )
            hidden = activated(inward, self.gating)
            y = jnp.einsum("bsf,fm->bsm", hidden, down)
            y = self._adapted(y, hidden, "down", ("activation_mlp", None))
            y = self.sharding(
                y, "activation_batch", "activation_length", "activation_embed", name="mlp output"
            )
            y = self._add(y, self.down_bias, ("norm",), ("activation_embed",), "mlp down bias")
            return checkpoint_name(y, "mlpwo")

    def _project(
        self,
        x: Float[Array, "B S M"],
        kernel: nnx.Param[Array],
        bias: nnx.Param[Array] | None,
        name: str,
    ) -> Float[Array, "B S F"]:
        kernel_in_use = self.sharding.use_weight(
            kernel[...].astype(self.dtype), WEIGHT_IN, (None, "activation_mlp"), name=name
        )
        product = jnp.einsum("bsm,mf->bsf", x, kernel_in_use)
        y = self.sharding(
            self._adapted(product, x, name.split()[-1], (None, "activation_mlp")),
            "activation_batch",
            "activation_length",
            "activation_mlp",
            name="mlp hidden",
        )
        return self._add(y, bias, ("mlp",), ("activation_mlp",), f"{name} bias")

    def _adapted(
        self,
        y: Float[Array, "B S P"],
        x: Float[Array, "B S A"],
        weight: str,
        used: tuple[str | None, ...],
    ) -> Float[Array, "B S P"]:
        """Add what the adapter of a weight makes of x, if there is one."""
        adapter = adapter_of(self, weight)
        if adapter is None:
            return y
        name = f"mlp {weight}"
        return y + adapter(x, used, dtype=self.dtype, sharding=self.sharding, name=name)

    def _add(
        self,
        y: Float[Array, "B S F"],
        bias: nnx.Param[Array] | None,
        stored: tuple[str],
        used: tuple[str],
        name: str,
    ) -> Float[Array, "B S F"]:
        if bias is None:
            return y
        return y + self.sharding.use_weight(bias[...].astype(self.dtype), stored, used, name=name)
