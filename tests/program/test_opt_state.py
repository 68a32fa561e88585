"""The optimizer's state lies where it should, over the data axis too, and the numbers stay."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import numpy as np
import pytest

from moe_shard.lowering.reports import report_from_text
from moe_shard.models.params import ParamSpec
from moe_shard.program.opt_state import over_data
from moe_shard.program.step import make_program
from tests.models.build import QUICK, annotator, random_batch, random_params, small_config

MESH = {"data": 2, "fsdp": 2, "expert": 2}
SMALL = (
    "base_num_decoder_layers=1",
    "learning_rate=0.01",
    "warmup_steps_fraction=0",
    "adam_eps=1e-3",
)


def device_bytes(tree: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


@functools.cache
def two_steps(optimizer: str, over: str, *overrides: str) -> tuple[Any, Any, Any]:
    """Return the program, its HLO's report, and the parameters after two updates."""
    config = small_config(
        MESH, *SMALL, f"optimizer={optimizer}", f"shard_optimizer_over_data={over}", *overrides
    )
    sharding = annotator(config)
    program = make_program(config, sharding)
    step = program.step.lower(program.abstract_state, program.abstract_batch).compile(QUICK)
    places = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state)
    params = jax.device_put(random_params(config), places.params)
    count, opt_state = program.init_rest(params)
    state = type(program.abstract_state)(count, params, opt_state)
    for seed in range(2):
        state, _ = step(state, jax.device_put(random_batch(seed=seed), program.batch_sharding))
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == places
    report = report_from_text(step.as_text() or "", mesh=dict(sharding.mesh.shape), backend="cpu")
    return program, report, jax.device_get(state.params)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "muon"])
def test_a_state_over_data_gives_the_same_numbers_and_takes_half(optimizer: str) -> None:
    whole, _, expected = two_steps(optimizer, "false")
    parts, _, found = two_steps(optimizer, "true")
    assert parts.notes == ()
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, expected
    )
    for tree in ("params", "opt_state"):
        ratio = device_bytes(getattr(parts.abstract_state, tree)) / device_bytes(
            getattr(whole.abstract_state, tree)
        )
        assert 0.5 <= ratio < 0.52, (tree, ratio)


def test_parameters_are_gathered_over_data_and_experts_over_no_expert_axis() -> None:
    _, whole, _ = two_steps("adamw", "false")
    _, parts, _ = two_steps("adamw", "true")
    gathered = [
        sum("data" in each.axes and each.kind == "all-gather" for each in report.collectives)
        for report in (whole, parts)
    ]
    assert gathered[0] == 0 < gathered[1]
    assert whole.verdict == parts.verdict == "expert-parallel"


def test_moments_may_wait_on_the_host() -> None:
    _, _, expected = two_steps("adamw", "false")
    program, _, found = two_steps("adamw", "false", "optimizer_memory_host_offload=true")
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    state = program.abstract_state
    kinds = {
        (leaf.ndim > 0, leaf.sharding.memory_kind) for leaf in jax.tree.leaves(state.opt_state)
    }
    assert kinds == {(True, "pinned_host"), (False, "device")}
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.params)} == {"device"}
    assert [line for line in program.notes if "no effect" in line], "CPUs have one memory"


def test_factored_moments_lie_as_the_dims_that_they_have() -> None:
    config = small_config(
        MESH, "optimizer=adafactor", "base_emb_dim=128", "head_dim=32", "base_moe_mlp_dim=256"
    )
    state = make_program(config, annotator(config)).abstract_state
    names = {
        jax.tree_util.keystr(path): (leaf.shape, tuple(leaf.sharding.spec))
        for path, leaf in jax.tree_util.tree_flatten_with_path(state.opt_state)[0]
    }

    def of(field: str, name: str) -> Any:
        return next(found for path, found in names.items() if f".{field}[" in path and name in path)

    experts, fsdp = ("expert", "fsdp"), ("fsdp", "expert")
    # Of [layers, experts, model, hidden] the smaller dim of a matrix is in the rows.
    assert of("v_row", "['experts']['gate']") == ((3, 8, 128), (None, experts, None))
    assert of("v_col", "['experts']['gate']")[0] == (3, 8, 256)
    # Heads and their elements are one dim, on the axes of the heads.
    assert of("v_row", "['query']") == ((3, 128), (None, fsdp))
    assert of("v_col", "['query']")[0] == (3, 256)


def test_a_parameter_without_a_dim_for_the_data_axis_stays_whole() -> None:
    sharding = annotator(small_config({"data": 8}))

    def spec(name: str, *shape: int) -> ParamSpec:
        axes = ("layers", "norm", "norm")[: len(shape)]
        place = sharding.named_sharding(name, axes, shape)
        return ParamSpec(name, shape, np.float32, axes, place)

    specs = {"odd": spec("odd", 3, 6), "last": spec("last", 8, 6), "even": spec("even", 8, 16)}
    placed, whole = over_data(specs)
    assert whole == ("odd",)
    assert placed["odd"] == specs["odd"]
    # The dim of layers only where no other will do.
    found = {name: tuple(placed[name].sharding.spec) for name in ("last", "even")}
    assert found == {"last": ("data", None), "even": (None, "data")}
