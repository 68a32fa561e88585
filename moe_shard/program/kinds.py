"""Group a model's parameters by kind, and compute the norm of each kind.

The kind follows from a parameter's name, which is its path of modules. Nothing is lost: what no row
of the table knows is of the kind `other`, so that the root of the sum of squares over the kinds is
the global norm.

    K  kinds
"""

from __future__ import annotations

import re
from typing import Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_shard.models.params import Params

_OTHER: Final = "other"
_TABLE: Final = (
    ("norms", r"norm\."),
    ("attention", r"(^|\.)attention\."),
    ("delta_net", r"(^|\.)delta\."),
    ("mamba", r"(^|\.)mamba\."),
    ("convolution", r"(^|\.)convolution\."),
    ("router", r"\.router\."),
    ("experts", r"\.(experts|latent)\."),
    ("shared_experts", r"\.shared(\.|_gate$)"),
    ("dense_mlp", r"\.mlp\."),
    ("embedding", r"^embedding\.table$"),
    ("head", r"^embedding\.kernel$"),
)
"""Kinds, and what the name of a parameter has; the first that matches. A tied head is embedding."""
PARAM_KINDS: Final = (*(kind for kind, _ in _TABLE), _OTHER)


def kind_of(name: str) -> str:
    """Return the kind of a parameter.

    >>> kind_of("layers.mlp.experts.gate"), kind_of("layers.attention.key_norm.scale")
    ('experts', 'norms')
    """
    return next((kind for kind, pattern in _TABLE if re.search(pattern, name)), _OTHER)


def kinds_of(specs: Params) -> tuple[str, ...]:
    """List the kinds that a model has, in the order of `PARAM_KINDS`."""
    found = {kind_of(spec.name) for spec in jax.tree.leaves(specs)}
    return tuple(kind for kind in PARAM_KINDS if kind in found)


def norms_by_kind(tree: Params, specs: Params, kinds: tuple[str, ...] = ()) -> Float[Array, "K"]:
    """Compute the norm of each kind that a model has, in float32.

    In float32 a sum of squares is the one that `optax.tree.norm` writes, so that XLA computes the
    sums of a gradient once, for its global norm and for its kinds.

    Args:
        tree: parameters, or anything of the same structure.
        specs: their `ParamSpec`s.
        kinds: the kinds, of which some may have none of them; empty: `kinds_of` them.

    Returns:
        Norms in the order of the kinds.
    """
    totals = dict.fromkeys(kinds or kinds_of(specs), jnp.float32(0))
    for spec, leaf in zip(jax.tree.leaves(specs), jax.tree.leaves(tree), strict=True):
        totals[kind_of(spec.name)] += jnp.sum(jnp.square(leaf.astype(jnp.float32)))
    return jnp.sqrt(jnp.stack(list(totals.values())))
