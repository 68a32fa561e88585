"""Choose what a decoder layer keeps for its backward pass; the rest is recomputed.

Every policy keeps the routing decision. To recompute it could flip a near tie, and the gradient
would then be that of another choice of experts than the loss.
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
    # Keep only the layer's input: least memory, but the forward exchange runs a second time.
    "full": _KEEP_ROUTING,
    # Also keep the products without a batch dim (so not the experts'), the common choice.
    "dots": policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable, _KEEP_ROUTING
    ),
    # Also keep what was exchanged, twice the routed tokens: backward repeats no all-to-all.
    "save_exchanged": policies.save_only_these_names(ROUTING, EXCHANGED),
}


def remat(layer: Callable[..., Any], policy: RematPolicy) -> Callable[..., Any]:
    """Wrap the body of a scan over layers in rematerialisation.

    Args:
        layer: a function of arrays.
        policy: `remat_policy` of the configuration; "none" keeps everything.
    """
    if policy == "none":
        return layer
    # In a scan XLA cannot merge the recomputation away, so barriers against that are not needed.
    return jax.checkpoint(layer, policy=_POLICIES[policy], prevent_cse=False)
