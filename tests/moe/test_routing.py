"""Check the routers of published models, one token at a time: experts and combine weights.

The oracle below is written from the papers (DeepSeek-V2, arXiv 2405.04434, DeepSeek-V3, 2412.19437,
SparseMixer-v2, 2409.12136), in NumPy float64, and has no code in common with the package.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_shard.config.load import load_config
from moe_shard.config.moe_config import RouterConfig
from moe_shard.errors import UserError
from moe_shard.moe.router import Routing, route
from tests.moe.build import TINY
from tests.moe.test_capacity import LOGITS

assert TINY.model.moe is not None
PLAIN = TINY.model.moe.router
SCORES = ("softmax", "sigmoid", "sparsemixer")
TWO_GROUPS = {"n_routing_groups": 4, "topk_routing_group": 2}
GROUPED = [
    {},
    TWO_GROUPS | {"routing_group_score": "max"},
    TWO_GROUPS | {"routing_group_score": "top2_sum"},
]
every_score = pytest.mark.parametrize("score", SCORES)


def routed(
    logits: np.ndarray, k: int, correction: np.ndarray | None = None, **router: Any
) -> Routing:
    """Route tokens [T E] as one sequence, and fetch the result to the host."""
    found = route(
        jnp.array(logits[None], jnp.float32),
        k,
        config=replace(PLAIN, **router),
        correction=None if correction is None else jnp.array(correction, jnp.float32),
    )
    assert found.real is None
    return Routing(*(np.asarray(each)[0] for each in found[:-1]))


def softmax(u: np.ndarray) -> np.ndarray:
    e = np.exp(u - u.max())
    return e / e.sum()


def scores_of(logits: np.ndarray, config: RouterConfig) -> np.ndarray:
    return 1 / (1 + np.exp(-logits)) if config.routed_score_func == "sigmoid" else softmax(logits)


def chosen(ranked: np.ndarray, k: int, config: RouterConfig) -> list[int]:
    """Return one token's experts, best first, within its groups."""
    groups, kept = config.groups
    size = len(ranked) // groups
    allowed = list(range(len(ranked)))
    if kept < groups:
        best = [np.sort(ranked[g * size : (g + 1) * size])[::-1] for g in range(groups)]
        value = [b[0] if config.routing_group_score == "max" else b[0] + b[1] for b in best]
        inside = sorted(range(groups), key=lambda g: -value[g])[:kept]
        allowed = [e for e in range(len(ranked)) if e // size in inside]
    return sorted(allowed, key=lambda e: -ranked[e])[:k]


def sparse_weights(logits: np.ndarray, experts: list[int], jitter: float) -> np.ndarray:
    """Return a token's Phi-3.5-MoE weights: for each choice a softmax over the experts near it."""
    left = dict(enumerate(logits))
    weights = []
    for expert in experts:
        best = logits[expert]
        near = {e: u for e, u in left.items() if not (best - u) / max(abs(u), best) > 2 * jitter}
        weights.append(np.exp(best) / sum(np.exp(u) for u in near.values()))
        del left[expert]
    return np.array(weights)


def weights_of(logits: np.ndarray, experts: list[int], config: RouterConfig) -> np.ndarray:
    if config.routed_score_func == "sparsemixer":
        weights = sparse_weights(logits, experts, config.sparsemixer_jitter)
    else:
        weights = scores_of(logits, config)[experts]
    if config.norm_topk_prob:
        weights = weights / weights.sum()
    return weights * config.routed_scaling_factor


def tokens(count: int = 64, experts: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, experts)).astype(np.float32)


