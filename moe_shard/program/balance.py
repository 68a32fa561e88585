"""Balance without a loss: a bias on each expert's score, moved after every update.

Source: arXiv 2408.15664, as DeepSeek-V3 uses it (arXiv 2412.19437, section 2.1.2).
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_shard.config.model_config import ModelConfig
from moe_shard.models.cycles import stacks_of
from moe_shard.models.params import Params


def balanced(config: ModelConfig, params: Params, counts: Float[Array, "L E"]) -> Params:
    """Parameters with the correction biases a step nearer to balance.

    Args:
        config: the model; its `routed_bias_update_rate` is the step.
        params: after an update.
        counts: choices of each expert in each MoE layer, of all rows of that update; whole numbers.
    """
    moe = config.moe
    if moe is None or moe.router.routed_bias_update_rate == 0:
        return params
    change = moe.router.routed_bias_update_rate * _direction(counts.astype(jnp.int32))
    kinds = config.layer_kinds
    row = {layer: i for i, layer in enumerate(n for n, kind in enumerate(kinds) if kind.moe)}
    moved = dict(params)
    for name, kind, layers in stacks_of(kinds):
        if kind.moe:
            of_stack = change[jnp.array([row[layer] for layer in layers])]
            moved[name] = _moved(params[name], of_stack)
    return moved


def _direction(counts: Int[Array, "L E"]) -> Float[Array, "L E"]:
    """1 for an expert with less than the mean of its layer, -1 for one with more, else 0.

    In whole numbers: a mean in float32 is not quite the number of which it is the mean, and experts
    in balance would move.
    """
    mean, rest = jnp.divmod(jnp.sum(counts, axis=-1, keepdims=True), counts.shape[-1])
    too_few = (counts < mean) | ((counts == mean) & (rest > 0))
    return too_few.astype(jnp.float32) - (counts > mean).astype(jnp.float32)


def _moved(stack: Params, change: Float[Array, "L E"]) -> Params:
    """A stack of MoE layers with its routers' biases moved."""
    mlp, router = stack["mlp"], stack["mlp"]["router"]
    router = {**router, "correction_bias": router["correction_bias"] + change}
    return {**stack, "mlp": {**mlp, "router": router}}
