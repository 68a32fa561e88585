"""Check one contract for every strategy: outputs and gradients are right for any routing.

Nothing is dropped here (the capacity strategies have as many slots as a sequence has tokens), so
that all strategies must give the same numbers. Every factorisation of the devices is tried in
`test_factorisations.py`; here are the difficult routings, on meshes of each kind.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest

from moe_shard.config import strategies
from moe_shard.config.strategies import find_strategy
from moe_shard.errors import UserError
from moe_shard.moe.dispatch.ragged import Ragged
from moe_shard.sharding.annotate import Sharding
from tests.moe import emulation
from tests.moe.build import Outputs, build_layer, mesh_of
from tests.moe.conftest import EMULATED, variants
from tests.moe.inputs import Dims, Inputs, random_inputs
from tests.moe.oracle import Answer, Settings, moe_layer
from tests.moe.test_factorisations import assert_equal_to_oracle, label

DIMS: Dims = {"rows": 8, "tokens": 16, "model": 16, "hidden": 32, "experts": 8}
WHOLE = Settings(capacity_factor=-1.0, load_balance_weight=3.0, z_weight=0.5)
MESHES = [{"expert": 8}, {"fsdp": 2, "tensor": 2, "expert": 2}]
MORE_MESHES = [*MESHES, {"data": 2, "expert": 4}]
# One mesh without an expert group, and meshes with all kinds of axes but one.
SINGLETONS = [{"data": 8}, {"fsdp": 4, "tensor": 2}]
every_mesh = pytest.mark.parametrize("sizes", MESHES, ids=label)


@pytest.fixture
def ragged_all_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Emulate the ragged all-to-all of TPU and GPU."""
    monkeypatch.setattr(Sharding, "platform", "tpu")
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulation.ragged_all_to_all)


def set_check_vma(monkeypatch: pytest.MonkeyPatch, check_vma: bool) -> None:
    """Set whether JAX checks which values `ragged` declares equal on all devices."""
    entry = find_strategy("ragged")
    changed = dataclasses.replace(entry, make=partial(Ragged, check_vma=check_vma))
    monkeypatch.setitem(strategies._entries, "ragged", changed)


@pytest.fixture
def route(variant: str, request: pytest.FixtureRequest) -> dict[str, Any]:
    """Return the settings of a variant."""
    settings: dict[str, Any] = {"dispatch": variant.split()[0]}
    if variant == EMULATED:
        request.getfixturevalue("ragged_all_to_all")
        settings["grouped_product"] = "blocked"  # the TPU kernel does not run here
    elif variant == "ragged without check_vma":
        set_check_vma(request.getfixturevalue("monkeypatch"), False)
    elif variant == "ragged in chunks":
        settings["num_moe_token_chunks"] = 2
    return settings


def run(
    sizes: dict[str, int], settings: Settings, inputs: Inputs, dims: Dims, **route: Any
) -> tuple[Outputs, Answer]:
    layer = build_layer(mesh_of(sizes), settings, flag=True, **dims, **route)
    return layer.run(inputs), moe_layer(inputs.x, inputs.params, inputs.cotangent, settings)


def check(sizes: dict[str, int], settings: Settings, inputs: Inputs, **route: Any) -> Answer:
    rows, tokens, model = inputs.x.shape
    experts, _, hidden = inputs.params["gate"].shape
    dims: Dims = {
        "rows": rows, "tokens": tokens, "model": model, "hidden": hidden, "experts": experts
    }  # fmt: skip
    route |= {
        "router_bias": "router_bias" in inputs.params,
        "routed_bias": "correction" in inputs.params,
        "biases": "down_bias" in inputs.params,
    }
    found, expected = run(sizes, settings, inputs, dims, **route)
    assert_equal_to_oracle(found, expected)
    assert expected.dropped.sum() == 0
    return expected


def towards(bias: list[float], **dims: Any) -> Inputs:
    """Draw random inputs whose router prefers some experts."""
    inputs = random_inputs(**(DIMS | dims))
    x, params = inputs.x.copy(), {name: value.copy() for name, value in inputs.params.items()}
    x[..., 0] = 3.0
    params["kernel"][0] += np.array(bias, np.float32)
    return dataclasses.replace(inputs, x=x, params=params)


