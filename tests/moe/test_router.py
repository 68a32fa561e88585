"""The router's choice and weights, against sorting and against the definition."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_shard.config.moe_config import RouterConfig
from moe_shard.moe.router import route, top_k_indices
from tests.moe.build import TINY
from tests.moe.test_capacity import LOGITS, PROBS

assert TINY.model.moe is not None
NORMED = TINY.model.moe.router
RAW = replace(NORMED, norm_topk_prob=False)


@settings(max_examples=100, deadline=None)
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
    # Probabilities of experts far behind underflow to 0; they are still different experts.
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


def test_one_renormalised_expert_teaches_the_router_nothing() -> None:
    # p / p = 1 whatever p is. Switch does not renormalise for that reason.
    def weight(logits: jax.Array, config: RouterConfig) -> jax.Array:
        return jnp.sum(route(logits, 1, config=config).weights)

    logits = jnp.array(LOGITS[None])
    normed, raw = (jax.grad(partial(weight, config=config))(logits) for config in (NORMED, RAW))
    np.testing.assert_allclose(normed, 0, atol=1e-6)
    assert np.abs(raw).max() > 0.1


def test_scores_are_float32_whatever_comes_in() -> None:
    routing = route(jnp.array(LOGITS[None], jnp.bfloat16), 2, config=NORMED)
    assert routing.probs.dtype == routing.weights.dtype == jnp.float32
