"""Balance experts without a loss: move a bias on each expert's score after every update.

Source: arXiv 2408.15664, as DeepSeek-V3 uses it (arXiv 2412.19437, section 2.1.2).
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_shard.config.model_config import ModelConfig
from moe_shard.models.cycles import all_stacks
from moe_shard.models.params import Params


def balanced(config: ModelConfig, params: Params, counts: Float[Array, "L E"]) -> Params:
    """Move the routers' correction biases one step towards balance.

    Args:
        config: the model; its `routed_bias_update_rate` is the step size.
        params: parameters after an update.
        counts: how often each expert was chosen in each MoE layer, over all sequences of that
            update; whole numbers.

    Returns:
        The parameters with new biases.
    """
    moe = config.moe
    if moe is None or moe.router.routed_bias_update_rate == 0:
        return params
    change = moe.router.routed_bias_update_rate * _direction(counts.astype(jnp.int32))
    kinds = config.all_layer_kinds
    index = {layer: i for i, layer in enumerate(n for n, kind in enumerate(kinds) if kind.moe)}
    moved = dict(params)
    for name, kind, layers in all_stacks(config):
        if kind.moe:
            of_stack = change[jnp.array([index[layer] for layer in layers])]
            moved[name] = _moved(params[name], of_stack)
    return moved


def bias_norms(config: ModelConfig, params: Params) -> dict[str, Float[Array, "L"]]:
    """Return the norm of each router's correction bias, as a metric; none where there is none."""
    found: dict[int, Float[Array, ""]] = {}
    for name, kind, layers in all_stacks(config):
        router = params[name]["mlp"]["router"] if kind.moe else {}
        if "correction_bias" in router:
            bias = router["correction_bias"].astype(jnp.float32)
            found |= zip(layers, jnp.sqrt(jnp.sum(jnp.square(bias), axis=1)), strict=True)
    if not found:
        return {}
    return {"router_bias_norm_by_layer": jnp.stack([found[layer] for layer in sorted(found)])}


def _direction(counts: Int[Array, "L E"]) -> Float[Array, "L E"]:
    """Return 1 for an expert below the mean load of its layer, -1 for one above, else 0.

    The comparison is in integers: a mean in float32 is rounded, and would move balanced experts.
    """
    mean, rest = jnp.divmod(jnp.sum(counts, axis=-1, keepdims=True), counts.shape[-1])
    too_few = (counts < mean) | ((counts == mean) & (rest > 0))
    return too_few.astype(jnp.float32) - (counts > mean).astype(jnp.float32)


def _moved(stack: Params, change: Float[Array, "L E"]) -> Params:
    """Add to the correction biases of a stack of MoE layers."""
    mlp, router = stack["mlp"], stack["mlp"]["router"]
    router = {**router, "correction_bias": router["correction_bias"] + change}
    return {**stack, "mlp": {**mlp, "router": router}}
