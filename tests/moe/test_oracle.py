"""Check the oracle, which judges everything else in this directory."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from moe_shard.config.moe_config import LoadBalanceLoss
from tests.moe.inputs import Inputs, random_inputs
from tests.moe.oracle import FURTHER, Answer, Settings, moe_layer


@pytest.mark.parametrize("load_balance", ["maxtext", "gshard", "huggingface"])
@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
@pytest.mark.parametrize(("k", "renormalise"), [(1, False), (2, True), (2, False), (4, True)])
def test_gradients_are_those_of_finite_differences(
    load_balance: LoadBalanceLoss, activation: str, k: int, renormalise: bool
) -> None:
    inputs = random_inputs(rows=2, tokens=6, model=5, hidden=7, experts=4)
    settings = Settings(
        k=k,
        renormalise=renormalise,
        activation=activation,
        load_balance=load_balance,
        load_balance_weight=0.7,
        z_weight=0.3,
    )
    found = assert_gradients(inputs, settings)
    assert k == 4 or found.dropped.sum() > 0


def assert_gradients(inputs: Inputs, settings: Settings) -> Answer:
    # float64 copies: the differences below are far under float32's resolution.
    arrays = {name: a.astype(np.float64) for name, a in {"x": inputs.x, **inputs.params}.items()}

    def answer() -> Answer:
        params = {name: a for name, a in arrays.items() if name != "x"}
        return moe_layer(arrays["x"], params, inputs.cotangent, settings)

    found = answer()
    rng, step = np.random.default_rng(5), 1e-6
    assert found.margin > 100 * step  # no choice flips under the steps below
    for name, array in arrays.items():
        if name == "correction":  # it only chooses experts
            assert not found.grads[name].any()
            continue
        for _ in range(6):
            at = tuple(rng.integers(size) for size in array.shape)
            value = array[at]
            array[at] = value + step
            above = answer().total
            array[at] = value - step
            below = answer().total
            array[at] = value
            expected = (above - below) / (2 * step)
            np.testing.assert_allclose(found.grads[name][at], expected, rtol=2e-6, atol=2e-7)
    return found


SIGMOID = Settings(
    score="sigmoid", groups=4, kept_groups=2, group_score="top2_sum", scaling=2.5, k=3
)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(SIGMOID, id="sigmoid-groups"),
        pytest.param(dataclasses.replace(SIGMOID, renormalise=False), id="sigmoid-raw"),
        pytest.param(Settings(limit=0.7, offset=1.0), id="clamped"),
        pytest.param(Settings(on_input=True, renormalise=False, score="sigmoid"), id="on-input"),
        pytest.param(Settings(on_input=True), id="on-input-softmax"),
    ],
)
def test_gradients_of_what_few_models_have(settings: Settings) -> None:
    inputs = random_inputs(rows=2, tokens=6, model=5, hidden=7, experts=8, biases=FURTHER)
    settings = dataclasses.replace(
        settings, capacity_factor=-1.0, load_balance_weight=0.7, z_weight=0.3
    )
    assert_gradients(inputs, settings)


def test_a_dropped_choice_adds_nothing_and_keeps_its_share_of_the_weights() -> None:
    # Top-1 of 2, all tokens alike: only the first token of the sequence gets a slot.
    inputs = random_inputs(rows=1, tokens=4, model=3, hidden=5, experts=2)
    x = np.repeat(inputs.x[:, :1], 4, axis=1)
    settings = Settings(k=1, capacity_factor=0.5)
    found = moe_layer(x, inputs.params, inputs.cotangent, settings)
    assert found.dropped.tolist() == [3]
    assert np.abs(found.y[0, 0]).max() > 0
    np.testing.assert_array_equal(found.y[0, 1:], 0)
