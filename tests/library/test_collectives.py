"""What a project keeps in its own tests: a change that gathers the experts' weights fails."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import moe_shard as ms


@pytest.mark.parametrize("explicit", [False, True])
def test_tokens_move_and_weights_do_not(explicit: bool) -> None:
    sharding = ms.Sharding(ms.make_mesh(data=2, expert=4, explicit=explicit))
    config = ms.MoEConfig(
        num_experts=8, num_experts_per_tok=2, moe_mlp_dim=64, moe_dispatch_no_expert_sharding=True
    )
    layer = ms.init_sharded(
        lambda rngs: ms.MoELayer(config, model_dim=32, sharding=sharding, rngs=rngs),
        rngs=nnx.Rngs(0),
    )

    def loss(layer: ms.MoELayer, x: jax.Array) -> jax.Array:
        y, _ = layer(x)
        return jnp.mean(y**2)

    x = jax.random.normal(jax.random.key(1), (8, 16, 32))
    compiled = jax.jit(nnx.grad(loss, argnums=(0, 1))).lower(layer, x).compile()
    ms.lowering.assert_collectives(compiled, axis="expert", all_to_all=4, all_gather=0)
    assert ms.lowering.verdict(compiled) == "expert-parallel"
