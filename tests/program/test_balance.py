"""Balance without a loss: each update moves the correction bias, and nothing else does."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_shard.config import Config
from moe_shard.models.params import Params
from moe_shard.program.balance import balanced, bias_norms
from moe_shard.program.step import TrainState, make_program
from tests.models.build import (
    NO_DROPS,
    QUICK,
    annotator,
    random_batch,
    random_params,
    small_config,
)

RATE = 0.25  # a power of two: sums of it are exact
KEYS = (
    NO_DROPS,
    "base_num_decoder_layers=4",
    "interleave_moe_layer_step=2",
    "routed_score_func=sigmoid",
    "routed_bias=true",
    f"routed_bias_update_rate={RATE}",
    "warmup_steps_fraction=0",
    "learning_rate=0.01",
)
STACK = "layers_1"  # of layers 1 and 3, the two that have experts


def moved(rate: float, counts: list[list[float]], *overrides: str) -> dict[str, np.ndarray]:
    """Return what zero biases become after an update with these counts, by stack."""
    config = small_config(
        {"data": 8}, "routed_bias=true", f"routed_bias_update_rate={rate}", *overrides
    ).model
    kernel = jnp.ones(1)
    stack = {
        "mlp": {"router": {"kernel": kernel, "correction_bias": jnp.zeros((1, len(counts[0])))}}
    }
    names = ["layers"]
    if config.num_decoder_layers > 1:
        names = [f"layers_{layer}" for layer in range(config.num_decoder_layers)]
    params = dict.fromkeys(names, stack)
    after = balanced(config, params, jnp.array(counts, jnp.float32))
    assert all(after[name]["mlp"]["router"]["kernel"] is kernel for name in names)
    return {name: np.asarray(after[name]["mlp"]["router"]["correction_bias"]) for name in names}


@pytest.mark.parametrize(
    ("rate", "counts", "expected"),
    [
        (0.1, [10, 0], [-0.1, 0.1]),
        (0.2, [0, 10], [0.2, -0.2]),
        (0.5, [5, 5], [0, 0]),
        (0.5, [3, 2, 2, 2, 2], [-0.5, 0.5, 0.5, 0.5, 0.5]),  # the mean is 2.2
        # Their mean in float32 is a different number.
        (0.5, [13_421_773] * 3, [0, 0, 0]),
        (0.5, [13_421_773, 13_421_773, 13_421_774], [0.5, 0.5, -0.5]),
    ],
)
def test_counts_by_hand(rate: float, counts: list[float], expected: list[float]) -> None:
    keys = ("base_num_decoder_layers=1", f"num_experts={len(counts)}", "ici_expert_parallelism=1")
    (found,) = moved(rate, [counts], *keys).values()
    np.testing.assert_allclose(found[0], expected, rtol=1e-7)


def test_each_layer_has_the_counts_of_its_own_row() -> None:
    # Layers 0 and 2 are dense, so that layer 1 is the first with experts; each is its own stack.
    found = moved(
        1, [[9, 0], [0, 9]], "base_num_decoder_layers=4", "num_experts=2", "dense_layers=[0, 2]",
        "attention_pattern=[global, sliding, sliding, global]", "sliding_window_size=4",
    )  # fmt: skip
    np.testing.assert_array_equal(found["layers_1"][0], [-1, 1])
    np.testing.assert_array_equal(found["layers_3"][0], [1, -1])
    assert not found["layers_0"].any()
    assert not found["layers_2"].any()


def test_norms_of_biases_are_in_the_order_of_layers() -> None:
    # Layers 0 and 2 share a stack, and so do 1 and 3.
    config = small_config(
        {"data": 8}, "routed_bias=true", "base_num_decoder_layers=4", "num_experts=2",
        "attention_pattern=[sliding, global]", "sliding_window_size=4",
    ).model  # fmt: skip
    params = {
        name: {"mlp": {"router": {"correction_bias": jnp.array(bias, jnp.bfloat16)}}}
        for name, bias in {"layers_0": [[3, 4], [0, 0]], "layers_1": [[0, 1], [6, 8]]}.items()
    }
    found = bias_norms(config, params)["router_bias_norm_by_layer"]
    np.testing.assert_array_equal(found, [5, 1, 0, 10])
    without: Params = {name: {"mlp": {"router": {}}} for name in params}
    assert not bias_norms(config, without)


def start(config: Config) -> Any:
    """Make random parameters with zero correction biases."""
    params = random_params(config)
    biases(params)[:] = 0
    return params


def steps(config: Config, batches: Sequence[Mapping[str, np.ndarray]]) -> TrainState:
    """Return the state after an update on each batch, on the host."""
    program = make_program(config, annotator(config))
    compiled = program.step.lower(program.abstract_state, program.abstract_batch).compile(QUICK)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), program.abstract_state)
    places = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state)
    state = jax.device_put(zeros._replace(params=start(config)), places)
    for batch in batches:
        norms = np.linalg.norm(np.float64(biases(state.params)), axis=1)
        state, metrics = compiled(state, jax.device_put(dict(batch), program.batch_sharding))
        np.testing.assert_allclose(metrics["router_bias_norm_by_layer"], norms, rtol=1e-6)
    host: TrainState = jax.device_get(state)
    return host


def biases(params: Any) -> np.ndarray:
    """Return the biases [2, E] of both MoE layers."""
    found: np.ndarray = params[STACK]["mlp"]["router"]["correction_bias"]
    return found


@functools.cache
def trained(sizes: tuple[tuple[str, int], ...]) -> TrainState:
    """Return the state after two updates."""
    batches = [random_batch(seed=seed) for seed in (1, 2)]
    return steps(small_config(dict(sizes), *KEYS), batches)


def counted(config: Config, params: Any, batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """Count the choices of each expert in each MoE layer, by a call of the model."""
    model = make_program(config, annotator(config)).model
    names = ("inputs", "positions", "segment_ids")
    call = jax.jit(lambda p, *text: model.apply(p)(*text)[1], compiler_options=QUICK)
    stats = call(params, *(batch[name].reshape(-1, 16) for name in names))
    return np.asarray(stats.expert_counts).sum(axis=1)


def test_an_update_moves_each_bias_towards_the_mean_of_all_microbatches() -> None:
    config = small_config({"data": 2, "expert": 4}, *KEYS, "gradient_accumulation_steps=2")
    batch = random_batch(microbatches=2)
    counts = counted(config, start(config), batch)
    assert counts.shape == (2, 8)
    assert counts.sum() == 2 * (2 * 8 * 16) * 2  # layers, tokens, choices
    expected = RATE * np.sign(counts.mean(axis=1, keepdims=True) - counts)
    assert len(np.unique(expected)) > 1
    np.testing.assert_array_equal(biases(steps(config, [batch]).params), expected)


def test_biases_do_not_depend_on_the_mesh() -> None:
    whole, other = trained((("expert", 8),)), trained((("fsdp", 2), ("tensor", 2), ("expert", 2)))
    np.testing.assert_array_equal(biases(other.params), biases(whole.params))


def test_no_optimizer_moves_or_decays_a_bias_and_no_norm_counts_it() -> None:
    # Two updates, by AdamW with weight decay and moments: the bias is a sum of the rate's steps.
    state = trained((("expert", 8),))
    found = biases(state.params) / RATE
    assert np.isin(found, [-2, -1, 0, 1, 2]).all()
    assert np.abs(found).max() == 2
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    moments = [leaf for path, leaf in leaves if "correction_bias" in jax.tree_util.keystr(path)]
    assert len(moments) == 2
    assert not any(moment.any() for moment in moments)


def test_a_rate_of_zero_leaves_the_biases_as_they_are() -> None:
    assert not moved(0, [[9, 0]], "num_experts=2", "base_num_decoder_layers=1")["layers"].any()
