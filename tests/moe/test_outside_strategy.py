"""Hold a strategy from one file outside the package to the contract of the package's own.

The tests are those of the contract, imported; nothing else is edited for it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

import pytest

from moe_shard.config.checks import check_against_mesh
from moe_shard.config.load import load_config
from moe_shard.config.strategies import StrategyEntry, find_strategy, unregister_strategy
from moe_shard.errors import UserError
from moe_shard.lowering.reports import report_from_text
from moe_shard.moe.capacity import copies_per_sequence
from tests.moe import test_contract
from tests.moe.build import build_layer, mesh_of
from tests.moe.test_contract import (  # noqa: F401  (pytest finds fixtures by their name here)
    DIMS,
    WHOLE,
    ragged_all_to_all,
    route,
)
from tests.moe.test_factorisations import (  # noqa: F401  (collected here)
    test_a_permuted_device_order,
    test_biases_of_empty_slots_and_dropped_choices_reach_nothing,
    test_every_factorisation,
    test_ties_go_to_the_first,
)

# Every test of the contract that is for all strategies, also those added later.
globals().update(
    {
        name: test
        for name, test in vars(test_contract).items()
        if name.startswith("test_") and "route" in inspect.signature(test).parameters
    }
)


@contextmanager
def registered() -> Iterator[StrategyEntry]:
    """Import the file, and unregister its strategy afterwards."""
    import_module("tests.moe.outside_strategy")
    try:
        yield find_strategy("outside")
    finally:
        unregister_strategy("outside")
        del sys.modules["tests.moe.outside_strategy"]


with registered() as entry:
    UNDER_TEST = [entry]


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    with registered():
        yield


def test_its_record_and_its_program_agree() -> None:
    layer = build_layer(mesh_of({"expert": 8}), WHOLE, dispatch="outside", flag=False, **DIMS)
    record = layer.record()
    assert (record.strategy, record.transport) == ("outside", "all-to-all")
    assert record.not_taken["singleton"] == "expert axis of 8"
    report = report_from_text(layer.lower().compile().as_text(), mesh={"expert": 8})
    assert report.verdict == "expert-parallel"
    assert report.totals["all-to-all"]["count"] == 4


def test_the_rest_of_the_package_knows_it_by_its_entry() -> None:
    overrides = ["moe_dispatch=outside", "ici_expert_parallelism=8", "ragged_transport=padded"]
    config = load_config("mixtral-tiny", [*overrides, "moe_dispatch_no_expert_sharding=true"])
    assert check_against_mesh(config, config.mesh.resolve(8)) == (
        "moe_dispatch_no_expert_sharding=true has no effect: "
        "moe_dispatch=outside moves tokens in any case",
        "ragged_transport=padded has no effect: moe_dispatch=outside does not read it",
    )
    moe = config.model.moe
    assert moe is not None
    twin = load_config("mixtral-tiny", ["moe_dispatch=gather"]).model.moe
    assert twin is not None
    assert copies_per_sequence(moe, tokens=64) == copies_per_sequence(twin, tokens=64)


def test_a_split_sequence_is_refused() -> None:
    layer = build_layer(
        mesh_of({"context": 2, "expert": 4}), WHOLE, dispatch="outside", flag=True, **DIMS
    )
    with pytest.raises(UserError, match="a sequence is split over context"):
        layer.lower()