@every_score
@pytest.mark.parametrize("groups", GROUPED, ids=["all", "max", "top2"])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_choice_and_weights_are_the_oracles(
    score: str, groups: dict[str, Any], normed: bool, k: int
) -> None:
    # The jitter is so wide that about half of the experts are in one softmax.
    fields: dict[str, Any] = {
        "routed_score_func": score, "norm_topk_prob": normed, "routed_scaling_factor": 2.5,
        "sparsemixer_jitter": 0.4, **groups,
    }  # fmt: skip
    logits, config = tokens(), replace(PLAIN, **fields)
    correction = np.array([0.3, -0.2, 0.1, 0, -0.3, 0.2, 0, -0.1], np.float32)
    found = routed(logits, k, correction, **fields)
    for token, u in enumerate(logits.astype(np.float64)):
        experts = chosen(scores_of(u, config) + correction, k, config)
        assert found.indices[token].tolist() == experts
        np.testing.assert_allclose(
            found.weights[token], weights_of(u, experts, config), rtol=1e-5, atol=1e-7
        )
        shares = scores_of(u, config)
        np.testing.assert_allclose(found.probs[token], shares / shares.sum(), rtol=1e-5)
    np.testing.assert_array_equal(found.logits, logits)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("balance", ["softmax", "ranked", "logits"])
def test_the_balance_loss_may_take_a_softmax_for_probabilities(score: str, balance: str) -> None:
    fields: dict[str, Any] = {"routed_score_func": score, "load_balance_probs": balance}
    logits, config = tokens(), replace(PLAIN, **fields)
    correction = np.array([0.3, -0.2, 0.1, 0, -0.3, 0.2, 0, -0.1], np.float32)
    found = routed(logits, 2, correction, **fields)
    for token, u in enumerate(logits.astype(np.float64)):
        of = {"softmax": scores_of(u, config), "logits": u}.get(balance)
        of = scores_of(u, config) + correction if of is None else of
        np.testing.assert_allclose(found.probs[token], softmax(of), rtol=1e-5)
    plain = routed(logits, 2, correction, routed_score_func=score)
    np.testing.assert_array_equal(found.weights, plain.weights)


@every_score
@pytest.mark.parametrize("normed", [True, False])
def test_gradients_of_the_weights_are_those_of_finite_differences(score: str, normed: bool) -> None:
    fields: dict[str, Any] = {
        "routed_score_func": score,
        "norm_topk_prob": normed,
        "sparsemixer_jitter": 0.4,
    }
    logits, config = tokens(6, 8, seed=3), replace(PLAIN, **fields)
    cotangent = np.random.default_rng(1).standard_normal((6, 2))

    def loss(logits: jax.Array) -> jax.Array:
        return jnp.sum(route(logits[None], 2, config=config).weights * cotangent)

    def by_hand(logits: np.ndarray) -> float:
        return sum(
            float(weights_of(u, chosen(scores_of(u, config), 2, config), config) @ c)
            for u, c in zip(logits, cotangent, strict=True)
        )

    found = np.asarray(jax.grad(loss)(jnp.array(logits)))
    wide, step = logits.astype(np.float64), 1e-6
    for at in np.ndindex(*logits.shape):
        above, below = wide.copy(), wide.copy()
        above[at] += step
        below[at] -= step
        expected = (by_hand(above) - by_hand(below)) / (2 * step)
        np.testing.assert_allclose(found[at], expected, rtol=1e-4, atol=1e-6)


@every_score
def test_a_scaling_factor_scales_the_weights_and_nothing_else(score: str) -> None:
    plain = routed(tokens(), 2, routed_score_func=score)
    scaled = routed(tokens(), 2, routed_score_func=score, routed_scaling_factor=2.5)
    np.testing.assert_array_equal(scaled.indices, plain.indices)
    np.testing.assert_array_equal(scaled.probs, plain.probs)
    np.testing.assert_allclose(scaled.weights, 2.5 * plain.weights, rtol=1e-7)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_a_correction_bias_chooses_and_never_weighs(score: str) -> None:
    fields: dict[str, Any] = {"routed_score_func": score, "norm_topk_prob": False}
    plain = routed(LOGITS, 2, **fields)
    corrected = routed(LOGITS, 2, np.array([9.0, 0, 0, 0]), **fields)
    assert (corrected.indices[:, 0] == 0).all()
    assert (plain.indices[:, 0] != 0).all()
    config = replace(PLAIN, **fields)
    for token, experts in enumerate(corrected.indices):
        expected = scores_of(LOGITS[token].astype(np.float64), config)[experts]
        np.testing.assert_allclose(corrected.weights[token], expected, rtol=1e-6)
    np.testing.assert_array_equal(corrected.probs, plain.probs)


