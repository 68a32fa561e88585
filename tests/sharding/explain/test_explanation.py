"""Compare explanations of placements with hand counts and with jax's own shards."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from rich.console import Console

from moe_shard.config import load_config
from moe_shard.config.foreign import read_foreign_table, take_sizes
from moe_shard.errors import UserError
from moe_shard.runtime.explained import explain_config, explain_table
from moe_shard.sharding.annotate import AnnotatedArray
from moe_shard.sharding.explain.explanation import Explanation, explain
from moe_shard.sharding.explain.printed import print_explanation

AXES = ("data", "fsdp", "tensor", "expert")
Rules = list[tuple[str, tuple[str, ...]]]
SIZES = {"data": 2, "fsdp": 1, "tensor": 1, "expert": 4}
RULES: Rules = [
    ("batch", ("data", "expert")),
    ("exp", ("expert",)),
    ("mlp", ("tensor",)),
]


def of(
    rules: Rules,
    *arrays: AnnotatedArray,
    sizes: dict[str, int] | None = None,
    assumed: bool = False,
) -> Explanation:
    return explain(
        model="m",
        table="t",
        rules=rules,
        mesh_axes=AXES,
        sizes=sizes or SIZES,
        arrays=arrays,
        parameters=["w"],
        sizes_are_assumed=assumed,
    )


def array(name: str, *axes: str | None, size: int = 8, said: str = "") -> AnnotatedArray:
    return AnnotatedArray(name, axes, (size,) * len(axes), jnp.bfloat16, said)


def printed(explanation: Explanation) -> str:
    buffer = io.StringIO()
    print_explanation(explanation, Console(file=buffer, width=100, highlight=False))
    return buffer.getvalue()


def test_an_array_counted_by_hand() -> None:
    found = of(RULES, array("w", "exp", None, "mlp"), array("x", "batch", "mlp"))
    (w,), (x,) = found.parameters, found.activations
    assert (w.shard_shape, w.bytes, w.bytes_per_device) == ((2, 8, 8), 1024, 256)
    assert (x.shard_shape, x.bytes_per_device) == ((1, 8), 16)
    data = found.to_json()
    assert data["parameters"][0] == {
        "name": "w",
        "dtype": "bfloat16",
        "shape": [8, 8, 8],
        "logical_axes": ["exp", None, "mlp"],
        "spec": [["expert"], [], []],
        "shard_shape": [2, 8, 8],
        "bytes": 1024,
        "bytes_per_device": 256,
        "dims": [
            {
                "logical_axis": "exp",
                "size": 8,
                "shard": 2,
                "mesh_axes": ["expert"],
                "won": {"row": 2, "logical_axis": "exp", "mesh_axes": ["expert"]},
                "lost": [],
            },
            {
                "logical_axis": None,
                "size": 8,
                "shard": 8,
                "mesh_axes": [],
                "won": None,
                "lost": [],
            },
            {
                "logical_axis": "mlp",
                "size": 8,
                "shard": 8,
                "mesh_axes": [],
                "won": {"row": 3, "logical_axis": "mlp", "mesh_axes": ["tensor"]},
                "lost": [],
            },
        ],
    }
    assert data["expert_axes"] == ["expert"]
    assert data["num_devices"] == 8
    assert not data["conflicts"]
    assert found.is_strict


def test_a_conflict_with_cause_consequence_and_fix() -> None:
    said = "weights will be gathered; flag=true moves tokens"
    pair = [array(name, "exp", "batch", said=said) for name in ("in", "out")]
    (conflict,) = of(RULES, *pair).conflicts
    assert (conflict.dim, conflict.arrays, conflict.axes) == ("exp", ("in", "out"), ("expert",))
    assert conflict.cause == (
        "rule 2 ['exp', [expert]] lost expert to 'batch', "
        "placed by rule 1 ['batch', [data, expert]]"
    )
    assert conflict.consequence == "weights will be gathered"
    assert conflict.fix == "flag=true moves tokens"
    # Two arrays of 8 x 8 bfloat16: batch splits one dim in 8; exp would split them in 4 more.
    assert (conflict.bytes_per_device, conflict.bytes_if_won) == (2 * 16, 2 * 4)
    text = printed(of(RULES, *pair))
    assert "'exp' of in, out stays unsharded" in text
    assert "costs: 32 B a device in 2 arrays where 8 B would do" in text
    assert "rule 2 lost expert" in text


@pytest.mark.parametrize(
    ("rules", "fix"),
    [
        (
            RULES,
            "leave expert out of rule 1, or move rule 2 above it (then 'batch' stays unsharded)",
        ),
        (
            [*RULES, ("batch", ("data",))],
            "move rule 2 above rule 1: rule 4 [data] then serves 'batch'",
        ),
        (
            [("batch", ("data", "expert")), ("exp", ("expert", "tensor"))],
            "add ['exp', [tensor]] below rule 2, or leave expert out of rule 1",
        ),
    ],
)
def test_a_fix_where_the_layer_knows_none(rules: Rules, fix: str) -> None:
    sizes = {**SIZES, "tensor": 2}
    (conflict,) = of(rules, array("x", "exp", "batch"), sizes=sizes).conflicts
    assert conflict.fix == fix
    assert conflict.consequence.startswith("every device holds ")


def test_a_layers_words_are_of_its_first_dim() -> None:
    rules: Rules = [("exp", ("expert",)), ("batch", ("data", "expert"))]
    (conflict,) = of(rules, array("x", "exp", "batch", said="all is lost; pray")).conflicts
    assert conflict.dim == "batch"
    assert conflict.consequence == "every device holds 8 times as much of it"
    assert conflict.fix == "add ['batch', [data]] below rule 2, or leave expert out of rule 1"


def test_the_fix_of_moving_rules_works() -> None:
    rules: Rules = [*RULES, ("batch", ("data",))]
    moved = [rules[1], rules[0], *rules[2:]]
    found = of(moved, array("x", "exp", "batch"))
    assert not found.conflicts
    assert found.activations[0].resolution.spec == PartitionSpec("expert", "data")


def test_an_alternative_row_is_reported_and_no_conflict() -> None:
    rules: Rules = [*RULES, ("exp", ("tensor",))]
    found = of(rules, array("x", "exp", "batch"), sizes={**SIZES, "tensor": 2})
    assert not found.conflicts
    (note,) = (lint for lint in found.lint if lint.kind == "alternative")
    assert note.rules == (2, 4)
    assert note.text == (
        "'exp' and 'batch' both want expert in x: 'batch' has it, rule 4 [tensor] is used instead "
        "of rule 2"
    )


def test_a_row_that_does_not_divide_is_reported_and_no_conflict() -> None:
    rules: Rules = [("exp", ("expert", "data")), *RULES]
    found = of(rules, array("w", "exp", None, size=12))
    assert not found.conflicts
    (note,) = (lint for lint in found.lint if lint.kind == "passed-over")
    assert (note.level, note.rules) == ("note", (1, 3))
    assert note.text == (
        "rule 1 ['exp', [expert, data]] does not divide 12 (w): rule 3 [expert] is used instead"
    )
    (lost,) = found.to_json()["parameters"][0]["dims"][0]["lost"]
    assert lost == {
        "row": 1,
        "logical_axis": "exp",
        "mesh_axes": ["expert", "data"],
        "contested": [],
        "held_by": None,
        "reason": "does not divide",
        "size": 12,
    }
    assert "rule 1 does not divide" in " ".join(printed(found).split())


def test_rules_that_no_array_uses_are_named_the_last_ones_first() -> None:
    rules: Rules = [("first", ()), *RULES, ("expp", ("expert",)), ("expp", ())]
    found = of(rules, array("x", "exp", "batch", "mlp"))
    (idle,) = [lint for lint in found.lint if lint.kind == "idle"]
    assert idle.rules == (1, len(rules) - 1, len(rules))
    assert idle.text.endswith("that this model does not have: 'expp', 'first'")


def test_a_dim_without_a_row_and_one_that_does_not_divide() -> None:
    found = of(RULES, array("x", "batch", "heads", size=6), assumed=True)
    assert found.activations[0].shard_shape == (1, 6)
    kinds = {lint.kind: lint for lint in found.lint}
    assert "no rule for 'heads' (x)" in kinds["no-row"].text
    assert "size 6 (x) is not divisible by data * expert = 8" in kinds["uneven"].text
    assert found.activations[0].to_json()["dims"][1]["won"] is None
    assert "no rule" in printed(found)
    with pytest.raises(UserError, match="not divisible"):
        of(RULES, array("x", "batch", size=6))


@pytest.mark.parametrize(
    ("overrides", "shard"),
    [([], (4, 1, 128, 256)), (["num_experts=12"], (4, 3, 64, 256))],
)
def test_whole_experts_where_the_mesh_divides_them(
    overrides: list[str], shard: tuple[int, ...]
) -> None:
    mesh = ["ici_expert_parallelism=4", "ici_fsdp_parallelism=2", "rule_conflicts=error"]
    found = explain_config(load_config("mixtral-tiny", [*mesh, *overrides]))
    assert found.is_strict
    assert found.expert_axes == ("expert",)
    gate = next(p for p in found.parameters if p.array.name == "layers.mlp.experts.gate")
    assert gate.shard_shape == shard
    assert "expert axis (the rule of activation_exp): expert" in printed(found)
    said = [lint.text for lint in found.lint if lint.kind == "passed-over"]
    assert len(said) == len(overrides)
    assert all("['exp', [expert, fsdp]] does not divide 12" in text for text in said)


@pytest.fixture(scope="module")
def flag_off() -> Explanation:
    overrides = ["moe_dispatch_no_expert_sharding=false", "rule_conflicts=error"]
    return explain_config(load_config("mixtral-tiny", overrides))


def test_every_shard_is_jaxs(flag_off: Explanation) -> None:
    mesh = AbstractMesh(tuple(flag_off.sizes.values()), tuple(flag_off.sizes))
    for placed in (*flag_off.parameters, *flag_off.activations):
        sharding = NamedSharding(mesh, placed.resolution.spec)
        assert placed.shard_shape == sharding.shard_shape(placed.array.shape), placed.array.name


def test_mixtral_tiny_counted_by_hand(flag_off: Explanation) -> None:
    parameters = {placed.array.name: placed for placed in flag_off.parameters}
    assert len(parameters) == 13
    gate = parameters["layers.mlp.experts.gate"]  # [L4 E8 M128 H256] float32, E over 8 devices
    assert (gate.bytes, gate.bytes_per_device) == (4_194_304, 524_288)
    assert sum(math.prod(p.array.shape) for p in parameters.values()) == 3_429_504
    hidden = next(p for p in flag_off.activations if p.array.name == "moe hidden")
    # 8 experts, 4 sequences of 32 on a device, 40 slots, 256: the expert dim stays whole.
    assert hidden.shard_shape == (8, 4, 40, 256)
    assert hidden.bytes_per_device == 8 * 4 * 40 * 256 * 4
    # Parameters and two moments, and the two step counters.
    here = sum(p.bytes_per_device for p in parameters.values())
    assert flag_off.state_bytes is not None
    assert 0 < flag_off.state_bytes - 3 * here <= 16


def test_the_flag_is_the_fix(flag_off: Explanation) -> None:
    (conflict,) = flag_off.conflicts
    assert conflict.arrays == ("moe expert input", "moe hidden", "moe expert output")
    assert (conflict.dim, conflict.held_by) == ("activation_exp", "activation_batch_moe")
    assert conflict.consequence == "expert weights will be all-gathered over expert"
    assert conflict.fix == "moe_dispatch_no_expert_sharding=true moves tokens instead"
    assert not flag_off.is_strict
    assert explain_config(load_config("mixtral-tiny")).is_strict


def test_a_mesh_larger_than_this_machine_and_text_that_fits() -> None:
    overrides = ["num_simulated_devices=4096", "ici_tensor_parallelism=4", "dcn_data_parallelism=2"]
    found = explain_config(load_config("mixtral-8x7b", overrides))
    assert math.prod(found.sizes.values()) == 4096
    assert found.sizes["fsdp"] == 4096 // (8 * 4 * 2)
    text = printed(found)
    assert max(map(len, text.splitlines())) <= 100
    for title in ("parameters:", "activations:", "conflicts: none", "rule lint:"):
        assert title in text
    assert all(placed.array.name in text for placed in found.parameters)
    assert len(jax.devices()) == 8


FOREIGN = """
mesh_axes: ['data', 'stage', 'fsdp', 'expert', 'autoregressive']
data_sharding: [['data']]
some_key_of_theirs: {nested: [1, 2]}
logical_axis_rules: [
    ['activation_batch', ['data', 'fsdp', 'expert']],
    ['activation_batch_moe', ['data', 'fsdp', 'expert']],
    ['activation_exp', 'expert'],
    ['activation_length', ['context']],
    ['exp', 'expert'],
    ['embed_moe', ['fsdp']],
    ['embed_moe', ['fsdp', 'expert']],
    ['layers', 'stage'],
    ['norm', null],
    ['cache_heads', ['fsdp', 'fsdp']],
]
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "rules.yml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_rule_file_of_someone_elses(tmp_path: Path) -> None:
    path = write(tmp_path, FOREIGN)
    overrides = ["ici_expert_parallelism=4", "dcn_expert_parallelism=2", "steps=3"]
    found = explain_table("mixtral-tiny", overrides, path)
    assert found.sizes == {"data": 2, "stage": 2, "fsdp": 2, "expert": 8, "autoregressive": 2}
    assert "sizes assumed to be 2: data, stage, fsdp, autoregressive" in found.notes
    rules = {(lint.kind, lint.rules) for lint in found.lint}
    assert ("unknown-axis", (4,)) in rules
    assert ("shadowed", (7, 6)) in rules
    assert ("repeated-axis", (10,)) in rules
    levels = {lint.kind: lint.level for lint in found.lint}
    assert (levels["unknown-axis"], levels["no-row"]) == ("warning", "note")  # as in MaxText
    bare, flag = [lint.text for lint in found.lint if lint.kind == "no-row"]
    assert {"heads", "vocab"} <= set(bare.split(":")[0].replace(",", "").split())
    assert "activation_length" not in bare.split(":")[0].replace(",", "").split()
    assert flag.startswith("no rule for activation_batch_no_exp")
    # With the flag that the model sets, no rule shards the batch dim; without it dims collide.
    (conflict,) = found.conflicts
    assert conflict.only_if == "moe_dispatch_no_expert_sharding=false"
    assert (conflict.dim, conflict.held_by, conflict.axes) == (
        "activation_exp",
        "activation_batch_moe",
        ("expert",),
    )
    assert not found.is_strict  # a rule can never be used
    gate = next(p for p in found.parameters if p.array.name == "layers.mlp.experts.gate")
    assert gate.shard_shape == (2, 1, 64, 256)
    text = printed(found)
    assert max(map(len, text.splitlines())) <= 100
    json.dumps(found.to_json())


