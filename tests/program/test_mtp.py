"""Multi-token prediction: loss and gradients are an oracle's in float64, on every mesh."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest

from moe_shard.models.mtp import look_ahead
from moe_shard.runtime.compile import loss_lines, moe_records
from tests.models.build import (
    annotator,
    architecture,
    assert_close,
    random_batch,
    random_params,
    small_config,
)
from tests.models.oracle import dense_grads, mtp_loss
from tests.program.test_step import SGD, one_step

TWO = ("mtp_num_layers=2", "mtp_loss_scaling_factor=0.7", "base_num_decoder_layers=1")
AFTER = ("mtp_after_final_norm=true",)
MESHES = [
    pytest.param({"context": 4, "expert": 2}, ("capacity_factor=-1",), id="reordered"),
    # What these repeat costs as much again: in `make test-recorded`.
    pytest.param({"expert": 8}, ("remat_policy=none",), marks=pytest.mark.recorded, id="expert"),
    pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, AFTER, marks=pytest.mark.recorded, id="all"),
]


@pytest.mark.parametrize(("sizes", "overrides"), MESHES)
def test_loss_and_gradients(sizes: dict[str, int], overrides: tuple[str, ...]) -> None:
    config = small_config(sizes, *SGD, *TWO, *overrides)
    batch = random_batch()
    gradient, _, metrics = one_step(config, batch, frozenset({"mtp_loss"}))
    fields = {name: a[0] for name, a in batch.items()}
    params = random_params(config)
    loss, grads = dense_grads(params, fields, architecture(config))
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    assert_close(gradient, grads)
    by_numpy = 0.7 * mtp_loss(params, fields, architecture(config))
    np.testing.assert_allclose(metrics["mtp_loss"], by_numpy, rtol=2e-6)
    parts = sum(float(metrics[name]) for name in ("ce_loss", "aux_loss", "mtp_loss"))
    np.testing.assert_allclose(metrics["loss"], parts, rtol=1e-6)
    assert metrics["expert_counts"].shape == (3, 8)  # of the decoder's layer, then of MTP's


@pytest.mark.recorded
def test_the_oracles_gradient_is_numpys_difference_quotient() -> None:
    config = small_config({"data": 8}, *TWO, "num_experts=1", "num_experts_per_tok=1")
    params = jax.tree.map(np.float64, random_params(config))
    fields = {name: a[0] for name, a in random_batch(rows=2, tokens=7).items()}
    on = replace(architecture(config), mtp_weight=1.0)
    grads, without = (
        dense_grads(params, fields, each)[1] for each in (on, replace(on, mtp_weight=0.0))
    )
    rng = np.random.default_rng(5)
    way = jax.tree.map(lambda a: rng.standard_normal(a.shape), params)
    terms = jax.tree.map(lambda a, b, d: np.sum((a - b) * d), grads, without, way)
    high, low = (
        mtp_loss(jax.tree.map(lambda a, d, h=h: a + h * d, params, way), fields, on)
        for h in (1e-6, -1e-6)
    )
    np.testing.assert_allclose(sum(jax.tree.leaves(terms)), (high - low) / 2e-6, rtol=1e-6)


def test_the_step_says_what_is_predicted() -> None:
    config = small_config({"expert": 8}, *TWO)
    lines = loss_lines(config, annotator(config))
    assert lines[1:] == [
        "multi-token prediction: 2 layers after the last (1-2), of tokens up to 3 ahead in their "
        "document; their mean loss counts 0.7 times"
    ]
    assert len(loss_lines(small_config({"expert": 8}), annotator(config))) == 1
    assert list(moe_records(config, annotator(config))) == ["layers 0-2"]


def test_targets_stay_within_their_document() -> None:
    segments = np.array([[1, 1, 1, 2, 2, 3], [1, 1, 1, 1, 1, 1]], np.int32)
    inputs = np.arange(12, dtype=np.int32).reshape(2, 6) + 10
    batch = {"inputs": inputs, "targets": inputs + 100, "segment_ids": segments}
    found = look_ahead({name: jax.numpy.asarray(a) for name, a in batch.items()}, 7)
    assert found.inputs.shape == (2, 7, 6)
    np.testing.assert_array_equal(found.inputs[0, 0], [11, 12, 0, 14, 0, 0])
    np.testing.assert_array_equal(found.targets[0, 0], [111, 112, 0, 114, 0, 0])
    np.testing.assert_array_equal(found.inputs[0, 1], [12, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(found.targets[1, 3], [120, 121, 0, 0, 0, 0])
    np.testing.assert_array_equal(found.counted, found.targets > 0)
    assert not found.counted[:, 5:].any()  # deeper than a sequence is long
