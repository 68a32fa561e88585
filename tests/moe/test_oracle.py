"""The oracle judges everything else in this directory, so it is judged here first."""

from __future__ import annotations

import numpy as np
import pytest

from tests.moe.inputs import random_inputs
from tests.moe.oracle import Settings, moe_layer


@pytest.mark.parametrize("load_balance", ["maxtext", "gshard", "huggingface"])
@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
@pytest.mark.parametrize(("k", "renormalise"), [(1, False), (2, True), (2, False), (4, True)])
def test_gradients_are_those_of_finite_differences(
    load_balance: str, activation: str, k: int, renormalise: bool
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
    # float64 copies: the differences below are far under float32's resolution.
    arrays = {name: a.astype(np.float64) for name, a in {"x": inputs.x, **inputs.params}.items()}

    def answer():
        params = {name: a for name, a in arrays.items() if name != "x"}
        return moe_layer(arrays["x"], params, inputs.cotangent, settings)

    found = answer()
    assert k == 4 or found.dropped.sum() > 0
    rng, step = np.random.default_rng(5), 1e-6
    assert found.margin > 100 * step  # no choice flips under the steps below
    for name, array in arrays.items():
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


def test_a_dropped_choice_adds_nothing_and_keeps_its_share_of_the_weights() -> None:
    # One expert, top-1 of 2, all tokens alike: only the first of the row is seated.
    inputs = random_inputs(rows=1, tokens=4, model=3, hidden=5, experts=2)
    x = np.repeat(inputs.x[:, :1], 4, axis=1)
    settings = Settings(k=1, capacity_factor=0.5)
    found = moe_layer(x, inputs.params, inputs.cotangent, settings)
    assert found.dropped.tolist() == [3]
    assert np.abs(found.y[0, 0]).max() > 0
    np.testing.assert_array_equal(found.y[0, 1:], 0)