def test_no_gradient_reaches_the_correction_bias() -> None:
    def loss(correction: jax.Array) -> jax.Array:
        found = route(jnp.array(LOGITS[None]), 2, config=PLAIN, correction=correction)
        return jnp.sum(found.weights**2) + jnp.sum(found.probs**2)

    assert not jax.grad(loss)(jnp.zeros(4)).any()


def test_groups_are_ranked_by_their_best_or_by_their_best_two() -> None:
    # Group 0 has the best expert and no other good one; one of the two groups is kept.
    logits = np.array([[3.0, -9, -9, 2, 2, -9]])
    one_of_two: dict[str, Any] = {
        "n_routing_groups": 2,
        "topk_routing_group": 1,
        "routed_score_func": "sigmoid",
    }
    by_best = routed(logits, 2, **one_of_two, routing_group_score="max")
    by_two = routed(logits, 2, **one_of_two, routing_group_score="top2_sum")
    assert by_best.indices.tolist() == [[0, 1]]  # ties go to the first
    assert by_two.indices.tolist() == [[3, 4]]


def test_at_most_the_kept_groups_are_chosen_from_even_with_scores_below_zero() -> None:
    # A correction that makes every score negative: what is outside must not look better than that.
    logits = tokens(256)
    for score in ("softmax", "sigmoid"):
        found = routed(logits, 4, np.full(8, -5.0), routed_score_func=score, **TWO_GROUPS)
        groups = [set(row) for row in (found.indices // 2).tolist()]
        assert all(len(each) == 2 for each in groups)
        assert len(set.union(*groups)) == 4


def test_one_expert_a_group_has_no_best_two() -> None:
    keys = ["n_routing_groups=8", "topk_routing_group=4", "routing_group_score=top2_sum"]
    with pytest.raises(UserError, match="leaves one expert a group"):
        load_config("mixtral-tiny", keys)


@pytest.mark.parametrize("normed", [True, False])
def test_sigmoids_that_are_all_zero_are_no_reason_for_nan(normed: bool) -> None:
    logits = np.full((1, 4), -200.0)
    found = routed(logits, 2, routed_score_func="sigmoid", norm_topk_prob=normed)
    assert not found.weights.any()
    assert not found.probs.any()
    config = replace(PLAIN, routed_score_func="sigmoid", norm_topk_prob=normed)

    def loss(logits: jax.Array) -> jax.Array:
        found = route(logits, 2, config=config)
        return 1e6 * (jnp.sum(found.weights) + jnp.sum(found.probs * jnp.arange(4)))

    assert np.isfinite(jax.grad(loss)(jnp.array(logits[None]))).all()


@pytest.mark.parametrize(
    ("logits", "weights"),
    [
        # Jitter 0.01: scores within 2 % of the best are in its softmax. 0.99 is, 0.97 is not; once
        # 1.0 is chosen, 0.97 is 2.02 % below 0.99.
        ([1.0, 0.99, 0.97, 0.5], [1 / (1 + np.exp(-0.01)), 1.0]),
        # Below zero the distance is relative to the other's size: -1.02 is 1.96 % off, -1.03 2.9 %.
        ([-1.03, -1.0, -1.02, -5.0], [1 / (1 + np.exp(-0.02)), 1 / (1 + np.exp(-0.01))]),
    ],
)
def test_sparsemixer_by_hand(logits: list[float], weights: list[float]) -> None:
    found = routed(
        np.array([logits]), 2, routed_score_func="sparsemixer", norm_topk_prob=False,
        sparsemixer_jitter=0.01,
    )  # fmt: skip
    np.testing.assert_allclose(found.weights[0], weights, rtol=1e-5)
