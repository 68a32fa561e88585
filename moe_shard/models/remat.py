"""What a decoder layer keeps for its backward pass; the rest is computed again.

Every policy keeps the routing decision. Recomputing it could flip a near tie, and the gradient
would then belong to another choice of experts than the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import checkpoint_policies as policies

from moe_shard.config.model_config import RematPolicy
from moe_shard.moe.placement import EXCHANGED
from moe_shard.moe.router import ROUTING

_KEEP_ROUTING = policies.save_only_these_names(ROUTING)
_POLICIES = {
    # Only the layer's input: least memory, and the forward exchange is made a second time.
    "full": _KEEP_ROUTING,
    # And the products with weights that have no batch dim (so not the experts'), as is customary.
    "dots": policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable, _KEEP_ROUTING
    ),
    # And what crossed the wire, twice the routed tokens: the backward pass repeats no all-to-all.
    "save_exchanged": policies.save_only_these_names(ROUTING, EXCHANGED),
}


def remat(layer: Callable[..., Any], policy: RematPolicy) -> Callable[..., Any]:
    """Wrap the body of a scan over layers.

    Args:
        layer: a function of arrays.
        policy: `remat_policy` of the configuration; "none" keeps everything.
    """
    if policy == "none":
        return layer
    # Inside a scan XLA cannot undo the recomputation, so the barriers against that are left out.
    return jax.checkpoint(layer, policy=_POLICIES[policy], prevent_cse=False)
