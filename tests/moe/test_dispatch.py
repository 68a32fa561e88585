"""Copy tokens into capacity slots and back, without a mesh."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_shard.moe.by_capacity import ByCapacity
from moe_shard.moe.dispatch.einsum import Einsum
from moe_shard.moe.dispatch.gather import Gather
from moe_shard.moe.slots import Slots, assign_slots

# Dispatch and combine need none of the layer's other attributes.
STRATEGIES: dict[str, ByCapacity] = {
    "einsum": object.__new__(Einsum),
    "gather": object.__new__(Gather),
}
EXPERTS = 4
every_strategy = pytest.mark.parametrize("name", sorted(STRATEGIES))


def routing(
    rows: int, tokens: int, k: int, capacity: int, seed: int = 0
) -> tuple[np.ndarray, Slots]:
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.ones(EXPERTS), size=(rows, tokens)).astype(np.float32)
    indices = np.argsort(-probs, axis=-1)[..., :k]
    return indices, assign_slots(jnp.array(indices), jnp.array(probs), capacity=capacity)


@every_strategy
@pytest.mark.parametrize("k", [1, 2, 4])
def test_combine_undoes_dispatch_k_times_over(name: str, k: int) -> None:
    x = jax.random.normal(jax.random.key(k), (2, 6, 8))
    _, slots = routing(2, 6, k, capacity=6)  # nothing is dropped
    strategy = STRATEGIES[name]
    by_expert = strategy.dispatch(x, slots, EXPERTS)
    assert by_expert.shape == (EXPERTS, 2, 6, 8)
    y = strategy.combine(by_expert, jnp.ones((2, 6, k)), slots)
    np.testing.assert_allclose(y, k * x, rtol=1e-6)


@every_strategy
def test_an_empty_slot_is_zero(name: str) -> None:
    x = 1 + jnp.abs(jax.random.normal(jax.random.key(0), (2, 6, 8)))
    indices, slots = routing(2, 6, 2, capacity=4)
    filled = np.abs(STRATEGIES[name].dispatch(x, slots, EXPERTS)).min(axis=-1) > 0
    counts = [[(indices[row] == e).sum() for row in range(2)] for e in range(EXPERTS)]
    np.testing.assert_array_equal(filled.sum(axis=-1), np.minimum(counts, 4))


def large_terms() -> tuple[jax.Array, Slots]:
    """Return expert outputs 1e20, 1, -1e20 in a token's order of choice, and its slots."""
    indices = jnp.array([[[2, 0, 1]]])
    slots = assign_slots(indices, jnp.full((1, 1, 3), 1 / 3), capacity=1)
    return jnp.array([1.0, -1e20, 1e20]).reshape(3, 1, 1, 1), slots


def test_gather_sums_in_slot_order() -> None:
    # (1e20 + 1) - 1e20 = 0 in float32. In expert order, (1 - 1e20) + 1e20, it would be 0 as well,
    # so the other orders are tried too: only the one that adds 1 last may give 1.
    y, slots = large_terms()
    combine = jax.jit(STRATEGIES["gather"].combine)
    assert combine(y, jnp.ones((1, 1, 3)), slots).item() == 0
    indices = jnp.array([[[2, 1, 0]]])
    last = assign_slots(indices, jnp.full((1, 1, 3), 1 / 3), capacity=1)
    assert combine(y, jnp.ones((1, 1, 3)), last).item() == 1


@every_strategy
@pytest.mark.parametrize("capacity", [2, 6])
def test_gradients_are_those_of_a_naive_dense_layer(name: str, capacity: int) -> None:
    rows, tokens, k, dim = 2, 6, 2, 5
    indices, slots = routing(rows, tokens, k, capacity)
    kept = np.asarray(slots.has_slot())
    assert kept.all() == (capacity == 6)
    keys = jax.random.split(jax.random.key(3), 4)
    x = jax.random.normal(keys[0], (rows, tokens, dim))
    weights = jax.random.uniform(keys[1], (rows, tokens, k))
    kernel = jax.random.normal(keys[2], (EXPERTS, dim, dim))
    cotangent = jax.random.normal(keys[3], (rows, tokens, dim))

    def dense(x: jax.Array, weights: jax.Array, kernel: jax.Array) -> jax.Array:
        y = jnp.tanh(jnp.einsum("bsm,emn->bsen", x, kernel))
        share = jnp.einsum("bsk,bske->bse", weights * kept, jax.nn.one_hot(indices, EXPERTS))
        return jnp.sum(cotangent * jnp.einsum("bse,bsen->bsn", share, y))

    def sparse(x: jax.Array, weights: jax.Array, kernel: jax.Array) -> jax.Array:
        by_expert = STRATEGIES[name].dispatch(x, slots, EXPERTS)
        y = jnp.tanh(jnp.einsum("ebcm,emn->ebcn", by_expert, kernel))
        return jnp.sum(cotangent * STRATEGIES[name].combine(y, weights, slots))

    expected = jax.value_and_grad(dense, argnums=(0, 1, 2))(x, weights, kernel)
    found = jax.value_and_grad(sparse, argnums=(0, 1, 2))(x, weights, kernel)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected
    )


@every_strategy
def test_narrow_dtypes_are_summed_in_float32(name: str) -> None:
    # 256 + 1 + 1 in bfloat16 stays 256 at each step; in float32 it is 258, which bfloat16 holds.
    indices = jnp.array([[[0, 1, 2]]])
    slots = assign_slots(indices, jnp.full((1, 1, 3), 1 / 3), capacity=1)
    y = jnp.array([256, 1, 1], jnp.bfloat16).reshape(3, 1, 1, 1)
    found = STRATEGIES[name].combine(y, jnp.ones((1, 1, 3)), slots)
    assert found.dtype == jnp.bfloat16
    assert found.item() == 258