@every_mesh
@pytest.mark.parametrize("k", [1, 2, 8])
def test_top_k(sizes: dict[str, int], route: dict[str, Any], k: int) -> None:
    check(sizes, dataclasses.replace(WHOLE, k=k), random_inputs(**DIMS), **route)


@pytest.mark.parametrize(
    ("sizes", "dispatch"), [(MESHES[0], "ragged"), (MESHES[1], "gather")], ids=str
)
def test_experts_without_a_gate(sizes: dict[str, int], dispatch: str) -> None:
    """Their relu, squared, is a relu of a gate that equals the up projection, times it."""
    inputs = random_inputs(**DIMS)
    both = inputs.params | {"gate": inputs.params["up"]}
    expected = moe_layer(
        inputs.x, both, inputs.cotangent, dataclasses.replace(WHOLE, activation="relu")
    )
    expected.grads["up"] = expected.grads["up"] + expected.grads.pop("gate")
    alone = {name: each for name, each in both.items() if name != "gate"}
    squared = dataclasses.replace(WHOLE, activation="relu2")
    layer = build_layer(
        mesh_of(sizes), squared, flag=True, **DIMS, dispatch=dispatch, gate=False,
        prefuse_moe_weights=True,
    )  # fmt: skip
    found = layer.run(dataclasses.replace(inputs, params=alone))
    assert_equal_to_oracle(found, expected)


@every_mesh
def test_an_odd_number_of_tokens(sizes: dict[str, int], route: dict[str, Any]) -> None:
    # A device has 1 or 2 sequences of 13 tokens: not a power of two, and not a multiple of a block.
    check(sizes, WHOLE, random_inputs(**(DIMS | {"tokens": 13})), **route)


@every_mesh
def test_experts_without_a_token(sizes: dict[str, int], route: dict[str, Any]) -> None:
    bias = [0.3, -9, 0.3, 0, -9, 0.3, 0, 0]
    expected = check(sizes, WHOLE, towards(bias), **route)
    assert (expected.counts.sum(axis=0)[[1, 4]] == 0).all()


@every_mesh
def test_all_tokens_to_one_expert(sizes: dict[str, int], route: dict[str, Any]) -> None:
    # Far beyond the bound of one exchange: further rounds run until everything is exchanged.
    inputs = towards([2, 0, 0, 0, 0, 0, 0, 0], tokens=64)
    expected = check(sizes, dataclasses.replace(WHOLE, k=1), inputs, **route)
    assert expected.counts.sum(axis=0)[0] == 8 * 64


@variants("ragged without check_vma", "ragged in chunks")
@pytest.mark.parametrize("sizes", MORE_MESHES, ids=label)
def test_a_skewed_router(sizes: dict[str, int], route: dict[str, Any]) -> None:
    inputs = towards([0.4 * e for e in range(8)], tokens=128)
    expected = check(sizes, WHOLE, inputs, **route)
    assert expected.counts.sum(axis=0).max() > 3 * expected.counts.sum(axis=0).mean()


@every_mesh
def test_duplicates_and_ties(sizes: dict[str, int], route: dict[str, Any]) -> None:
    # Exact in float32 in any order of summation, so that ties are ties on every mesh.
    inputs = random_inputs(**DIMS)
    x = np.round(8 * inputs.x).clip(-16, 16) / 8
    x[:, 8:] = x[:, :8]
    kernel = np.round(8 * inputs.params["kernel"]) / 8
    kernel[:, 4:] = kernel[:, :4]
    tied = dataclasses.replace(inputs, x=x, params={**inputs.params, "kernel": kernel})
    assert check(sizes, dataclasses.replace(WHOLE, k=3), tied, **route).margin == 0


@pytest.mark.parametrize("sizes", SINGLETONS, ids=label)
def test_without_an_expert_group(sizes: dict[str, int], route: dict[str, Any]) -> None:
    check(sizes, WHOLE, towards([0.4 * e for e in range(8)]), **route)


