"""Compare sampling with NumPy: which tokens are allowed, how often, and for which sequence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_shard.config import load_config
from moe_shard.config.generate_config import GenerateConfig
from moe_shard.inference.sampling import keep_nucleus, keep_top_k, next_tokens

LOGITS = np.array([0.3, 2.0, -1.0, 1.2, 0.9, -4.0])
DRAWS = 20_000
STRATEGIES: dict[str, dict[str, float]] = {
    "weighted": {},
    "topk": {"top_k": 3},
    "nucleus": {"nucleus_p": 0.75},
    "composite": {"top_k": 4, "nucleus_p": 0.9},
}


def config(strategy: str, temperature: float = 1.0, **sizes: float) -> GenerateConfig:
    names = {"top_k": "decode_sampling_top_k", "nucleus_p": "decode_sampling_nucleus_p"}
    overrides = [f"{names[name]}={value}" for name, value in sizes.items()]
    overrides += [
        f"decode_sampling_strategy={strategy}",
        f"decode_sampling_temperature={temperature}",
    ]
    return load_config("mixtral-tiny", overrides).generate


def kept_top_k(logits: np.ndarray, k: float) -> list[int]:
    """Return the kept tokens, one by one: one is kept unless k tokens are more probable."""
    return [t for t in range(len(logits)) if sum(logits > logits[t]) < k]


def kept_nucleus(logits: np.ndarray, p: float) -> list[int]:
    """Return the kept tokens, one by one: one is kept unless the more probable ones sum to p."""
    share = np.exp(logits - logits.max())
    share /= share.sum()
    return [t for t in range(len(logits)) if share[logits > logits[t]].sum() < p]


def probabilities(temperature: float, sizes: dict[str, float]) -> np.ndarray:
    logits = LOGITS / temperature
    for name, keep in (("top_k", kept_top_k), ("nucleus_p", kept_nucleus)):
        if name in sizes:
            kept = keep(logits, sizes[name])
            logits = np.array([x if t in kept else -np.inf for t, x in enumerate(logits)])
    weights = np.exp(logits)
    return weights / weights.sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_how_often_each_token_is_drawn(strategy: str, temperature: float) -> None:
    sizes = STRATEGIES[strategy]
    expected = DRAWS * probabilities(temperature, sizes)
    logits = jnp.broadcast_to(jnp.array(LOGITS, jnp.float32), (DRAWS, len(LOGITS)))
    drawn = next_tokens(logits, jax.random.key(3), config(strategy, temperature, **sizes))
    found = np.bincount(np.asarray(drawn), minlength=len(LOGITS))
    assert (found[expected == 0] == 0).all()
    likely = expected > 0
    # Chi-squared; with at most 5 degrees of freedom 99.9 % of correct draws are below 20.5.
    assert np.sum((found - expected)[likely] ** 2 / expected[likely]) < 20.5


@pytest.mark.parametrize("vocab", [1, 7, 50])
def test_what_may_be_drawn(vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    logits = rng.choice(rng.normal(size=vocab), (8, vocab)).astype(np.float32)  # with ties
    for k in (1, 2, 5, 100):
        kept = np.asarray(keep_top_k(jnp.asarray(logits), k))
        assert [np.flatnonzero(row > -np.inf).tolist() for row in kept] == [
            kept_top_k(row, k) for row in logits
        ]
        assert (kept[kept > -np.inf] == logits[kept > -np.inf]).all()
    for p in (1e-6, 0.3, 0.7, 1.0):
        kept = np.asarray(keep_nucleus(jnp.asarray(logits), p))
        assert [np.flatnonzero(row > -np.inf).tolist() for row in kept] == [
            kept_nucleus(row.astype(np.float64), p + 1e-6) for row in logits
        ]


def test_greedy_takes_the_first_of_the_most_probable() -> None:
    logits = jnp.array([[0.0, 3.0, 3.0], [1.0, 0.0, -1.0]])
    assert next_tokens(logits, jax.random.key(0), config("greedy")).tolist() == [1, 0]


def test_rows_draw_by_themselves_and_keys_decide() -> None:
    drawing = config("weighted")
    logits = jnp.zeros((64, 1000))
    many = next_tokens(logits, jax.random.key(1), drawing).tolist()
    assert len(set(many)) > 50
    assert next_tokens(logits[:3], jax.random.key(1), drawing).tolist() == many[:3]
    assert next_tokens(logits, jax.random.key(1), drawing).tolist() == many
    assert next_tokens(logits, jax.random.key(2), drawing).tolist() != many
