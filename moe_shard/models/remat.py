"""Choose what a decoder layer keeps for its backward pass; the rest is recomputed.

Every policy keeps the routing decision. To recompute it could flip a near tie, and the gradient
would then be that of another choice of experts than the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import checkpoint_policies as policies

from moe_shard.config.remat_config import RematConfig, RematPolicy
from moe_shard.moe.placement import EXCHANGED
from moe_shard.moe.router import ROUTING

LAYER_INPUT = "decoder_layer_input"
_QKV = ("query_proj", "key_proj", "value_proj")
_MLP_IN = ("mlpwi_0", "mlpwi_1", "moe_mlpwi_0", "moe_mlpwi_1")
_MLP_OUT = ("mlpwo", "moe_mlpwo")
_PRODUCTS = (*_QKV, "out_proj", *_MLP_IN, *_MLP_OUT)


class KeptNames(NamedTuple):
    """Hold the names of the tensors that a layer keeps besides its input and the routing.

    Attributes:
        device: kept on the device.
        host: moved to the host, and back in the backward pass.
    """

    device: tuple[str, ...] = ()
    host: tuple[str, ...] = ()


_NAMED: dict[RematPolicy, KeptNames] = {
    # Keep only the layer's input: least memory, but the forward exchange runs a second time.
    "full": KeptNames(),
    # Also keep what was exchanged, twice the routed tokens: backward repeats no all-to-all.
    "save_exchanged": KeptNames((EXCHANGED,)),
    # MaxText's, by the names it gives its tensors. It has no name for what is exchanged; to keep
    # all products and repeat the exchanges between them would recompute the slower part.
    "minimal": KeptNames((*_PRODUCTS, EXCHANGED)),
    "minimal_with_context": KeptNames((*_PRODUCTS, "context", EXCHANGED)),
    "save_dot_with_context_except_mlp": KeptNames((*_QKV, "context", "out_proj")),
    "save_dot_except_mlpwi": KeptNames((*_QKV, "out_proj", *_MLP_OUT)),
    "save_dot_except_mlp": KeptNames((*_QKV, "out_proj")),
    "save_qkv_proj": KeptNames(_QKV),
    "save_out_proj": KeptNames(("out_proj",)),
    "qkv_proj_offloaded": KeptNames((), _QKV),
    "minimal_offloaded": KeptNames((EXCHANGED,), _PRODUCTS),
}


def kept(policy: RematPolicy, custom: RematConfig) -> KeptNames | None:
    """Return what a policy keeps by name; None where it does not go by names.

    Args:
        policy: `remat_policy`.
        custom: the tensors of "custom".
    """
    if policy != "custom":
        return _NAMED.get(policy)

    def named(where: Any) -> tuple[str, ...]:
        # The input waits on the device in any case, as the carry of the scan over layers.
        names = (n for n in custom.tensors(where) if (n, where) != (LAYER_INPUT, "device"))
        return tuple(EXCHANGED if name == "moe_exchanged" else name for name in names)

    return KeptNames(named("device"), named("offload"))


def remat(
    layer: Callable[..., Any], policy: RematPolicy, custom: RematConfig
) -> Callable[..., Any]:
    """Wrap the body of a scan over layers in rematerialisation.

    Args:
        layer: a function of arrays.
        policy: `remat_policy` of the configuration; "none" keeps everything.
        custom: the tensors of "custom".
    """
    if policy == "none":
        return layer
    # In a scan XLA cannot merge the recomputation away, so barriers against that are not needed.
    return jax.checkpoint(layer, policy=_policy(policy, custom), prevent_cse=False)


def _policy(policy: RematPolicy, custom: RematConfig) -> Callable[..., Any]:
    names = kept(policy, custom)
    if names is None:
        assert policy == "dots", f"{policy} keeps tensors by name"
        # Products without a batch dim, so not the experts': a common choice.
        return policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(ROUTING)
        )
    on_device = (ROUTING, *names.device)
    if not names.host:
        return policies.save_only_these_names(*on_device)
    return policies.save_and_offload_only_these_names(
        names_which_can_be_saved=list(on_device),
        names_which_can_be_offloaded=list(names.host),
        offload_src="device",
        offload_dst="pinned_host",
    )
