"""Run one training step: the numbers are the same however the experts are sharded."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_shard.config import Config
from moe_shard.program.loss_parts import Losses
from moe_shard.program.step import _accumulate, make_program
from tests.models.build import (
    QUICK,
    annotator,
    architecture,
    assert_close,
    random_batch,
    random_params,
    small_config,
)
from tests.models.oracle import dense_grads, forward

# Adam hides a uniform scale error, so SGD; and at this rate the step is far larger than the
# weights, so that the difference of weights is the gradient, not the weights' rounding.
RATE = 1e4
SGD = (
    "base_num_decoder_layers=2",
    "optimizer=sgd",
    f"learning_rate={RATE}",
    "warmup_steps_fraction=0",
    "gradient_clipping_threshold=0",
)
METRICS = {
    "loss",
    "ce_loss",
    "aux_loss",
    "grad_norm",
    "update_norm",
    "skipped",
    "learning_rate",
    "dropped_token_fraction",
    "expert_load_max_over_mean",
    "expert_counts",
    "dropped_by_layer",
    "router_z_by_layer",
    "grad_norm_by_kind",
    "param_norm_by_kind",
    "update_norm_by_kind",
}
BY_LAYER = {"expert_counts", "dropped_by_layer", "router_z_by_layer"}


def norms_of_kinds(tree: Any) -> list[float]:
    """Return the norm of each kind of a small model's parameters, by their places."""
    layers = tree["layers"]
    kinds = (
        (layers["attention_norm"], layers["mlp_norm"], tree["final_norm"]),
        layers["attention"],
        layers["mlp"]["router"],
        layers["mlp"]["experts"],
        tree["embedding"]["table"],
        tree["embedding"]["kernel"],
    )
    assert sum(len(jax.tree.leaves(each)) for each in kinds) == len(jax.tree.leaves(tree))
    return [
        math.sqrt(sum(float(np.sum(np.float64(x) ** 2)) for x in jax.tree.leaves(each)))
        for each in kinds
    ]


def check_layers(config: Config, metrics: Mapping[str, Any], rows: Mapping[str, Any]) -> None:
    """Compare the experts' statistics of each layer with NumPy's of the same sequences."""
    told = architecture(config)
    assert told.moe is not None
    answer = forward(
        random_params(config), rows["inputs"], rows["positions"], rows["segment_ids"], told
    )
    choices = rows["inputs"].size * told.moe.k
    np.testing.assert_array_equal(metrics["expert_counts"], answer.counts.sum(axis=1))
    dropped = answer.dropped.reshape(len(answer.dropped), -1).sum(axis=1) / choices
    assert (dropped > 0).all()
    np.testing.assert_allclose(metrics["dropped_by_layer"], dropped, rtol=1e-6)
    z_loss = answer.z_loss.reshape(len(answer.z_loss), -1).mean(axis=1)
    np.testing.assert_allclose(metrics["router_z_by_layer"], z_loss, rtol=1e-5)


def one_step(
    config: Config, batch: Mapping[str, np.ndarray], further: frozenset[str] = frozenset()
) -> tuple[Any, Any, dict[str, jax.Array]]:
    """Return the gradient (the weights' change divided by the rate), new weights and metrics."""
    program = make_program(config, annotator(config))
    compiled = program.step.lower(program.abstract_state, program.abstract_batch).compile(QUICK)
    params = random_params(config)
    shapes = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), program.abstract_state)
    places = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state)
    state = jax.device_put(shapes._replace(params=params), places)
    fields = jax.device_put(dict(batch), program.batch_sharding)
    after, metrics = compiled(state, fields)
    assert int(after.step) == 1
    assert set(metrics) == (METRICS if config.model.moe else METRICS - BY_LAYER) | further
    new = jax.device_get(after.params)
    return jax.tree.map(lambda a, b: (a - b) / RATE, params, new), new, metrics


@functools.cache
def reference() -> tuple[float, Any]:
    config = small_config({"data": 8}, *SGD)
    batch = {name: a[0] for name, a in random_batch().items()}
    return dense_grads(random_params(config), batch, architecture(config))


@functools.cache
def usual_step(
    sizes: tuple[tuple[str, int], ...], overrides: tuple[str, ...] = ()
) -> tuple[Any, Any, dict[str, jax.Array]]:
    return one_step(small_config(dict(sizes), *SGD, *overrides), random_batch())


