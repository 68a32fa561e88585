"""Make the weights that a step computes with from the parameters that it stores and updates.

The layers cast their weights to the dtype of the products. Where they do that themselves, in a
scan, each weight is read in float32 and cast in the forward pass, in recomputation and in the
backward pass of every microbatch. A cast ahead of the scan is made once, on the shards, and FSDP
gathers what was cast; it holds a copy of the shards in the narrow dtype for the whole step, and
makes the gradient of a microbatch narrow as well, which takes as many bytes less.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from moe_shard.models.params import Params, ParamSpec


def working_weights(
    params: Params, specs: Params, stored: Params, dtype: DTypeLike, *, cast: bool
) -> Params:
    """Return the parameters as the layers use them: cast, and placed by the rule table.

    Args:
        params: the parameters, as they are stored.
        specs: their `ParamSpec`s, with the placement of the rule table.
        stored: the same with the placement in which they are stored, which may be over more axes.
        dtype: dtype of the products.
        cast: whether to cast the matrices of the layers.
    """

    def working(param: Float[Array, "*D"], spec: ParamSpec, at: ParamSpec) -> Float[Array, "*D"]:
        if cast and is_cast(spec):
            param = param.astype(dtype)
        if at.sharding == spec.sharding:
            return param
        # Two constraints, so that what is gathered is what was cast.
        param = jax.lax.with_sharding_constraint(param, at.sharding)
        return jax.lax.with_sharding_constraint(param, spec.sharding)

    with jax.named_scope("weights"):
        return jax.tree.map(working, params, specs, stored)


def is_cast(spec: ParamSpec) -> bool:
    """Return whether the layers use a parameter only in the dtype of the products.

    Routers and norms compute in float32. Biases are cast where they are added: they are small. So
    are the embedding and the logits' weights, which stand outside of the scan.
    """
    axes = spec.logical_axes
    return "layers" in axes and "exp_router" not in axes and spec.is_matrix


def as_stored(grads: Params, params: Params) -> Params:
    """Return gradients in the dtypes of the parameters."""
    return jax.tree.map(lambda grad, param: grad.astype(jnp.result_type(param)), grads, params)
