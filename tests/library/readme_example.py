"""One MoE layer whose experts live on four devices each half: tokens move, weights do not."""

import jax
import jax.numpy as jnp
from flax import nnx

import moe_shard as ms

mesh = ms.make_mesh(data=2, expert=4)
sharding = ms.Sharding(mesh, ms.RuleTable.default())
config = ms.MoEConfig(
    num_experts=8, num_experts_per_tok=2, moe_mlp_dim=512, moe_dispatch_no_expert_sharding=True
)
layer = ms.init_sharded(  # parameters are created where they live
    lambda rngs: ms.MoELayer(config, model_dim=256, sharding=sharding, rngs=rngs),
    rngs=nnx.Rngs(0),
)


def loss(layer: ms.MoELayer, x: jax.Array) -> jax.Array:
    y, stats = layer(x)
    return jnp.mean(y**2) + 0.001 * jnp.mean(stats.router_z_loss)


x = jax.random.normal(jax.random.key(1), (8, 64, 256))  # batch, sequence, model dim
compiled = jax.jit(nnx.grad(loss, argnums=(0, 1))).lower(layer, x).compile()
print(ms.lowering.report(compiled))  # every collective, and the verdict
ms.lowering.assert_collectives(compiled, axis="expert", all_to_all=4, all_gather=0)
