"""Collecting the partitioner's warnings from descriptor 2, and reading them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moe_shard.lowering.hlo import parse_module
from moe_shard.lowering.remat_warnings import parse, summarize
from moe_shard.runtime.compile import compile_step, report_step
from moe_shard.sharding.annotate import Sharding
from moe_shard.sharding.rules import RuleTable

PREFIX = "W1123 19:49:21.971898   28609 spmd_partitioner.cc:656] [SPMD] "
MARK = "Involuntary full rematerialization."
TAIL = "As the last resort, SPMD will replicate the tensor and then partition it."
# As jax 0.10.2 prints them; the tails are shortened.
NAMED = (
    f"{PREFIX}{MARK} The compiler cannot go from sharding {{devices=[2,1,4]<=[8]}} to "
    "{devices=[1,8,1]<=[2,4]T(1,0)} efficiently for HLO operation %sharding_constraint.2 = "
    "f32[8,16,4]{2,1,0} copy(%sin.0), sharding={devices=[2,1,4]<=[8]}, "
    'metadata={op_name="jit(f)/transpose(jvp(embedding))/sharding_constraint" stack_frame_id=1}. '
    + TAIL
)
NAMELESS = (
    f"{PREFIX}{MARK} The compiler cannot go from sharding {{devices=[8,1,1]<=[8]}} to "
    "{devices=[1,1,4,2]<=[2,4]T(1,0) last_tile_dim_replicate} efficiently for HLO operation "
    "%fake_parameter.2 = f32[4,128,128]{2,1,0} parameter(2), sharding={devices=[8,1,1]<=[8]}. "
    + TAIL
)
# As the jax of 2023 worded it.
OLDER = (
    f"2023-09-01 10:00:00.000000: E spmd_partitioner.cc:613] [spmd] {MARK} The compiler was not "
    "able to go from sharding {devices=[2,2,2]0,1,2,3,4,5,6,7 last_tile_dim_replicate} to "
    "{devices=[8,1]0,1,2,3,4,5,6,7} without doing a full rematerialization of the tensor for HLO "
    "operation: %dot.5 = bf16[64,32]{1,0:T(8,128)(2,1)} dot(%a, %b), metadata="
    '{op_name="jit(step)/jvp(experts)/dot_general" source_file="/a/b/layer.py" source_line=7}. '
    "You probably want to enrich the sharding annotations to prevent this from happening."
)
MODULE = """HloModule jit_f

FileNames
1 "/home/me/model/layer.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=12 end_line=12 column=2 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}

ENTRY %main (p: f32[2]) -> f32[2] {
  ROOT %p = f32[2]{0} parameter(0)
}
"""


def test_every_part_of_a_line() -> None:
    found = parse(NAMED, parse_module(MODULE))
    assert found is not None
    assert found.from_sharding == "{devices=[2,1,4]<=[8]}"
    assert found.to_sharding == "{devices=[1,8,1]<=[2,4]T(1,0)}"
    assert (found.shape, found.bytes) == ("f32[8,16,4]", 8 * 16 * 4 * 4)
    assert found.replicated_bytes == 16**3 * 4
    assert (found.op, found.scope, found.pass_) == ("copy", "embedding", "backward")
    assert found.op_name == "jit(f)/transpose(jvp(embedding))/sharding_constraint"
    assert found.source == "/home/me/model/layer.py:12"


def test_a_line_without_metadata() -> None:
    found = parse(NAMELESS, parse_module(MODULE))
    assert found is not None
    assert (found.shape, found.bytes) == ("f32[4,128,128]", 262_144)
    assert found.replicated_bytes == 8 * 262_144
    assert (found.op, found.op_name, found.source) == ("parameter", "", None)
    assert (found.scope, found.pass_) == ("other", "unknown")
    assert found.to_sharding.endswith("last_tile_dim_replicate}")


def test_the_older_wording() -> None:
    found = parse(OLDER)
    assert found is not None
    assert (found.shape, found.bytes) == ("bf16[64,32]", 4096)
    assert found.replicated_bytes == 2 * 2 * 4096  # the last of the three tiles are copies
    assert (found.op, found.scope, found.source) == ("dot", "experts", "/a/b/layer.py:7")


def test_a_frame_of_another_module_gives_no_source() -> None:
    found = parse(NAMED.replace("stack_frame_id=1", "stack_frame_id=99"), parse_module(MODULE))
    assert found is not None
    assert found.source is None


@settings(max_examples=200)
@given(st.sampled_from([NAMED, NAMELESS, OLDER]), st.data())
def test_a_damaged_line_is_read_or_refused_and_never_breaks(line: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(line)))
    end = data.draw(st.integers(start, len(line)))
    damaged = line[:start] + data.draw(st.text(max_size=5)) + line[end:]
    found = parse(damaged)
    assert found is None or found.bytes >= 0
    assert len(summarize([damaged])) <= 1


def test_one_sentence_for_each_scope_the_costliest_first() -> None:
    more = NAMED.replace("f32[8,16,4]", "f32[2,2,2]")
    assert summarize([NAMED, "not the partitioner's", more, NAMELESS, OLDER]) == [
        "involuntary full rematerialization: 1 outside the named stages (f32[4,128,128], 262 kB): "
        "the partitioner replicates this tensor to re-shard it; a constraint between the two "
        "layouts avoids it",
        "involuntary full rematerialization: 1 in experts (bf16[64,32], 4.1 kB) at "
        "/a/b/layer.py:7: the partitioner replicates this tensor to re-shard it; a constraint "
        "between the two layouts avoids it",
        "involuntary full rematerialization: 2 in embedding (largest f32[8,16,4], 2.0 kB): "
        "the partitioner replicates these tensors to re-shard them; a constraint between the two "
        "layouts avoids it",
    ]
    (unread,) = summarize([f"{PREFIX}{MARK} In other words."])
    assert "1 in a wording of the compiler that is unknown" in unread


def conflicting_step(mesh: Mesh) -> Any:
    """A step whose tensor is asked to lie in two layouts without a way between them."""

    def pin(x: jax.Array, *spec: str | tuple[str, ...] | None) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))

    def step(state: jax.Array, batch: jax.Array) -> jax.Array:
        with jax.named_scope("embedding"):
            x = pin(jnp.sin(state + batch), "data", None, "expert")
            return pin(x * 2, None, ("expert", "data"), None)

    return step


def test_the_report_of_a_step_says_it_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    mesh = Mesh(
        np.array(jax.devices()).reshape(2, 4), ("data", "expert"), axis_types=(AxisType.Auto,) * 2
    )
    x = jax.ShapeDtypeStruct((16, 16, 16), jnp.float32)
    step = jax.jit(conflicting_step(mesh))
    program: Any = SimpleNamespace(step=step, abstract_state=x, abstract_batch=x)
    compiled = compile_step(program)
    report = report_step(compiled, Sharding(mesh, RuleTable([("exp", ("expert",))])), "cpu")
    (line,) = (line for line in report.warnings if "rematerialization" in line)
    assert line.startswith(
        "involuntary full rematerialization: 1 in embedding (f32[8,16,4], 2.0 kB) at "
    )
    assert f"{Path(__file__).name}:" in line
    assert capfd.readouterr().err == ""
    assert set(report.to_json()) == {
        *("backend", "num_devices", "mesh", "verdict", "collectives", "totals", "memory")
    }
