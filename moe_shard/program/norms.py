"""Compute the norms of gradients and parameters layer by layer, to find where numbers went bad."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_shard.models.params import Params, ParamSpec

LayerValues = dict[str, Float[Array, "..."]]
"""Name of a parameter -> a value for each of its layers [L], or one [] where it has none."""


class Norms(NamedTuple):
    """Hold what one batch gives, tensor by tensor, its stacked layers apart.

    Attributes:
        loss: cross entropy plus auxiliary losses.
        gradients: norms of the gradients.
        parameters: norms of the parameters.
        bad_gradients: number of elements of each gradient that are not finite.
        bad_parameters: the same of each parameter.
    """

    loss: Float[Array, ""]
    gradients: LayerValues
    parameters: LayerValues
    bad_gradients: LayerValues
    bad_parameters: LayerValues


def norms(loss: Float[Array, ""], grads: Params, params: Params, specs: Params) -> Norms:
    """Reduce a gradient and its parameters to norms.

    Args:
        loss: the loss.
        grads: the gradient.
        params: the parameters.
        specs: their `ParamSpec`s, which say which dim is that of layers.
    """
    flat = jax.tree.leaves(specs)

    def each(tree: Params, *, count: bool) -> LayerValues:
        return {
            spec.name: _by_layer(x, spec, count=count)
            for spec, x in zip(flat, jax.tree.leaves(tree), strict=True)
        }

    return Norms(
        loss,
        each(grads, count=False),
        each(params, count=False),
        each(grads, count=True),
        each(params, count=True),
    )


def _by_layer(x: Float[Array, "*D"], spec: ParamSpec, *, count: bool) -> Float[Array, "..."]:
    dims = tuple(dim for dim, axis in enumerate(spec.logical_axes) if axis != "layers")
    x = x.astype(jnp.float32)
    if count:
        return jnp.sum(~jnp.isfinite(x), axis=dims, dtype=jnp.float32)
    # Scaled by the largest element, so that no square overflows.
    largest = jnp.max(jnp.abs(x), axis=dims, keepdims=True)
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1.0)
    norm = jnp.sqrt(jnp.sum(jnp.square(x / scale), axis=dims))
    return norm * jnp.reshape(scale, norm.shape)