@every_mesh
@pytest.mark.parametrize(("tokens", "k"), [(16, 2), (14, 3)], ids=["even", "uneven"])
def test_forced_balance(sizes: dict[str, int], route: dict[str, Any], tokens: int, k: int) -> None:
    settings = dataclasses.replace(WHOLE, k=k, round_robin=True)
    inputs = random_inputs(**(DIMS | {"tokens": tokens}))
    check(sizes, settings, inputs, force_load_balance=True, **route)


FAMILIES = {
    # as DeepSeek-V3 routes
    "groups": (
        Settings(
            score="sigmoid", k=3, groups=4, kept_groups=2, group_score="top2_sum", scaling=2.5
        ),
        ("correction",),
    ),
    # as GPT-OSS
    "biases": (
        Settings(limit=0.7, offset=1.0),
        ("router_bias", "gate_bias", "up_bias", "down_bias"),
    ),
    # as Llama 4, but with two experts a token and biases, which is a harder case
    "on-input": (
        Settings(score="sigmoid", renormalise=False, on_input=True),
        ("gate_bias", "up_bias", "down_bias"),
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@every_mesh
def test_what_published_models_have(
    sizes: dict[str, int], route: dict[str, Any], family: str
) -> None:
    settings, biases = FAMILIES[family]
    settings = dataclasses.replace(
        settings, capacity_factor=-1.0, load_balance_weight=3.0, z_weight=0.5
    )
    check(sizes, settings, random_inputs(**DIMS, biases=biases), **route)


@variants(without="einsum")  # in this test it does not differ from gather
@pytest.mark.parametrize("sizes", [SINGLETONS[1], MESHES[1]], ids=label)
@pytest.mark.parametrize("fast", ["force_load_balance", "prefuse_moe_weights"])
def test_fast_paths_have_biases_and_weights_on_the_input(
    sizes: dict[str, int], route: dict[str, Any], fast: str
) -> None:
    forced = fast == "force_load_balance"
    settings = dataclasses.replace(WHOLE, on_input=True, round_robin=forced)
    inputs = random_inputs(**DIMS, biases=("gate_bias", "up_bias", "down_bias"))
    check(sizes, settings, inputs, **{fast: True}, **route)


def test_chunks_have_biases_and_weights_on_the_input() -> None:
    settings = dataclasses.replace(WHOLE, on_input=True)
    inputs = random_inputs(**DIMS, biases=("gate_bias", "up_bias", "down_bias"))
    check(MESHES[1], settings, inputs, dispatch="ragged", num_moe_token_chunks=2)


def test_a_skewed_router_with_biases_makes_further_rounds() -> None:
    inputs = random_inputs(
        **(DIMS | {"tokens": 64}), biases=("router_bias", "down_bias", "gate_bias", "up_bias")
    )
    inputs.params["router_bias"] += np.array([3, 0, 0, 0, 0, 0, 0, 0], np.float32)
    expected = check({"expert": 8}, dataclasses.replace(WHOLE, k=1), inputs, dispatch="ragged")
    assert expected.counts.sum(axis=0)[0] > 0.8 * 8 * 64


@every_mesh
def test_fused_gate_and_up(sizes: dict[str, int], route: dict[str, Any]) -> None:
    check(sizes, WHOLE, random_inputs(**DIMS), prefuse_moe_weights=True, **route)


@pytest.mark.parametrize("product", ["blocked", "ragged_dot", "pallas"])
@pytest.mark.parametrize(
    "sizes",
    [{"data": 8}, {"data": 2, "expert": 4}, {"fsdp": 2, "tensor": 2, "expert": 2}],
    ids=label,
)
def test_every_grouped_product(sizes: dict[str, int], product: str) -> None:
    inputs = towards([0.5 * e for e in range(8)])
    check(sizes, WHOLE, inputs, dispatch="ragged", grouped_product=product)


def test_chunks_that_do_not_come_out_even_are_refused() -> None:
    with pytest.raises(UserError, match="num_moe_token_chunks=3 does not divide the 16 tokens"):
        check(
            {"expert": 8}, WHOLE, random_inputs(**DIMS), dispatch="ragged", num_moe_token_chunks=3
        )
