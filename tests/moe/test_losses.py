"""Check the auxiliary losses against published numbers and numbers worked out by hand."""

from __future__ import annotations

from itertools import chain

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_shard.config.moe_config import LoadBalanceLoss
from moe_shard.moe.losses import (
    expert_counts,
    load_balance_loss,
    mean_over_sequences,
    mean_over_tokens,
    router_z_loss,
)
from moe_shard.moe.router import top_k_indices
from tests.moe.oracle import load_balance_rows, top_k
from tests.moe.test_capacity import LOGITS, PROBS


def load_balance(
    probs: jax.Array, indices: np.ndarray, convention: LoadBalanceLoss, experts: int
) -> jax.Array:
    """Return the loss of routing [L B S E] and choices [L B S K]."""
    counts = jnp.stack([expert_counts(jnp.array(layer), experts) for layer in indices])
    tokens, k = indices.shape[-2:]
    means = jnp.mean(probs, axis=2)
    return load_balance_loss(means, counts, tokens=tokens, k=k, convention=convention)


def loss(probs: np.ndarray, k: int, convention: LoadBalanceLoss) -> float:
    """Return the loss of one layer's routing [B S E]."""
    indices = np.asarray(top_k_indices(jnp.array(probs), k))
    return float(load_balance(jnp.array(probs[None]), indices[None], convention, probs.shape[-1]))


def one_hot_rows(*experts: int) -> np.ndarray:
    return np.eye(4, dtype=np.float32)[list(experts)][None]


@pytest.mark.parametrize(("k", "expected"), [(2, 1.03342), (1, 1.06684)])
def test_the_published_example(k: int, expected: float) -> None:
    np.testing.assert_allclose(loss(PROBS[None], k, "gshard"), expected, atol=5e-6)
    np.testing.assert_allclose(loss(PROBS[None], k, "huggingface"), k * expected, atol=1e-5)
    # With one sequence, the mean over sequences is the mean over the batch.
    np.testing.assert_allclose(loss(PROBS[None], k, "maxtext"), k * expected, atol=1e-5)


@pytest.mark.parametrize("convention", ["maxtext", "sequence", "gshard", "huggingface"])
def test_balanced_is_one_and_collapsed_is_the_number_of_experts(
    convention: LoadBalanceLoss,
) -> None:
    np.testing.assert_allclose(loss(one_hot_rows(0, 1, 2, 3), 1, convention), 1)
    np.testing.assert_allclose(loss(one_hot_rows(2, 2, 2, 2), 1, convention), 4)


def test_only_maxtexts_is_local_to_a_row() -> None:
    # Each sequence chooses one expert for all its tokens; the whole batch is balanced.
    probs = np.concatenate([one_hot_rows(e, e, e) for e in range(4)])
    np.testing.assert_allclose(loss(probs, 1, "maxtext"), 4)
    np.testing.assert_allclose(loss(probs, 1, "gshard"), 1)


@pytest.mark.parametrize("convention", ["maxtext", "sequence", "gshard", "huggingface"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_values_and_gradients_are_the_oracles(convention: LoadBalanceLoss, k: int) -> None:
    rng = np.random.default_rng(k)
    probs = rng.dirichlet(np.ones(5), size=(3, 7))
    indices = np.array([[top_k(p, k) for p in row] for row in probs])
    counts = np.array([np.bincount(row.ravel(), minlength=5) for row in indices])
    expected, expected_grad = load_balance_rows(probs, counts, k, convention)
    np.testing.assert_array_equal(expert_counts(jnp.array(indices), 5), counts)

    def mean(probs: jax.Array) -> jax.Array:
        return load_balance(probs[None], indices[None], convention, 5)

    found_grad = jax.grad(mean)(jnp.array(probs, jnp.float32))
    np.testing.assert_allclose(loss(probs, k, convention), expected.mean(), rtol=1e-6)
    np.testing.assert_allclose(found_grad, expected_grad, rtol=1e-5)


@pytest.mark.parametrize("convention", ["maxtext", "sequence", "gshard", "huggingface"])
def test_padding_has_no_part_in_any_loss(convention: LoadBalanceLoss) -> None:
    """Two layers and three sequences of unlike lengths, against sums over their tokens by hand."""
    rng = np.random.default_rng(0)
    lengths, experts, k = [7, 2, 5], 5, 2
    probs = rng.dirichlet(np.ones(experts), size=(2, 3, 7))
    chosen = np.argsort(-probs, axis=-1)[..., :k]
    real = np.arange(7) < np.array(lengths)[:, None]
    counts = jnp.stack([expert_counts(jnp.where(real[..., None], c, experts), experts)
                        for c in jnp.array(chosen)])  # fmt: skip
    means = jnp.stack([mean_over_tokens(p, jnp.array(real)) for p in jnp.array(probs)])
    found = load_balance_loss(means, counts, tokens=jnp.array([lengths, lengths]), k=k,
                              convention=convention)  # fmt: skip

    def one(tokens: list[tuple[np.ndarray, np.ndarray]]) -> float:
        """Return E times the sum of mean probability times choices per token."""
        mean = np.mean([p for p, _ in tokens], axis=0)
        choices = np.bincount(np.concatenate([c for _, c in tokens]), minlength=experts)
        return float(experts * np.sum(mean * choices / len(tokens)))

    each = [[[(probs[layer, row, at], chosen[layer, row, at]) for at in range(lengths[row])]
             for row in range(3)] for layer in range(2)]  # fmt: skip
    by_sequence = [one(row) for layer in each for row in layer]
    by_layer = [one(list(chain(*layer))) for layer in each]
    expected = {
        "maxtext": by_sequence,
        "sequence": [value / k for value in by_sequence],
        "gshard": [value / k for value in by_layer],
        "huggingface": [one(list(chain(*chain(*each))))],
    }
    np.testing.assert_allclose(found, np.mean(expected[convention]), rtol=1e-6)


def test_the_z_loss_of_tokens_that_are_not_padding() -> None:
    logits = np.stack([LOGITS, LOGITS[::-1]])
    real = np.arange(len(LOGITS)) < np.array([[2], [3]])
    squares = np.log(np.exp(logits).sum(axis=-1)) ** 2
    rows = router_z_loss(jnp.array(logits), jnp.array(real))
    np.testing.assert_allclose(rows, [squares[0, :2].mean(), squares[1, :3].mean()], rtol=1e-6)
    mean = mean_over_sequences(rows[None], jnp.array([[2, 3]]))
    np.testing.assert_allclose(mean, [squares[real].mean()], rtol=1e-6)


def test_z_loss_is_the_mean_square_of_log_z() -> None:
    expected = np.mean(np.log(np.exp(LOGITS).sum(axis=1)) ** 2)
    np.testing.assert_allclose(router_z_loss(jnp.array(LOGITS[None])), [expected], rtol=1e-6)
    # Scores of 1000 overflow exp in float32; the loss must not.
    np.testing.assert_allclose(router_z_loss(jnp.full((1, 2, 1), 1000.0)), [1e6])


def test_layers_together_and_one_by_one() -> None:
    # One layer uses experts 0 and 1 only, the other 2 and 3: only both together are balanced.
    layers = np.stack([one_hot_rows(0, 1, 0, 1), one_hot_rows(2, 3, 2, 3)])
    indices = np.argmax(layers, axis=-1)[..., None]

    def of(convention: LoadBalanceLoss) -> float:
        return float(load_balance(jnp.array(layers), indices, convention, 4))

    assert (of("huggingface"), of("gshard"), of("maxtext")) == (1, 2, 2)