def check(sizes: dict[str, int], *overrides: str) -> dict[str, jax.Array]:
    config = small_config(sizes, *SGD, *overrides)
    gradient, weights, metrics = usual_step(tuple(sizes.items()), overrides)
    loss, grads = reference()
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    assert_close(gradient, grads)
    params = random_params(config)
    assert_close(weights, jax.tree.map(lambda p, g: p - RATE * g, params, grads))
    assert np.abs(grads["layers"]["mlp"]["router"]["kernel"]).max() > 0
    of_grads = norms_of_kinds(grads)
    np.testing.assert_allclose(metrics["grad_norm_by_kind"], of_grads, rtol=1e-5)
    np.testing.assert_allclose(metrics["param_norm_by_kind"], norms_of_kinds(params), rtol=1e-5)
    changed = [RATE * each for each in of_grads]
    np.testing.assert_allclose(metrics["update_norm_by_kind"], changed, rtol=1e-5)
    check_layers(config, metrics, {name: a[0] for name, a in random_batch().items()})
    norm = math.sqrt(sum(float(np.sum(g**2)) for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(norm, np.linalg.norm(of_grads), rtol=1e-12)
    shards = metrics["grad_norm"].addressable_shards
    assert len(shards) == 8
    for shard in shards:
        np.testing.assert_allclose(shard.data, norm, rtol=1e-5)
    return metrics


@pytest.mark.parametrize("experts", [1, 2, 4, 8])
def test_gradients_and_weights_do_not_depend_on_the_expert_axis(experts: int) -> None:
    # At size 4 the rest is data parallelism, at size 2 FSDP, at size 1 plain data parallelism.
    rest = "fsdp" if experts == 2 else "data"
    check({"expert": experts, rest: 8 // experts})


@pytest.mark.parametrize(
    ("dispatch", "flag"), [("einsum", "true"), ("gather", "false"), ("einsum", "false")]
)
def test_gradients_and_weights_depend_on_neither_strategy_nor_flag(
    dispatch: str, flag: str
) -> None:
    check(
        {"fsdp": 2, "expert": 4},
        f"moe_dispatch={dispatch}",
        f"moe_dispatch_no_expert_sharding={flag}",
    )


def test_accumulating_two_microbatches_is_one_batch_of_twice_the_rows() -> None:
    # The load-balance loss is MaxText's, a mean over sequences, so this is exact with it too.
    together = random_batch(rows=16)
    apart = {name: a.reshape(2, 8, 16) for name, a in together.items()}
    sizes = {"data": 2, "expert": 4}
    big, _, of_big = one_step(small_config(sizes, *SGD, "per_device_batch_size=2"), together)
    two, _, of_two = one_step(small_config(sizes, *SGD, "gradient_accumulation_steps=2"), apart)
    assert_close(two, big)
    for name in METRICS:
        np.testing.assert_allclose(of_two[name], of_big[name], rtol=1e-5, err_msg=name)
    whole = {name: a[0] for name, a in together.items()}
    check_layers(small_config(sizes, *SGD), of_two, whole)
    np.testing.assert_allclose(of_two["grad_norm_by_kind"], norms_of_kinds(big), rtol=1e-5)


def test_microbatches_have_means_of_losses_and_sums_of_counts() -> None:
    def grads(params: Any, batch: Any) -> Any:
        rows = batch["inputs"]
        # float32 like the step's counts: the mean of 3 and 4 is not an integer.
        counts = jnp.bincount(rows.ravel(), length=4).astype(jnp.float32)[None]
        loss = rows.mean(dtype=jnp.float32)
        losses = Losses(loss, 2 * loss, 3 * loss, counts, 4 * loss[None], 5 * loss[None])
        return loss, losses, {"w": params["w"] * loss}

    batch = {"inputs": jnp.array([[[0, 0, 0, 2, 2, 3]], [[0, 1, 1, 1, 1, 3]]])}
    params = {"w": jnp.ones(2)}
    loss, losses, found = _accumulate(grads, params, params, batch)
    np.testing.assert_array_equal(losses.expert_counts, [[4, 4, 2, 2]])
    of_layer = [*losses.layer_dropped, *losses.layer_z]
    means = [loss, losses.ce_loss, losses.aux_loss, losses.dropped, *of_layer, *found["w"]]
    np.testing.assert_allclose(means, np.array([1, 1, 2, 3, 4, 5, 1, 1]) * (7 + 7) / 12, rtol=1e-6)


def test_microbatches_are_added_up_in_the_dtype_of_the_parameters() -> None:
    def grads(weights: Any, batch: Any) -> Any:
        loss = batch["inputs"].mean(dtype=jnp.float32)
        counts = jnp.ones((1, 1))
        losses = Losses(loss, loss, loss, counts, loss[None], loss[None])
        return loss, losses, {"w": weights["w"] * loss.astype("bfloat16")}

    # In bfloat16 256 + 1 is 256: the small gradients would be lost.
    batch = {"inputs": jnp.array([[[256]], [[1]], [[1]], [[1]]])}
    narrow, wide = ({"w": jnp.ones(2, dtype)} for dtype in (jnp.bfloat16, jnp.float32))
    _, _, found = _accumulate(grads, narrow, wide, batch)
    assert found["w"].dtype == jnp.float32
    np.testing.assert_array_equal(found["w"], np.full(2, 259 / 4))


def test_metrics_are_those_of_numpy() -> None:
    config = small_config({"expert": 8}, *SGD)
    _, _, metrics = usual_step((("expert", 8),))
    batch = {name: a[0] for name, a in random_batch().items()}
    told = architecture(config)
    answer = forward(
        random_params(config), batch["inputs"], batch["positions"], batch["segment_ids"], told
    )
    assert told.moe is not None
    log_z = np.log(np.sum(np.exp(answer.logits), axis=-1))
    picked = np.take_along_axis(answer.logits, batch["targets"][..., None], axis=-1)[..., 0]
    ce_loss = np.mean(log_z - picked)
    aux_loss = told.moe.load_balance_weight * answer.load_balance.mean()
    aux_loss += told.moe.z_weight * answer.z_loss.mean()
    load = answer.counts.sum(axis=1)  # layers, experts
    choices = len(load) * batch["inputs"].size * told.moe.k
    expected = {
        "ce_loss": ce_loss,
        "aux_loss": aux_loss,
        "loss": ce_loss + aux_loss,
        "dropped_token_fraction": answer.dropped.sum() / choices,
        "expert_load_max_over_mean": max(counts.max() / counts.mean() for counts in load),
        "learning_rate": RATE,
    }
    assert answer.dropped.sum() > 0
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-6, err_msg=name)


def test_a_dense_model_reports_no_drops_and_a_balanced_load() -> None:
    config = small_config({"fsdp": 8}, *SGD, "num_experts=1", "num_experts_per_tok=1")
    _, _, metrics = one_step(config, random_batch())
    assert metrics["aux_loss"] == 0
    assert metrics["dropped_token_fraction"] == 0
    assert metrics["expert_load_max_over_mean"] == 1
    assert metrics["loss"] == metrics["ce_loss"]
