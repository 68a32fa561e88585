"""Check the router's choice against sorting, and its weights against the definition."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_shard.config.moe_config import RouterConfig, ScoreFunction
from moe_shard.moe.router import Router, route, top_k_indices
from tests.moe.build import TINY
from tests.moe.test_capacity import LOGITS, PROBS

assert TINY.model.moe is not None
NORMED = TINY.model.moe.router
RAW = replace(NORMED, norm_topk_prob=False)


@settings(max_examples=100)
@given(
    st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=30, max_size=30),
    st.sampled_from([1, 2, 3, 5]),
)
def test_top_k_is_a_stable_sort_ties_included(values: list[float], k: int) -> None:
    scores = np.array(values, np.float32).reshape(2, 3, 5)
    expected = np.argsort(-scores, axis=-1, kind="stable")[..., :k]
    np.testing.assert_array_equal(top_k_indices(jnp.array(scores), k), expected)


@pytest.mark.parametrize("scores", [[0.0, 0.0, 1.0], [0.0] * 3, [-np.inf, -np.inf, 0.0]])
def test_top_k_never_chooses_an_expert_twice(scores: list[float]) -> None:
    # Probabilities of unlikely experts underflow to 0; they are still different experts.
    found = top_k_indices(jnp.array([[scores]]), 3)
    assert sorted(np.asarray(found).ravel().tolist()) == [0, 1, 2]


def test_weights_are_the_chosen_probabilities() -> None:
    routing = route(jnp.array(LOGITS[None]), 2, config=RAW)
    np.testing.assert_array_equal(routing.indices[0], [[3, 1], [1, 0], [2, 3], [3, 2]])
    expected = np.take_along_axis(PROBS, np.asarray(routing.indices[0]), axis=1)
    np.testing.assert_allclose(routing.weights[0], expected, rtol=1e-6)
    np.testing.assert_allclose(routing.probs[0], PROBS, rtol=1e-6)


def test_renormalised_weights_sum_to_one_and_keep_their_ratio() -> None:
    raw = route(jnp.array(LOGITS[None]), 2, config=RAW).weights
    weights = route(jnp.array(LOGITS[None]), 2, config=NORMED).weights
    np.testing.assert_allclose(jnp.sum(weights, axis=-1), 1, rtol=1e-6)
    np.testing.assert_allclose(weights[..., 0] / weights[..., 1], raw[..., 0] / raw[..., 1], 1e-6)


def test_an_epsilon_is_part_of_the_sum() -> None:
    raw = np.asarray(route(jnp.array(LOGITS[None]), 2, config=RAW).weights, np.float64)
    config = replace(NORMED, norm_topk_epsilon=0.25)
    weights = route(jnp.array(LOGITS[None]), 2, config=config).weights
    np.testing.assert_allclose(weights, raw / (raw.sum(-1, keepdims=True) + 0.25), rtol=1e-6)


def test_one_renormalised_expert_teaches_the_router_nothing() -> None:
    # p / p = 1 for every p. This is why Switch does not renormalise.
    def weight(logits: jax.Array, config: RouterConfig) -> jax.Array:
        return jnp.sum(route(logits, 1, config=config).weights)

    logits = jnp.array(LOGITS[None])
    normed, raw = (jax.grad(partial(weight, config=config))(logits) for config in (NORMED, RAW))
    np.testing.assert_allclose(normed, 0, atol=1e-6)
    assert np.abs(raw).max() > 0.1


def test_scores_are_float32_whatever_comes_in() -> None:
    routing = route(jnp.array(LOGITS[None], jnp.bfloat16), 2, config=NORMED)
    assert routing.probs.dtype == routing.weights.dtype == jnp.float32


def test_the_routers_product_is_at_the_highest_precision() -> None:
    # On an accelerator the default would round both operands to bfloat16; a CPU's results hide it.
    router = Router(model_dim=4, num_experts=4, k=2, config=NORMED, rngs=nnx.Rngs(0))
    jaxpr = jax.make_jaxpr(lambda x: router(x).logits)(jnp.ones((1, 2, 4), jnp.bfloat16)).jaxpr
    (product,) = (each for each in jaxpr.eqns if each.primitive.name == "dot_general")
    assert product.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2
    assert [each.aval.dtype for each in product.invars] == [jnp.float32] * 2


@pytest.mark.parametrize(
    ("score", "logits"),
    [("softmax", [0.0, 1e-8, -3.0, 1e-9]), ("sigmoid", [20.0, 21.0, 1.0, 30.0])],
)
def test_experts_are_ranked_by_score_where_scores_round_to_one_value(
    score: ScoreFunction, logits: list[float]
) -> None:
    # The logits differ, their scores in float32 do not, and ties go to the first.
    values = np.array(logits, np.float32)
    chosen = values[[0, 1, 3]]
    exp = np.exp(chosen - chosen.max()) if score == "softmax" else 1 / (1 + np.exp(-chosen))
    assert len(set(chosen)) == 3
    assert len(set(exp.astype(np.float32))) == 1
    config = replace(RAW, routed_score_func=score)
    routing = route(jnp.array(values[None, None]), 2, config=config)
    assert routing.indices[0, 0].tolist() == [0, 1]
