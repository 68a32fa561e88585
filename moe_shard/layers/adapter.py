"""Add low-rank products to those with frozen weights: LoRA (arXiv 2106.09685).

An adapter stands beside its weight, at the weight's name and `_lora`, and is placed as the weight:
A has the input dims of the weight, B its output dims, and the rank is never sharded. The two are
not merged with the weight in training, so that nothing of the weight's size has a gradient.

    R  rank
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from moe_shard.config.lora_config import ADAPTER, LoraConfig
from moe_shard.sharding.annotate import Sharding
from moe_shard.sharding.parameter import parameter
from moe_shard.sharding.rules import LogicalAxes


def first_a(
    shape: tuple[int, ...], axes: LogicalAxes, *, fan_in: int, rngs: nnx.Rngs
) -> nnx.Param[Array]:
    """Make A as peft draws it: uniform within 1 / sqrt(inputs); in float32.

    Args:
        shape: of A.
        axes: its logical axes.
        fan_in: number of inputs.
        rngs: source of the values.
    """
    bound = 1 / math.sqrt(fan_in)
    drawn = jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)
    return parameter(drawn, axes)


class Adapter(nnx.Module):
    """Hold A and B of one weight that is no expert's.

    Args:
        weight: the weight; its leading dims are inputs.
        inputs: number of these.
        config: rank and scale.
        rngs: source of A; B begins as 0.
    """

    def __init__(
        self, weight: nnx.Param[Array], *, inputs: int, config: LoraConfig, rngs: nnx.Rngs
    ) -> None:
        shape, axes = weight.get_value().shape, weight.get_metadata("out_sharding")
        ins, outs = shape[:inputs], shape[inputs:]
        rank = config.lora_rank
        self.a = first_a((*ins, rank), (*axes[:inputs], None), fan_in=math.prod(ins), rngs=rngs)
        self.b = parameter(jnp.zeros((rank, *outs), jnp.float32), (None, *axes[inputs:]))
        self.scale, self.inputs = config.scale, inputs

    def __call__(
        self,
        x: Float[Array, "B S *ins"],
        used: LogicalAxes,
        *,
        dtype: DTypeLike,
        sharding: Sharding,
        name: str,
    ) -> Float[Array, "B S *outs"]:
        """Compute what is added to the product with the weight.

        Args:
            x: what the weight is multiplied with.
            used: the logical axes that the weight is used with.
            dtype: dtype of the products.
            sharding: the mesh and its rules.
            name: the weight's name in reports.
        """
        a, b = self._in_use(used, dtype, sharding, name)
        low = jnp.tensordot(x, a, axes=self.inputs)
        return jnp.tensordot(low, b, axes=1)

    def whole(
        self, used: LogicalAxes, *, dtype: DTypeLike, sharding: Sharding, name: str
    ) -> Float[Array, "*D"]:
        """Compute what is added to the weight itself, where a product is with a part of it."""
        return jnp.tensordot(*self._in_use(used, dtype, sharding, name), axes=1)

    def _in_use(
        self, used: LogicalAxes, dtype: DTypeLike, sharding: Sharding, name: str
    ) -> tuple[Any, Any]:
        ins, outs = used[: self.inputs], used[self.inputs :]
        found = []
        for param, axes, scale in (
            (self.a, (*ins, None), 1.0),
            (self.b, (None, *outs), self.scale),
        ):
            stored = param.get_metadata("out_sharding")[-len(axes) :]
            value = (param[...] * scale).astype(dtype)
            found.append(sharding.use_weight(value, stored, axes, name=f"{name} adapter"))
        return found[0], found[1]


def adapter_of(owner: nnx.Module, weight: str) -> Adapter | None:
    """Return the adapter of a module's weight, if it has one."""
    adapter: Adapter | None = getattr(owner, weight + ADAPTER, None)
    return adapter
