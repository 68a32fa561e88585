"""A Linen model with a MoE layer in it, through Flax's own bridge."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from jax.sharding import Mesh

import moe_shard as ms

VOCAB, DIM, EXPERTS, HIDDEN = 64, 32, 8, 64
MOE = ms.MoEConfig(
    num_experts=EXPERTS,
    num_experts_per_tok=2,
    moe_mlp_dim=HIDDEN,
    moe_dispatch_no_expert_sharding=True,
)
TOKENS = ("activation_batch", "activation_length", None)


class Model(nn.Module):
    """A table, a MoE layer, and logits by the same table."""

    sharding: ms.Sharding

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("vocab", "embed"))
        stored: Any = self.param("table", init, (VOCAB, DIM))
        table = self.sharding(stored, None, None, name="table")  # whole where it is used
        x = self.sharding(jax.nn.one_hot(tokens, VOCAB), *TOKENS, name="tokens") @ table
        moe = nnx.bridge.to_linen(
            ms.MoELayer, MOE, model_dim=DIM, sharding=self.sharding, name="moe"
        )
        y, _ = moe(nn.LayerNorm()(x))
        return (x + y) @ table.T


def build(mesh: Mesh) -> tuple[Model, Any]:
    sharding = ms.Sharding(mesh)
    model = Model(sharding)
    variables = ms.init_sharded(
        lambda rngs: model.init(rngs.params(), jnp.zeros((8, 16), jnp.int32)),
        rngs=nnx.Rngs(0),
        sharding=sharding,
    )
    return model, variables


def loss(model: Model, variables: Any, tokens: jax.Array) -> jax.Array:
    logits: Any = model.apply(variables, tokens)
    targets = jax.nn.one_hot(jnp.roll(tokens, -1, axis=1), VOCAB)
    targets = model.sharding(targets, *TOKENS, name="targets")
    return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * targets, axis=-1))
