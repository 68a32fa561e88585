"""Skip spikes of loss and gradient norm as MaxText's keys say, judged by NumPy in float64."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_shard.program.spikes import is_spike, no_history, remember
from moe_shard.program.step import TrainState, make_program
from tests.models.build import QUICK, annotator, random_batch, random_params, small_config

N, FACTOR = 6, 2.0


def spikes_by_numpy(values: np.ndarray) -> list[bool]:
    """Judge each pair of loss and norm by a window over the finite ones before it."""
    found: list[bool] = []
    before: list[np.ndarray] = []
    for pair in values:
        window = np.array(before[-N:], np.float64).reshape(-1, 2)
        spike = False
        if len(before) + 1 >= N // 2 and len(window):
            deviation = window.std(axis=0, ddof=1) if len(window) > 1 else np.zeros(2)
            spike = bool(np.any(pair - window.mean(axis=0) > FACTOR * deviation))
        found.append(spike)
        if np.all(np.isfinite(pair)):
            before.append(pair)
    return found


@pytest.mark.parametrize("seed", range(8))
def test_spikes_are_those_of_numpy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal([5, 1], [0.5, 0.2], (40, 2))
    values[rng.integers(0, 40, 5), rng.integers(0, 2, 5)] += 8
    values[15] = np.nan
    history = no_history(N)
    found = []
    for loss, norm in values.astype(np.float32):
        pair = jnp.asarray(loss), jnp.asarray(norm)
        found.append(bool(is_spike(history, *pair, factor=FACTOR)))
        history = remember(history, *pair, finite=jnp.isfinite(pair[0] + pair[1]))
    assert found == spikes_by_numpy(values)
    assert any(found)
    assert not all(found[N:])


@functools.cache
def compiled() -> tuple[Any, Any, Any]:
    keys = ("base_num_decoder_layers=2", "skip_step_on_spikes=true", f"skip_step_interval={N}")
    config = small_config({"fsdp": 2, "expert": 4}, *keys)
    program = make_program(config, annotator(config))
    lowered = program.step.lower(program.abstract_state, program.abstract_batch)
    return config, program, lowered.compile(QUICK)


@pytest.mark.parametrize(
    ("losses", "norms", "skipped"),
    [(1.0, 1e3, True), (1e3, 1e-6, True), (1e3, 1e3, False)],
    ids=["loss", "gradient", "neither"],
)
def test_a_spike_changes_nothing_but_the_history(
    losses: float, norms: float, skipped: bool
) -> None:
    config, program, step = compiled()

    def start() -> TrainState:
        state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), program.abstract_state)
        history = state.opt_state.history._replace(
            losses=np.full(N, losses, np.float32),
            grad_norms=np.full(N, norms, np.float32),
            seen=np.array(N, np.int32),
        )
        state = state._replace(
            params=random_params(config), opt_state=state.opt_state._replace(history=history)
        )
        return jax.device_put(state, jax.tree.map(lambda x: x.sharding, program.abstract_state))

    before = jax.device_get(start())
    after, metrics = step(start(), jax.device_put(random_batch(), program.batch_sharding))
    assert bool(metrics["skipped"]) == skipped
    assert math.isfinite(float(metrics["update_norm"]))
    pairs = zip(jax.tree.leaves(before.params), jax.tree.leaves(after.params), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs) == skipped
    history = jax.device_get(after.opt_state.history)
    assert history.losses[0] == metrics["loss"]
    assert history.grad_norms[0] == metrics["grad_norm"]
    assert int(history.seen) == N + 1
