"""Compute the norms of gradients and parameters layer by layer, to find where numbers went bad."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from moe_shard.config.schema import brief_list
from moe_shard.errors import UserError
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


def norms(
    loss: Float[Array, ""],
    grads: Params,
    params: Params,
    specs: Params,
    *,
    trained: Params | None = None,
) -> Norms:
    """Reduce a gradient and its parameters to norms.

    Args:
        loss: the loss.
        grads: the gradient.
        params: the parameters.
        specs: their `ParamSpec`s, which say which dim is that of layers.
        trained: those of the gradient; None: the same.
    """

    def each(tree: Params, of: Params, *, count: bool) -> LayerValues:
        return {
            spec.name: _by_layer(x, spec, count=count)
            for spec, x in zip(jax.tree.leaves(of), jax.tree.leaves(tree), strict=True)
        }

    with_gradients = specs if trained is None else trained
    return Norms(
        loss,
        each(grads, with_gradients, count=False),
        each(params, specs, count=False),
        each(grads, with_gradients, count=True),
        each(params, specs, count=True),
    )


def require_finite(params: Params, specs: Params, source: str) -> None:
    """Refuse weights with an element that is not finite: every step would be skipped.

    Args:
        params: the parameters, as they were read.
        specs: their `ParamSpec`s.
        source: where they were read from.

    Raises:
        UserError: there is one; it names the parameters, and the first layer of each.
    """
    flat = jax.tree.leaves(specs)
    replicated = NamedSharding(flat[0].sharding.mesh, PartitionSpec())

    def counts(params: Params) -> LayerValues:
        leaves = zip(flat, jax.tree.leaves(params), strict=True)
        return {spec.name: _by_layer(x, spec, count=True) for spec, x in leaves}

    found = jax.device_get(jax.jit(counts, out_shardings=replicated)(params))
    if names := named_bad(found):
        total = sum(float(np.sum(count)) for count in found.values())
        raise UserError(
            f"{source}: weights that are not finite (NaN or inf): {total:,.0f} in "
            f"{brief_list(names, 3)}\nfix: the weights before they went bad, or copied again"
        )


def named_bad(counts: Mapping[str, Any]) -> list[str]:
    """List tensors with elements that are not finite, with the first of their layers."""
    names = []
    for name, count in counts.items():
        at = np.flatnonzero(np.asarray(count))
        if at.size:
            names.append(f"{name}[{at[0]}]" if np.ndim(count) else name)
    return names


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
