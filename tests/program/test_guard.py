"""Skip updates that are not finite: the state stays to the bit, and the host is not asked."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_shard.program.guard import change, choose_opt_state
from moe_shard.program.step import Program, TrainState, make_program
from tests.models.build import QUICK, annotator, random_batch, random_params, small_config

MESHES = ({"data": 8}, {"fsdp": 2, "expert": 4})


@functools.cache
def compiled(mesh: int, *overrides: str) -> tuple[Program, Any]:
    config = small_config(MESHES[mesh], "base_num_decoder_layers=2", *overrides)
    program = make_program(config, annotator(config))
    lowered = program.step.lower(program.abstract_state, program.abstract_batch)
    return program, lowered.compile(QUICK)


def start(program: Program, mesh: int, damage: str = "") -> TrainState:
    """Make a state in the middle of a run: moments and counts differ from zero.

    Args:
        program: the step.
        mesh: index of its mesh.
        damage: "loss" or "gradient": what shall not be finite.
    """
    config = small_config(MESHES[mesh], "base_num_decoder_layers=2")
    params = random_params(config)
    if damage == "loss":
        params["final_norm"]["scale"][3] = np.nan
    if damage == "gradient":  # the norm after it makes zeros of it, and the loss is finite
        params["embedding"] = jax.tree.map(lambda x: x * np.float32(3e38), params["embedding"])
    rng = np.random.default_rng(5)

    def filled(leaf: Any) -> np.ndarray:
        if leaf.ndim == 0:
            return np.full((), 7, leaf.dtype)
        return (rng.random(leaf.shape) * 1e-3).astype(leaf.dtype)

    state = jax.tree.map(filled, program.abstract_state)._replace(params=params)
    places = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state)
    return jax.device_put(state, places)


def step(program: Program, executable: Any, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
    batch = jax.device_put(random_batch(), program.batch_sharding)
    after, metrics = executable(state, batch)
    return jax.device_get(after), {name: float(x) for name, x in metrics.items() if not x.ndim}


def change_norm(before: Any, after: Any) -> jax.Array:
    return optax.tree.norm(change(before, after))


def same(before: Any, after: Any) -> bool:
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    return all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)


@pytest.mark.parametrize("mesh", [0, 1])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adafactor", "muon"])
@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_bad_number_leaves_parameters_and_moments_as_they_were(
    mesh: int, optimizer: str, bad: str
) -> None:
    program, executable = compiled(mesh, f"optimizer={optimizer}", "learning_rate=0.5")
    before = jax.device_get(start(program, mesh, bad))
    after, metrics = step(program, executable, start(program, mesh, bad))
    assert metrics["skipped"] == 1
    assert math.isfinite(metrics["loss"]) == (bad == "gradient")
    assert not math.isfinite(metrics["grad_norm"])
    assert same(before.params, after.params)
    assert int(after.step) == int(before.step) + 1
    counts = 0
    for old, new in zip(
        jax.tree.leaves(before.opt_state), jax.tree.leaves(after.opt_state), strict=True
    ):
        counts += int(not np.array_equal(old, new))
        if old.ndim:
            assert np.array_equal(old, new)
    # Only the schedule's count has moved: two of them where Muon leaves vectors to Adam.
    assert counts == (2 if optimizer == "muon" else 1)


@pytest.mark.parametrize("mesh", [0, 1])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_good_step_is_made_and_its_norm_is_that_of_the_change(mesh: int, optimizer: str) -> None:
    program, executable = compiled(mesh, f"optimizer={optimizer}", "learning_rate=0.5")
    before = jax.device_get(start(program, mesh))
    after, metrics = step(program, executable, start(program, mesh))
    assert metrics["skipped"] == 0
    assert not same(before.params, after.params)
    assert not same(before.opt_state, after.opt_state)
    change = jax.tree.map(lambda a, b: b.astype(np.float64) - a, before.params, after.params)
    norm = math.sqrt(sum(float(np.sum(x**2)) for x in jax.tree.leaves(change)))
    assert norm > 0
    np.testing.assert_allclose(metrics["update_norm"], norm, rtol=1e-5)


def test_an_update_that_ruins_the_weights_is_skipped_while_loss_and_gradient_are_finite() -> None:
    keys = ("optimizer=sgd", "learning_rate=1e38", "warmup_steps_fraction=0")
    program, executable = compiled(1, *keys)
    before = jax.device_get(start(program, 1))
    after, metrics = step(program, executable, start(program, 1))
    assert math.isfinite(metrics["loss"])
    assert math.isfinite(metrics["grad_norm"])
    assert metrics["update_norm"] == math.inf
    assert metrics["skipped"] == 1
    assert same(before.params, after.params)


def test_the_reported_learning_rate_is_the_one_used_after_a_skipped_step() -> None:
    # Plain SGD without clipping: the change over the gradient is the rate.
    keys = ("optimizer=sgd", "learning_rate=0.5", "gradient_clipping_threshold=0", "steps=20")
    program, executable = compiled(0, *keys, "warmup_steps_fraction=1")
    bad, _ = step(program, executable, start(program, 0, "loss"))
    places = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state)
    good = bad._replace(params=jax.device_get(start(program, 0)).params)
    _, metrics = step(program, executable, jax.device_put(good, places))
    assert metrics["learning_rate"] == pytest.approx(0.5 * 9 / 20)  # of step 8, counted from 0
    assert metrics["update_norm"] / metrics["grad_norm"] == pytest.approx(0.5 * 9 / 20, rel=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_one_bad_element_makes_the_norm_of_a_change_not_finite(bad: float) -> None:
    before = {"a": jnp.ones(3), "b": jnp.zeros((2, 2), jnp.bfloat16)}
    after = {"a": jnp.ones(3), "b": before["b"].at[1, 0].set(bad)}
    assert math.isfinite(float(change_norm(before, before)))
    assert not math.isfinite(float(change_norm(before, after)))
    # A parameter that is not finite is found also where nothing changes it.
    assert math.isfinite(float(change_norm(after, after))) == math.isfinite(bad)


def test_small_changes_in_bfloat16_are_added_up_in_float32() -> None:
    before = {"a": jnp.ones(100_000, jnp.bfloat16)}
    after = {"a": jnp.full(100_000, 1.5, jnp.bfloat16)}
    np.testing.assert_allclose(change_norm(before, after), math.sqrt(100_000) / 2, rtol=1e-6)


def test_the_schedules_count_goes_on_and_adams_does_not() -> None:
    optimizer = optax.adamw(optax.constant_schedule(1e-3))
    params = {"w": jnp.ones(3)}
    old = optimizer.init(params)
    _, new = optimizer.update({"w": jnp.ones(3)}, old, params)
    kept = choose_opt_state(jnp.array(False), new, old)
    adam, _, schedule = kept
    assert int(adam.count) == 0
    assert not np.any(adam.mu["w"])
    assert int(schedule.count) == 1
    assert same(choose_opt_state(jnp.array(True), new, old), new)
