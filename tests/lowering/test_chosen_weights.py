"""Judge programs that choose weights by a routed index: for each token, or for each block."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_shard.lowering.reports import report_from_text

N, M, H, E, K = 256, 32, 64, 8, 2
Arrays = dict[str, jax.Array]


def loss(params: Arrays, x: jax.Array) -> jax.Array:
    """Gather the weights of each token's experts, as few lines of JAX can say it."""
    scores, chosen = jax.lax.top_k(jax.nn.softmax(x @ params["router"]), K)
    hidden = jax.nn.relu(jnp.einsum("nm,nkmh->nkh", x, params["up"][chosen]))
    return jnp.mean(jnp.einsum("nkh,nkhm,nk->nm", hidden, params["down"][chosen], scores) ** 2)


def compiled(experts: PartitionSpec) -> str:
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "expert"))

    def array(shape: tuple[int, ...], spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

    params = {
        "router": array((M, E), PartitionSpec()),
        "up": array((E, M, H), experts),
        "down": array((E, H, M), experts),
    }
    x = array((N, M), PartitionSpec(("data", "expert")))

    @partial(jax.jit, out_shardings={name: each.sharding for name, each in params.items()})
    def step(params: Arrays, x: jax.Array) -> Arrays:
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params, x))

    text = step.lower(params, x).compile().as_text()
    assert text is not None
    return text


@pytest.mark.parametrize(
    ("experts", "verdict"),
    [
        (PartitionSpec("expert"), "weight-gathered"),
        (PartitionSpec(), "no-expert-parallelism"),
    ],
    ids=["split", "whole"],
)
def test_weights_that_are_gathered_for_every_token(experts: PartitionSpec, verdict: str) -> None:
    report = report_from_text(compiled(experts), mesh={"data": 2, "expert": 4})
    assert report.verdict == verdict
    roles = {each.role for each in report.collectives if each.of_experts and each.bytes > 4096}
    assert roles == ({"weight-gather", "gradient-reduction"} if experts else {"gradient-reduction"})
