"""A small language model of one's own in Flax NNX, whose feed-forward layers are MoE layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

import moe_shard as ms

VOCAB, DIM, LAYERS, EXPERTS, HIDDEN = 64, 32, 2, 8, 64
# The default table, and a rule for the one name of this model that it does not have.
RULES = ms.RuleTable([*ms.RuleTable.default().rules, ("pair", ("tensor",))])
MOE = ms.MoEConfig(
    num_experts=EXPERTS,
    num_experts_per_tok=2,
    moe_mlp_dim=HIDDEN,
    moe_dispatch_no_expert_sharding=True,
)
TOKENS = ("activation_batch", "activation_length", None)
INIT = nnx.initializers.lecun_normal()


class Block(nnx.Module):
    """Mixes a token with the one before it, then sends it to two of eight experts."""

    def __init__(self, sharding: ms.Sharding, rngs: nnx.Rngs) -> None:
        self.sharding = sharding
        self.norm = nnx.LayerNorm(DIM, rngs=rngs)  # no names: replicated
        self.mix = nnx.Param(INIT(rngs.params(), (2 * DIM, DIM)), out_sharding=("pair", "embed"))
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.moe = ms.MoELayer(MOE, model_dim=DIM, sharding=sharding, rngs=rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, ms.MoEStats]:
        before = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        mix = self.sharding(self.mix[...], None, None, name="mix")  # whole where it is used
        x = x + jnp.concatenate([x, before], axis=-1) @ mix
        y, stats = self.moe(self.norm(x))
        return x + self.dropout(y), stats


class Model(nnx.Module):
    """Embeds, applies the blocks, and gives logits by the same table."""

    def __init__(self, sharding: ms.Sharding, rngs: nnx.Rngs) -> None:
        self.sharding = sharding
        table = nnx.with_partitioning(INIT, ("vocab", "embed"))
        self.embed = nnx.Embed(VOCAB, DIM, embedding_init=table, rngs=rngs)
        self.blocks = nnx.List([Block(sharding, rngs) for _ in range(LAYERS)])

    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, list[ms.MoEStats]]:
        table = self.sharding(self.embed.embedding[...], None, None, name="table")
        x = self.sharding(jax.nn.one_hot(tokens, VOCAB), *TOKENS, name="tokens") @ table
        every = []
        for block in self.blocks:
            x, stats = block(x)
            every.append(stats)
        return x @ table.T, every


def loss(model: Model, tokens: jax.Array) -> jax.Array:
    logits, every = model(tokens)
    targets = jax.nn.one_hot(jnp.roll(tokens, -1, axis=1), VOCAB)
    targets = model.sharding(targets, *TOKENS, name="targets")
    balance = sum(jnp.mean(stats.router_z_loss) for stats in every)
    return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * targets, axis=-1)) + 0.001 * balance


@nnx.jit
def step(model: Model, optimizer: nnx.Optimizer[Model], tokens: jax.Array) -> jax.Array:
    value, grads = nnx.value_and_grad(loss)(model, tokens)
    optimizer.update(model, grads)
    return value


def build(mesh: Mesh) -> Model:
    sharding = ms.Sharding(mesh, RULES)
    rngs = nnx.Rngs(params=0, dropout=1)
    return ms.init_sharded(lambda rngs: Model(sharding, rngs), rngs=rngs)
