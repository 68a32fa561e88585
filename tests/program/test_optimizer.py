"""Compare optimizers with NumPy, step by step; the clipping norm is the same on every device."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_shard.config.schema import TrainConfig
from moe_shard.models.params import ParamSpec
from moe_shard.program.optimizer import make_optimizer, make_schedule
from tests.models.build import annotator, small_config

AXES = {
    "kernel": ("layers", "embed", "mlp"),
    "norm": ("layers", "norm"),
    "final_norm": ("norm",),
    "head_norm": ("layers", "head_dim"),
}
SHAPES = {"kernel": (2, 4, 6), "norm": (2, 4), "final_norm": (4,), "head_norm": (2, 8)}


def train_config(*overrides: str) -> TrainConfig:
    return small_config({"data": 8}, *overrides).train


def specs() -> dict[str, ParamSpec]:
    sharding = annotator(small_config({"data": 8}))
    return {
        name: ParamSpec(
            name, SHAPES[name], np.float32, axes, sharding.named_sharding(name, axes, SHAPES[name])
        )
        for name, axes in AXES.items()
    }


def random_trees(count: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [
        {name: rng.standard_normal(s).astype(np.float32) for name, s in SHAPES.items()}
        for _ in range(count)
    ]


def run(config: TrainConfig, start: Any, gradients: list[Any]) -> Any:
    optimizer = make_optimizer(config, specs())
    params, state = start, optimizer.init(start)
    update = jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def clipped(gradient: dict[str, np.ndarray], threshold: float) -> dict[str, np.ndarray]:
    norm = math.sqrt(sum(float(np.sum(np.float64(g) ** 2)) for g in gradient.values()))
    factor = threshold / norm if threshold and norm > threshold else 1.0
    return {name: g.astype(np.float64) * factor for name, g in gradient.items()}


def rate_by_hand(step: int, *, peak: float, steps: int, warmup: int, final: float) -> float:
    if step < warmup:
        return peak * (step + 1) / warmup
    fraction = min((step - warmup) / (steps - warmup), 1.0)
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * fraction)))


@pytest.mark.parametrize("threshold", [0.0, 1.0, 1e6], ids=["off", "active", "idle"])
def test_adamw_is_numpy_adamw_and_norm_scales_do_not_decay(threshold: float) -> None:
    b1, b2, eps, decay, peak = 0.8, 0.9, 1e-3, 0.5, 0.1
    config = train_config(
        f"adam_b1={b1}", f"adam_b2={b2}", f"adam_eps={eps}", f"adam_weight_decay={decay}",
        f"learning_rate={peak}", "steps=20", f"gradient_clipping_threshold={threshold}",
    )  # fmt: skip
    start, *gradients = random_trees(6)
    found = run(config, start, gradients)
    params = {name: a.astype(np.float64) for name, a in start.items()}
    first = {name: np.zeros_like(a) for name, a in params.items()}
    second = {name: np.zeros_like(a) for name, a in params.items()}
    for step, gradient in enumerate(gradients):
        rate = rate_by_hand(step, peak=peak, steps=20, warmup=2, final=0.1)
        for name, g in clipped(gradient, threshold).items():
            first[name] = b1 * first[name] + (1 - b1) * g
            second[name] = b2 * second[name] + (1 - b2) * g**2
            corrected = second[name] / (1 - b2 ** (step + 1))
            move = first[name] / (1 - b1 ** (step + 1)) / (np.sqrt(corrected) + eps)
            if name == "kernel":  # two dims besides `layers`; the scales have one
                move += decay * params[name]
            params[name] = params[name] - rate * move
    for name, expected in params.items():
        np.testing.assert_allclose(found[name], expected, rtol=2e-6, atol=2e-6, err_msg=name)


def test_vectors_decay_where_they_are_asked_to() -> None:
    config = train_config("adam_decay_vectors=true", "adam_weight_decay=0.5", "learning_rate=0.1")
    named = specs() | {"bias": replace(specs()["norm"], name="moe.router.correction_bias")}
    start = random_trees(1)[0] | {"bias": np.ones((2, 4), np.float32)}
    still = {name: np.zeros_like(a) for name, a in start.items()}
    optimizer = make_optimizer(config, named)
    updates, _ = optimizer.update(still, optimizer.init(start), start)
    rate = float(make_schedule(config)(0))
    for name, update in updates.items():  # decay must not move a bias without a gradient
        expected = 0 if name == "bias" else -rate * 0.5 * start[name]
        np.testing.assert_allclose(update, expected, rtol=1e-6, err_msg=name)


def test_sgd_is_the_plain_step() -> None:
    config = train_config(
        "optimizer=sgd", "learning_rate=0.5", "steps=10", "gradient_clipping_threshold=0"
    )
    start, *gradients = random_trees(4)
    found = run(config, start, gradients)
    for name in SHAPES:
        expected = start[name].astype(np.float64)
        for step, gradient in enumerate(gradients):
            rate = rate_by_hand(step, peak=0.5, steps=10, warmup=1, final=0.1)
            expected = expected - rate * gradient[name]
        np.testing.assert_allclose(found[name], expected, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(("fraction", "warmup"), [(0.0, 0), (0.1, 10), (0.01, 1), (0.5, 50)])
def test_schedule_rises_linearly_then_follows_a_cosine(fraction: float, warmup: int) -> None:
    config = train_config(
        "steps=100", "learning_rate=2.0", f"warmup_steps_fraction={fraction}",
        "learning_rate_final_fraction=0.25",
    )  # fmt: skip
    schedule = make_schedule(config)
    for step in (*range(0, 100, 7), warmup, max(warmup - 1, 0), 99, 100, 5000):
        expected = rate_by_hand(step, peak=2.0, steps=100, warmup=warmup, final=0.25)
        np.testing.assert_allclose(schedule(step), expected, rtol=1e-5, err_msg=str(step))
    assert schedule(0) > 0  # the first update learns
    assert float(schedule(warmup)) == pytest.approx(2.0)
    assert float(schedule(5000)) == pytest.approx(0.5)


def maxtext_rate(step: int, *, peak: float, length: int, fraction: float, final: float) -> float:
    warmup = math.floor(length * fraction)
    if step >= length:
        return 0.0
    if step < warmup:
        return peak * step / warmup
    done = (step - warmup) / (length - warmup - 1) if length - warmup > 1 else 1.0
    return peak * (final + (1 - final) * (math.cos(math.pi * done) + 1) / 2)


@pytest.mark.parametrize(("length", "fraction"), [(40, 0.1), (40, 0.0), (1, 0.5), (3, 1.0)])
def test_the_rule_of_maxtext_begins_at_0_and_ends_in_0(length: int, fraction: float) -> None:
    config = train_config(
        "steps=50", f"learning_rate_schedule_steps={length}", "learning_rate=2.0",
        f"warmup_steps_fraction={fraction}", "learning_rate_final_fraction=0.25",
        "learning_rate_rule=maxtext",
    )  # fmt: skip
    schedule = make_schedule(config)
    for step in range(50):
        expected = maxtext_rate(step, peak=2.0, length=length, fraction=fraction, final=0.25)
        np.testing.assert_allclose(schedule(step), expected, rtol=1e-5, atol=1e-7)


def test_schedule_has_its_own_length_where_one_is_given() -> None:
    config = train_config("steps=10", "learning_rate_schedule_steps=40", "learning_rate=1.0")
    schedule = make_schedule(config)
    for step in range(10):
        expected = rate_by_hand(step, peak=1.0, steps=40, warmup=4, final=0.1)
        np.testing.assert_allclose(schedule(step), expected, rtol=1e-5)


@pytest.mark.parametrize("parallelism", [1, 2, 4, 8])
def test_the_clipping_norm_is_global_on_every_device_at_every_ep_size(parallelism: int) -> None:
    # Four experts' gradients: the first two have norm sqrt(20) together, the others sqrt(100), so
    # that with EP 2 two devices hold these norms. A norm per device, or a mean of them, is not
    # sqrt(120). For EP 8 each expert is split in two halves.
    config = small_config(
        {"expert": parallelism, "data": 8 // parallelism},
        "optimizer=sgd", "learning_rate=1.0", "warmup_steps_fraction=0",
        "gradient_clipping_threshold=1.0",
    )  # fmt: skip
    sharding = annotator(config)
    gradient = np.zeros((8, 4, 2), np.float32)
    gradient[:, 0, 0] = [math.sqrt(square / 2) for square in (4, 4, 16, 16, 36, 36, 64, 64)]
    axes = ("exp", "embed_moe", "mlp_moe")
    place = sharding.named_sharding("gradient", axes, gradient.shape)
    spec = {"w": ParamSpec("w", gradient.shape, np.float32, axes, place)}
    optimizer = make_optimizer(config.train, spec)
    weights = jax.device_put({"w": jnp.zeros_like(gradient)}, place)
    update = jax.jit(optimizer.update, out_shardings=({"w": place}, None))
    updates, _ = update(jax.device_put({"w": gradient}, place), optimizer.init(weights), weights)
    shards = updates["w"].addressable_shards
    assert len(shards) == 8
    assert len({str(shard.index) for shard in shards}) == parallelism
    for shard in shards:
        # Clipped to norm 1 at rate 1: the update is -gradient / norm.
        norms = gradient[shard.index][:, 0, 0] / -np.asarray(shard.data)[:, 0, 0]
        np.testing.assert_allclose(norms, 10.954452, rtol=1e-6)
