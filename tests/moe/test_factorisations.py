"""Compare numbers, not specs: on every way to split eight devices the layer equals the oracle.

XLA has miscompiled this layer before (see `moe_shard/moe/placement.py`): every spec was right, and
half of the sequences were wrong. So each mesh x strategy x flag is a program that is run, and all
its outputs and gradients are compared with float64 NumPy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest

from moe_shard.config.moe_config import DropPolicy
from moe_shard.config.strategies import find_strategy
from tests.moe.build import Outputs, build_layer, mesh_of
from tests.moe.inputs import Dims, Inputs, random_inputs
from tests.moe.oracle import Answer, Settings, moe_layer

DIMS: Dims = {"rows": 8, "tokens": 16, "model": 16, "hidden": 32, "experts": 8}
INPUTS = random_inputs(**DIMS)
# The losses' weights are large enough that a wrong loss shows in the gradients.
DEFAULT = Settings(load_balance_weight=3.0, z_weight=0.5)
# Largest error of an array over its own largest element. Relative to each element would be no
# measure: an entry that is a difference of large terms has their rounding error, not its own.
# float32 leaves about 3e-7 here; a wrong sequence, weight or factor leaves 1e-2 or more.
TOLERANCE = 1e-5


def factorisations(devices: int, axes: tuple[str, ...]) -> Iterator[dict[str, int]]:
    """Yield every way to write `devices` as an ordered product over `axes`."""
    if len(axes) == 1:
        yield {axes[0]: devices}
        return
    for size in range(1, devices + 1):
        if devices % size == 0:
            for rest in factorisations(devices // size, axes[1:]):
                yield {axes[0]: size, **rest}


ALL_MESHES = list(factorisations(8, ("data", "fsdp", "tensor", "expert")))
MORE_MESHES = [
    {"fsdp_transpose": 8},
    {"fsdp_transpose": 2, "expert": 4},
    {"fsdp": 2, "fsdp_transpose": 2, "expert": 2},
    {"fsdp_transpose": 2, "tensor": 2, "expert": 2},
    {"context": 8},
    {"context": 2, "expert": 4},
    {"fsdp": 2, "context": 2, "expert": 2},
    {"tensor": 2, "context": 2, "expert": 2},
]
# One axis each, the pairs that exchange tokens, and the mesh that was miscompiled.
SOME_MESHES = [{"expert": 8}, {"fsdp": 2, "tensor": 2, "expert": 2}]


def label(sizes: Mapping[str, int]) -> str:
    return "-".join(f"{axis}{size}" for axis, size in sizes.items() if size > 1)


def assert_equal_to_oracle(found: Outputs, expected: Answer) -> None:
    # If two choices differed only by rounding, the comparison would be random.
    assert expected.margin > 1e-5 or expected.margin == 0
    np.testing.assert_array_equal(found.stats.expert_counts, expected.counts)
    np.testing.assert_array_equal(found.stats.dropped, expected.dropped)
    pairs = {
        "y": (found.y, expected.y),
        "load_balance": (found.load_balance, expected.load_balance.mean()),
        "z_loss": (found.stats.router_z_loss, expected.z_loss),
        **{f"d{name}": (found.grads[name], grad) for name, grad in expected.grads.items()},
    }
    errors = {
        # A gradient that nothing reaches, such as that of the correction bias, is zero in both.
        name: float(np.max(np.abs(got - want)) / (np.max(np.abs(want)) or 1))
        for name, (got, want) in pairs.items()
    }
    wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE}
    assert not wrong, f"relative errors {wrong}"
    # The sum over all tokens cancels; its terms do not.
    scale = np.sum(np.abs(expected.y))
    assert abs(float(found.total) - expected.total) <= TOLERANCE * scale


def check(
    sizes: Mapping[str, int],
    dispatch: str,
    flag: bool,
    settings: Settings = DEFAULT,
    inputs: Inputs = INPUTS,
    order: list[int] | None = None,
) -> Answer:
    if not find_strategy(dispatch).has_slots:
        settings = dataclasses.replace(settings, capacity_factor=-1.0)
    expected = moe_layer(inputs.x, inputs.params, inputs.cotangent, settings)
    layer = build_layer(
        mesh_of(sizes, order), settings, dispatch=dispatch, flag=flag, **DIMS,
        biases="down_bias" in inputs.params,
    )  # fmt: skip
    assert_equal_to_oracle(layer.run(inputs), expected)
    return expected


some_meshes = pytest.mark.parametrize("sizes", SOME_MESHES, ids=label)


def test_there_are_twenty_factorisations() -> None:
    assert len(ALL_MESHES) == 20
    assert len({label(sizes) for sizes in ALL_MESHES}) == 20


@pytest.mark.parametrize("sizes", ALL_MESHES, ids=label)
def test_every_factorisation(sizes: dict[str, int], strategy_and_flag: tuple[str, bool]) -> None:
    dispatch, flag = strategy_and_flag
    expected = check(sizes, dispatch, flag)
    # Every sequence drops choices, so drops are tested too; without a capacity, none does.
    assert (expected.dropped > 0).all() == find_strategy(dispatch).has_slots


@pytest.mark.parametrize("flag", [True, False], ids=["on", "off"])
@pytest.mark.parametrize("sizes", MORE_MESHES, ids=label)
def test_meshes_with_fsdp_transpose_and_context(sizes: dict[str, int], flag: bool) -> None:
    check(sizes, "gather", flag)


@pytest.mark.parametrize("sizes", MORE_MESHES[1::2], ids=label)
def test_meshes_with_fsdp_transpose_and_context_einsum(sizes: dict[str, int]) -> None:
    check(sizes, "einsum", True)


@pytest.mark.parametrize("sizes", MORE_MESHES, ids=label)
def test_meshes_with_fsdp_transpose_and_context_ragged(sizes: dict[str, int]) -> None:
    check(sizes, "ragged", True)


@some_meshes
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"capacity_factor": -1.0}, id="nothing-dropped"),
        pytest.param({"k": 1}, id="k1"),
        pytest.param({"k": 8}, id="k8"),
        pytest.param({"drop_policy": "probability"}, id="drop-by-probability"),
        pytest.param({"load_balance": "gshard", "capacity_rule": "gshard"}, id="gshard"),
        pytest.param({"load_balance": "huggingface"}, id="huggingface"),
        pytest.param({"capacity_factor": 0.25, "min_capacity": 3}, id="min-capacity"),
        pytest.param({"renormalise": False, "activation": "gelu"}, id="raw-weights-gelu"),
    ],
)
def test_every_setting(sizes: dict[str, int], slotted: str, changes: dict[str, Any]) -> None:
    settings = dataclasses.replace(DEFAULT, **changes)
    expected = check(sizes, slotted, True, settings)
    if settings.capacity_factor < 0 or settings.k == 8:  # k = E: every expert gets every token
        assert expected.dropped.sum() == 0
    else:
        assert expected.dropped.sum() > 0


def test_a_permuted_device_order(strategy_and_flag: tuple[str, bool]) -> None:
    dispatch, flag = strategy_and_flag
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    check({"fsdp": 2, "tensor": 2, "expert": 2}, dispatch, flag, order=order)


@some_meshes
@pytest.mark.parametrize("drop_policy", ["position", "probability"])
def test_ties_go_to_the_first(sizes: dict[str, int], slotted: str, drop_policy: DropPolicy) -> None:
    # Tokens repeat, so equal choices compete for one expert's slots; router columns repeat, so
    # every token has experts of equal probability. The values are small multiples of 1/8, exact
    # in float32 in any order of summation, so that ties are ties on every mesh.
    x = np.round(8 * INPUTS.x).clip(-16, 16) / 8
    x[:, 8:] = x[:, :8]
    kernel = np.round(8 * INPUTS.params["kernel"]) / 8
    kernel[:, 4:] = kernel[:, :4]
    inputs = dataclasses.replace(INPUTS, x=x, params={**INPUTS.params, "kernel": kernel})
    settings = dataclasses.replace(DEFAULT, drop_policy=drop_policy, k=3)
    expected = check(sizes, slotted, True, settings, inputs)
    assert expected.margin == 0
    assert expected.dropped.sum() > 0


@some_meshes
@pytest.mark.parametrize("on_input", [False, True], ids=["weighed-after", "weighed-before"])
def test_biases_of_empty_slots_and_dropped_choices_reach_nothing(
    sizes: dict[str, int], slotted: str, on_input: bool
) -> None:
    inputs = random_inputs(**DIMS, biases=("gate_bias", "up_bias", "down_bias"))
    settings = dataclasses.replace(DEFAULT, on_input=on_input, offset=1.0)
    expected = check(sizes, slotted, True, settings, inputs)
    # Some experts overflow in sequences in which others have room.
    assert expected.dropped.sum() > 0
    assert expected.counts.min() < expected.counts.max()