def test_with_the_flag_off_the_conflict_counts(tmp_path: Path) -> None:
    path = write(
        tmp_path, FOREIGN.replace("'context'", "'autoregressive'").replace("'fsdp', 'fsdp'", "data")
    )
    found = explain_table("mixtral-tiny", ["moe_dispatch_no_expert_sharding=false"], path)
    assert not [lint for lint in found.lint if lint.level == "error"]
    assert "moe expert input" in found.conflicts[0].arrays
    assert not found.conflicts[0].only_if
    assert not found.is_strict


def test_a_file_without_mesh_axes(tmp_path: Path) -> None:
    table = read_foreign_table(
        write(tmp_path, "logical_axis_rules: [[a, [x, y]], [b, z], [c, []]]")
    )
    assert table.mesh_axes == ("x", "y", "z")
    assert not table.names_its_axes
    assert table.rules == (("a", ("x", "y")), ("b", ("z",)), ("c", ()))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "not a mapping"),
        ("mesh_axes: [a]", "no logical_axis_rules"),
        ("logical_axis_rules: []", "no logical_axis_rules"),
        ("logical_axis_rules: [[a]]", "is not [name, [mesh axes]]"),
        ("logical_axis_rules: [[a, [{b: c}]]]", "is not [name, [mesh axes]]"),
        ("logical_axis_rules: [[a, b]]\nmesh_axes: [b, b]", "each once"),
        ("logical_axis_rules: [[a, b]]\nmesh_axes: {b: 2}", "is not a list of names"),
        ("logical_axis_rules: [[a, b]]\nmesh_axes: []", "is not a list of names"),
        ("logical_axis_rules: [[a, []]]", "no mesh_axes, and no rule names one"),
        ("logical_axis_rules: [[a, b]", "YAML"),
    ],
)
def test_a_bad_rule_file_is_three_lines(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(UserError) as raised:
        read_foreign_table(write(tmp_path, text))
    assert told in str(raised.value)
    assert len(str(raised.value).splitlines()) <= 3


@pytest.mark.parametrize(
    "override",
    ["ici_expert_parallelism=-1", "ici_expert_parallelism=x", "ici_tensor_parallelism=2"],
)
def test_a_bad_size(override: str) -> None:
    with pytest.raises(UserError, match="fix: "):
        take_sizes([override], ["expert"])
    taken: tuple[dict[str, int], Sequence[str], list[str]] = take_sizes(["steps=1"], ["expert"])
    assert taken == ({"expert": 2}, ("expert",), ["steps=1"])
