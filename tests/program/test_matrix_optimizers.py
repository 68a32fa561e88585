"""Muon and Adafactor equal NumPy's, written out matrix by matrix, whatever is stacked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax
import pytest

from moe_shard.config.schema import TrainConfig
from moe_shard.models.params import ParamSpec
from moe_shard.program.optimizer import make_optimizer
from tests.models.build import annotator, small_config

SIZES: dict[str | None, int] = {
    "layers": 2, "exp": 2, "embed": 6, "mlp": 8, "heads": 2, "head_dim": 2, "norm": 6, "vocab": 8,
    "embed_vocab": 6, "embed_moe": 6, "mlp_moe": 4, "embed_router": 6, "exp_router": 2, None: 2,
}  # fmt: skip
LARGE: dict[str | None, int] = {
    "embed": 128,
    "mlp": 136,
    "heads": 16,
    "head_dim": 8,
    "embed_moe": 128,
    "mlp_moe": 132,
}
AXES: dict[str, tuple[str | None, ...]] = {
    "kernel": ("layers", "embed", "mlp"),
    "query": ("layers", "embed", "heads", "head_dim"),
    "out": ("layers", "heads", "head_dim", "embed"),
    "experts": ("layers", "exp", "embed_moe", "mlp_moe"),
    "fused": ("layers", "exp", "embed_moe", None, "mlp_moe"),
    "router": ("layers", "embed_router", "exp_router"),
    "bias": ("layers", "exp", None),
    "norm": ("layers", "norm"),
    "table": ("vocab", "embed_vocab"),
}
GROUPS: dict[str, tuple[int, ...]] = {
    "kernel": (1, 2), "query": (1, 2, 2), "out": (1, 1, 2), "experts": (1, 2), "fused": (1, 2),
    "router": (1, 2),
}  # fmt: skip
"""1: an input dim, 2: an output dim, of those that are not stacked."""
RATE, STEPS = 0.1, 3
Trees = dict[str, np.ndarray]


def specs(sizes: dict[str | None, int]) -> dict[str, ParamSpec]:
    sharding = annotator(small_config({"data": 8}))
    place = sharding.named_sharding("x", ("norm",), (8,))
    shapes = {name: tuple(sizes[axis] for axis in axes) for name, axes in AXES.items()}
    return {n: ParamSpec(n, shapes[n], np.float32, axes, place) for n, axes in AXES.items()}


def random_trees(named: dict[str, ParamSpec], count: int) -> list[Trees]:
    rng = np.random.default_rng(0)
    return [{n: rng.standard_normal(s.shape) for n, s in named.items()} for _ in range(count)]


def run(config: TrainConfig, named: dict[str, ParamSpec], trees: list[Trees]) -> Trees:
    start, *gradients = jax.tree.map(np.float32, trees)
    optimizer = make_optimizer(config, named)
    params, state = start, jax.jit(optimizer.init)(start)
    update = jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return jax.device_get(params)


def train_config(*overrides: str) -> TrainConfig:
    flat = (f"learning_rate={RATE}", "warmup_steps_fraction=0", "learning_rate_final_fraction=1")
    return small_config({"data": 8}, *flat, "gradient_clipping_threshold=0", *overrides).train


def matrices(name: str) -> Iterator[tuple[Any, ...]]:
    """Yield the index of each matrix of a parameter."""
    axes = AXES[name]
    is_matrix = name in GROUPS or name == "table"
    stacked = [a in {"layers", "exp"} or (a is None and is_matrix) for a in axes]
    counts = [SIZES[axis] if s else 1 for axis, s in zip(axes, stacked, strict=True)]
    for at in np.ndindex(*counts):
        yield tuple(i if s else slice(None) for i, s in zip(at, stacked, strict=True))


def flattened(name: str, array: np.ndarray) -> np.ndarray:
    """Merge the dims of one matrix to inputs and outputs."""
    if name == "table" or name not in GROUPS:
        return array
    inputs = GROUPS[name].count(1)
    return array.reshape(int(np.prod(array.shape[:inputs])), -1)


def orthogonal(m: np.ndarray, eps: float) -> np.ndarray:
    x = m.T if m.shape[0] > m.shape[1] else m
    x = x / (np.sqrt(np.sum(x**2)) + eps)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if m.shape[0] > m.shape[1] else x


@pytest.mark.parametrize("rms", [-1.0, 0.2])
@pytest.mark.parametrize("routers", [False, True])
def test_muon_is_numpys_and_adam_takes_the_rest(rms: float, routers: bool) -> None:
    beta, decay, b1, b2, eps, adam_decay = 0.9, 0.3, 0.8, 0.95, 1e-6, 0.2
    config = train_config(
        "optimizer=muon", f"muon_beta={beta}", f"muon_weight_decay={decay}", f"adam_b1={b1}",
        f"adam_b2={b2}", f"adam_eps={eps}", f"adam_weight_decay={adam_decay}",
        f"muon_consistent_rms={rms}", f"muon_include_routers={str(routers).lower()}",
    )  # fmt: skip
    named = specs(SIZES)
    start, *gradients = trees = random_trees(named, 1 + STEPS)
    found = run(config, named, trees)
    for name, value in start.items():
        by_muon = name in GROUPS and (routers or name != "router")
        w, mu, nu = value.copy(), np.zeros_like(value), np.zeros_like(value)
        for step, gradient in enumerate(gradients, start=1):
            g, first = gradient[name], beta if by_muon else b1
            mu = first * mu + (1 - first) * g
            # Nesterov's momentum, with the next step's correction for what has been added up.
            m = first * mu / (1 - first ** (step + 1)) + (1 - first) * g / (1 - first**step)
            if not by_muon:
                nu = b2 * nu + (1 - b2) * g**2
                move = m / (np.sqrt(nu / (1 - b2**step)) + eps)
                w = w - RATE * (move + (adam_decay * w if name in {"table", "router"} else 0))
                continue
            move = np.zeros_like(w)
            for at in matrices(name):
                one = flattened(name, m[at])
                i, o = one.shape
                scale = np.sqrt(max(1, o / i)) if rms == -1 else np.sqrt(max(i, o)) * rms
                move[at] = (scale * orthogonal(one, eps)).reshape(m[at].shape)
            w = w - RATE * (move + decay * w)
        np.testing.assert_allclose(found[name], w, rtol=3e-5, atol=3e-5, err_msg=name)


def test_adafactor_is_numpys() -> None:
    sizes: dict[str | None, int] = {**SIZES, **LARGE}
    named = specs(sizes)
    start, *gradients = trees = random_trees(named, 1 + STEPS)
    found = run(train_config("optimizer=adafactor"), named, trees)
    factored = set()
    for name, value in start.items():
        w = value.copy()
        for at in matrices(name):
            one = flattened(name, w[at])
            row, column = np.zeros(one.shape[:1]), np.zeros(one.shape[1:])
            whole = np.zeros(one.shape)
            for step, gradient in enumerate(gradients, start=1):
                g = flattened(name, gradient[name][at])
                decay, square = 1 - step**-0.8, g**2 + 1e-30
                if one.ndim == 2 and min(one.shape) >= 128:
                    factored.add(name)
                    row = decay * row + (1 - decay) * square.mean(1)
                    column = decay * column + (1 - decay) * square.mean(0)
                    second = np.outer(row, column) / row.mean()
                else:
                    whole = decay * whole + (1 - decay) * square
                    second = whole
                move = g / np.sqrt(second)
                move = move / max(1.0, np.sqrt(np.mean(move**2)))
                one = one - RATE * max(np.sqrt(np.mean(one**2)), 1e-3) * move
            w[at] = one.reshape(w[at].shape)
        np.testing.assert_allclose(found[name], w, rtol=2e-5, atol=2e-5, err_msg=name)
    assert factored == {"kernel", "query", "out", "experts", "fused"}


def test_first_moments_have_a_dtype_of_their_own() -> None:
    named = specs(SIZES)
    start, gradient = (jax.tree.map(np.float32, tree) for tree in random_trees(named, 2))
    for optimizer in ("adamw", "muon"):
        config = train_config(f"optimizer={optimizer}", "mu_dtype=bfloat16")
        made = make_optimizer(config, named)
        updates, state = jax.jit(made.update)(gradient, jax.jit(made.init)(start), start)
        paths = jax.tree_util.tree_flatten_with_path(state)[0]
        dtypes = {
            field: {str(x.dtype) for path, x in paths if f".{field}" in jax.tree_util.keystr(path)}
            for field in ("mu", "nu")
        }
        assert dtypes == {"mu": {"bfloat16"}, "nu": {"float32"}}
        assert {str(x.dtype) for x in jax.tree.leaves(updates)} == {"float32"}
        # The moments are computed in float32 and rounded where they are kept.
        wide = make_optimizer(train_config(f"optimizer={optimizer}"), named)
        first, _ = jax.jit(wide.update)(gradient, jax.jit(wide.init)(start), start)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates, first)
