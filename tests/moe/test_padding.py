"""Check that padding is as good as not there: every strategy equals the oracle on what is left.

The oracle gets each sequence without its padding, as a batch of its own, with as many slots of an
expert as the whole sequence has.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from moe_shard.config.strategies import find_strategy
from tests.moe.build import build_layer, mesh_of
from tests.moe.conftest import variants
from tests.moe.inputs import Dims, Inputs, random_inputs
from tests.moe.oracle import Answer, Settings, layer_capacity, moe_layer
from tests.moe.test_contract import ragged_all_to_all, route  # noqa: F401  (fixtures)
from tests.moe.test_factorisations import (
    ALL_MESHES,
    DEFAULT,
    SOME_MESHES,
    assert_equal_to_oracle,
    label,
)

DIMS: Dims = {"rows": 8, "tokens": 16, "model": 16, "hidden": 32, "experts": 8}
INPUTS = random_inputs(**DIMS)
REAL = np.arange(16) < np.array([16, 9, 1, 12, 4, 16, 7, 13])[:, None]
REAL[3, 5:8] = False  # not only at the end
assert REAL[:, 0].all()


def without_padding(inputs: Inputs, settings: Settings) -> Answer:
    """Compute each sequence's real tokens by themselves, and put the answers together."""
    rows, tokens, _ = inputs.x.shape
    slots = layer_capacity(tokens, inputs.params["kernel"].shape[1], settings)
    alone = dataclasses.replace(
        settings,
        capacity_factor=1e-9,
        min_capacity=slots,
        load_balance_weight=settings.load_balance_weight / rows,
        z_weight=settings.z_weight / rows,
    )
    parts = []
    for x, cotangent, real in zip(inputs.x, inputs.cotangent, REAL, strict=True):
        parts.append(moe_layer(x[real][None], inputs.params, cotangent[real][None], alone))
    y, dx = np.zeros(inputs.x.shape), np.zeros(inputs.x.shape)
    for row, part in enumerate(parts):
        y[row, REAL[row]], dx[row, REAL[row]] = part.y[0], part.grads["x"][0]
    grads = {
        name: np.sum([part.grads[name] for part in parts], axis=0)
        for name in parts[0].grads
        if name != "x"
    }
    return Answer(
        y=y,
        load_balance=np.concatenate([part.load_balance for part in parts]),
        z_loss=np.concatenate([part.z_loss for part in parts]),
        counts=np.concatenate([part.counts for part in parts]),
        dropped=np.concatenate([part.dropped for part in parts]),
        total=sum(part.total for part in parts),
        margin=min(part.margin for part in parts),
        grads=grads | {"x": dx},
    )


def check(
    sizes: dict[str, int], settings: Settings, *, inputs: Inputs = INPUTS, **kind: Any
) -> Answer:
    if not find_strategy(kind["dispatch"]).has_slots:
        settings = dataclasses.replace(settings, capacity_factor=-1.0)
    layer = build_layer(
        mesh_of(sizes), settings, flag=True, real=REAL, biases="down_bias" in inputs.params,
        **DIMS, **kind,
    )  # fmt: skip
    found, expected = layer.run(inputs), without_padding(inputs, settings)
    assert_equal_to_oracle(found, expected)
    np.testing.assert_array_equal(found.stats.tokens, REAL.sum(axis=1))
    assert not found.y[~REAL].any()
    assert not found.grads["x"][~REAL].any()
    return expected


@variants("ragged in chunks")
@pytest.mark.parametrize("sizes", [*SOME_MESHES, {"data": 8}], ids=label)
def test_padding_reaches_no_expert(sizes: dict[str, int], route: dict[str, Any]) -> None:  # noqa: F811
    expected = check(sizes, DEFAULT, **route)
    if find_strategy(route["dispatch"]).has_slots:
        assert 0 < expected.dropped.sum() < (expected.counts.sum() / 4)


@pytest.mark.parametrize("drop_policy", ["position", "probability"])
@pytest.mark.parametrize("sizes", SOME_MESHES, ids=label)
def test_padding_takes_no_capacity(sizes: dict[str, int], slotted: str, drop_policy: Any) -> None:
    settings = dataclasses.replace(DEFAULT, drop_policy=drop_policy, capacity_factor=0.5)
    assert check(sizes, settings, dispatch=slotted).dropped.sum() > 0


def test_padding_has_no_weights_on_the_input_and_no_biases(strategy: str) -> None:
    inputs = random_inputs(**DIMS, biases=("gate_bias", "up_bias", "down_bias"))
    settings = dataclasses.replace(DEFAULT, on_input=True)
    check(SOME_MESHES[1], settings, dispatch=strategy, inputs=inputs)


@pytest.mark.recorded
@pytest.mark.parametrize("sizes", ALL_MESHES, ids=label)
def test_every_factorisation_without_a_capacity(sizes: dict[str, int]) -> None:
    check(sizes, DEFAULT, dispatch="ragged")


def test_aligned_groups_without_an_exchange() -> None:
    check({"data": 8}, DEFAULT, dispatch="ragged", grouped_product="blocked")


def test_a_skewed_router_makes_further_rounds() -> None:
    x = INPUTS.x.copy()
    x[..., 0] = 3.0
    kernel = INPUTS.params["kernel"].copy()
    kernel[0] += np.array([4, 0, 0, 0, 0, 0, 0, 0], np.float32)
    skewed = dataclasses.replace(INPUTS, x=x, params=INPUTS.params | {"kernel": kernel})
    expected = check({"expert": 8}, dataclasses.replace(DEFAULT, k=1), dispatch="ragged",
                     inputs=skewed)  # fmt: skip
    assert expected.counts.sum(axis=0)[0] == REAL.sum()


def test_a_bounded_buffer_counts_the_dropped_tokens_only() -> None:
    x = np.where(REAL[..., None], INPUTS.x, 100.0).astype(np.float32)  # padding would be in excess
    layer = build_layer(
        mesh_of({"expert": 8}), DEFAULT, flag=True, dispatch="ragged", ragged_buffer_factor=1.0,
        real=REAL, **DIMS,
    )  # fmt: skip
    found = layer.run(dataclasses.replace(INPUTS, x=x))
    assert 0 <= found.stats.dropped.sum() < found.stats.expert_counts.sum() / 2
    assert found.stats.expert_counts.sum() == 2 * REAL.sum()
    assert not found.y[~REAL].any()


def test_forced_balance_routes_padding_as_the_tokens() -> None:
    layer = build_layer(
        mesh_of({"expert": 8}), DEFAULT, flag=True, dispatch="ragged", force_load_balance=True,
        real=REAL, **DIMS,
    )  # fmt: skip
    found = layer.run(INPUTS)
    assert found.stats.tokens is None
    assert found.stats.expert_counts.sum() == 2 * REAL.size
