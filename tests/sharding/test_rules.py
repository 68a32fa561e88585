"""Compare the rule table with Flax's own resolver, and check what it reports."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import spmd
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moe_shard.errors import UserError
from moe_shard.lowering.collectives import extract_collectives
from moe_shard.sharding.annotate import Sharding
from moe_shard.sharding.rules import RuleTable

LOGICAL = ("batch", "exp", "embed", "mlp", "length")
ALL_LARGE = {"data": 2, "fsdp": 3, "tensor": 4, "expert": 5}
Rules = list[tuple[str, tuple[str, ...]]]


def canonical(spec: PartitionSpec | None) -> list[tuple[str, ...]]:
    """Return one tuple of mesh axes per dim, for any form of the spec."""
    return [() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in spec or ()]


def rows_of(axes: Sequence[str]) -> st.SearchStrategy[Rules]:
    mesh_axes = st.lists(st.sampled_from(axes), unique=True, max_size=3).map(tuple)
    random_rows = st.lists(st.tuples(st.sampled_from(LOGICAL), mesh_axes), max_size=8)
    # Every logical axis has a rule, as the resolver requires; it is last, so it decides little.
    return random_rows.map(lambda rules: rules + [(name, ()) for name in LOGICAL])


arrays = st.lists(st.sampled_from(LOGICAL), unique=True, min_size=1, max_size=4).flatmap(
    lambda names: st.lists(st.none(), max_size=2).flatmap(
        lambda nones: st.permutations([*names, *nones])
    )
)


@settings(max_examples=400)
@given(rows_of(tuple(ALL_LARGE)), arrays)
def test_placement_is_flaxs_where_every_axis_is_larger_than_one(
    rules: Rules, names: list[str | None]
) -> None:
    shape = [120] * len(names)  # divisible by every product of the sizes
    found = RuleTable(rules).on(ALL_LARGE).resolve("array", names, shape)
    expected = spmd.logical_to_mesh_axes(names, rules)
    assert canonical(found.spec) == canonical(expected)


@settings(max_examples=200)
@given(rows_of(tuple(ALL_LARGE)), arrays, st.sets(st.sampled_from(tuple(ALL_LARGE))))
def test_axes_of_size_one_might_as_well_not_stand_in_the_table(
    rules: Rules, names: list[str | None], ones: set[str]
) -> None:
    sizes = {axis: 1 if axis in ones else size for axis, size in ALL_LARGE.items()}
    without = [(name, tuple(axis for axis in axes if axis not in ones)) for name, axes in rules]
    shape = [120] * len(names)
    found = RuleTable(rules).on(sizes).resolve("array", names, shape)
    expected = RuleTable(without).on(sizes).resolve("array", names, shape)
    assert found.spec == expected.spec
    assert len(found.conflicts) == len(expected.conflicts)


@settings(max_examples=200)
@given(rows_of(tuple(ALL_LARGE)), arrays)
def test_nothing_is_lost_without_a_record(rules: Rules, names: list[str | None]) -> None:
    """Each rule of each dim won, lost to the dim that has its axis, or came after the winner."""
    found = RuleTable(rules).on(ALL_LARGE).resolve("array", names, [120] * len(names))
    held = {a: d.logical_axis for d in found.decisions for a in d.mesh_axes}
    used = list(itertools.chain.from_iterable(d.mesh_axes for d in found.decisions))
    assert len(used) == len(set(used))
    for decision in found.decisions:
        mine = [
            (number, axes)
            for number, (name, axes) in enumerate(rules, 1)
            if name == decision.logical_axis
        ]
        tried = [rule for rule in mine if not decision.won or rule[0] < decision.won.number]
        assert [(loss.rule.number, loss.mesh_axes) for loss in decision.lost] == tried
        for loss in decision.lost:
            assert loss.held_by in {held[axis] for axis in loss.mesh_axes if axis in held}
            assert loss.held_by != decision.logical_axis
        assert decision.is_conflict == (decision.won is None and bool(tried))


SIZES_OF_DIMS = st.sampled_from([0, 1, 2, 6, 10, 12, 20, 30, 45, 60, 120])


@settings(max_examples=400)
@given(rows_of(tuple(ALL_LARGE)), arrays, st.data())
def test_rules_that_do_not_divide_have_no_effect(
    rules: Rules, names: list[str | None], data: st.DataObject
) -> None:
    """Compare with Flax, which ignores sizes, on only the rules that divide."""
    shape = [data.draw(SIZES_OF_DIMS) for _ in names]
    size_of = dict(zip(names, shape, strict=True))

    def divides(name: str, axes: tuple[str, ...]) -> bool:
        return size_of.get(name, 0) % math.prod(ALL_LARGE[axis] for axis in axes) == 0

    found = RuleTable(rules).on(ALL_LARGE).resolve("array", names, shape)
    expected = spmd.logical_to_mesh_axes(names, [rule for rule in rules if divides(*rule)])
    assert canonical(found.spec) == canonical(expected)
    for decision in found.decisions:
        for loss in decision.lost:
            axes = rules[loss.rule.number - 1][1]
            assert loss.held_by or not divides(loss.rule.logical_axis, axes)
            assert (loss.reason == "does not divide") == (not loss.held_by)
    # Where the sizes are only assumed, no rule is skipped because of them.
    assumed = RuleTable(rules).on(ALL_LARGE).resolve("array", names, shape, must_divide=False)
    assert canonical(assumed.spec) == canonical(spmd.logical_to_mesh_axes(names, rules))


MOE = [
    ("batch", ("data", "expert")),
    ("batch_no_exp", ("data",)),
    ("exp", ("expert",)),
    ("mlp", ("tensor",)),
]
SIZES = {"data": 2, "tensor": 1, "expert": 4}


def test_the_earlier_row_wins_and_the_loser_is_on_record() -> None:
    found = RuleTable(MOE).on(SIZES).resolve("slots", ("exp", "batch", None, "mlp"), (8, 8, 3, 5))
    assert canonical(found.spec) == [(), ("data", "expert"), (), ()]
    (conflict,) = found.conflicts
    assert conflict.logical_axis == "exp"
    (loss,) = conflict.lost
    assert (loss.rule.number, loss.mesh_axes, loss.held_by) == (3, ("expert",), "batch")
    assert str(loss.rule) == "rule 3 ['exp', [expert]]"


def test_a_loser_names_the_axes_that_were_taken_and_no_others() -> None:
    rules: Rules = [("embed", ("data",)), ("vocab", ("expert", "data"))]
    (conflict,) = RuleTable(rules).on(SIZES).resolve("x", ("vocab", "embed"), (8, 8)).conflicts
    (loss,) = conflict.lost
    assert (loss.mesh_axes, loss.taken) == (("expert", "data"), ("data",))
    assert str(loss) == "rule 2 ['vocab', [expert, data]] lost data to 'embed'"


def test_a_batch_dim_without_the_expert_axis_leaves_it_to_the_experts() -> None:
    found = RuleTable(MOE).on(SIZES).resolve("slots", ("exp", "batch_no_exp", None), (8, 8, 3))
    assert canonical(found.spec) == [("expert",), ("data",), ()]
    assert not found.conflicts


def test_a_later_row_is_an_alternative_and_no_conflict() -> None:
    rules = [*MOE, ("exp", ("tensor",))]
    sizes = {**SIZES, "tensor": 2}
    found = RuleTable(rules).on(sizes).resolve("slots", ("exp", "batch"), (8, 8))
    assert canonical(found.spec) == [("tensor",), ("data", "expert")]
    assert [loss.rule.number for loss in found.decisions[0].lost] == [3]
    assert not found.conflicts


def test_a_collision_over_an_axis_of_size_one_is_no_conflict() -> None:
    found = RuleTable(MOE).on({**SIZES, "expert": 1}).resolve("slots", ("exp", "batch"), (8, 8))
    assert canonical(found.spec) == [(), ("data",)]
    assert not found.conflicts


FSDP = [("exp", ("expert", "data")), ("exp", ("expert",)), ("embed", ("data",)), ("embed", ())]


@pytest.mark.parametrize(
    ("experts", "spec", "lost"),
    [
        (16, [("expert", "data"), ()], [[], ["rule 3 ['embed', [data]] lost data to 'exp'"]]),
        (12, [("expert",), ("data",)], [["rule 1 ['exp', [expert, data]] does not divide 12"], []]),
    ],
)
def test_a_row_that_does_not_divide_leaves_the_dim_to_the_next(
    experts: int, spec: list[tuple[str, ...]], lost: list[list[str]]
) -> None:
    found = RuleTable(FSDP).on(SIZES).resolve("gate", ("exp", "embed"), (experts, 6))
    assert canonical(found.spec) == spec
    assert [[str(loss) for loss in decision.lost] for decision in found.decisions] == lost
    assert not found.conflicts


def test_a_row_that_is_taken_and_would_not_divide_is_taken() -> None:
    found = RuleTable(MOE).on(SIZES).resolve("slots", ("exp", "batch"), (7, 8))
    (conflict,) = found.conflicts
    assert [loss.reason for loss in conflict.lost] == ["taken"]


def test_expert_axes_are_those_of_the_first_row_that_shard() -> None:
    rules = [("exp", ("expert", "tensor")), ("exp", ("data",))]
    assert RuleTable(rules).on(SIZES).sharding_axes("exp") == ("expert",)
    assert RuleTable(rules).on(SIZES).sharding_axes("nothing") == ()
    assert RuleTable(rules).on(SIZES).expert_axes == ("expert",)
    assert RuleTable([*FSDP, ("activation_exp", ("expert",))]).on(SIZES).expert_axes == ("expert",)
    assert RuleTable([*FSDP, ("activation_exp", ())]).on(SIZES).expert_axes == ()
    assert RuleTable([("embed", ("data",))]).on(SIZES).expert_axes == ()


@pytest.mark.parametrize(
    ("rules", "names", "shape", "told"),
    [
        pytest.param(
            MOE, ("exp", "heads"), (8, 8), ["'heads'", "slots", "add ['heads', []]"], id="unknown"
        ),
        pytest.param(
            MOE, ("exp", "bacth"), (8, 8), ["'bacth'", "did you mean 'batch'?"], id="misspelt"
        ),
        pytest.param(
            MOE,
            ("batch", "mlp"),
            (12, 4),
            ["slots", "'batch' of size 12", "data=2 * expert=4 = 8", "rule 1", "['batch', []]"],
            id="indivisible",
        ),
        pytest.param(
            FSDP,
            ("exp", "embed"),
            (6, 6),
            [
                "slots: its dim 'exp' of size 6",
                "rule 1 ['exp', [expert, data]] by expert=4 * data=2 = 8; "
                "rule 2 ['exp', [expert]] by expert=4 = 4",
                "add ['exp', []] as last rule",
            ],
            id="divisible-by-no-rule",
        ),
        pytest.param(
            [FSDP[0], ("batch", ("expert",)), FSDP[1]],
            ("exp", "batch"),
            (12, 4),
            [
                "rule 1 ['exp', [expert, data]] by",
                "rule 3 ['exp', [expert]] lost expert to 'batch'",
            ],
            id="indivisible-and-taken",
        ),
        pytest.param(
            MOE, ("exp", "exp"), (8, 8), ["slots", "'exp'", "different logical axes"], id="twice"
        ),
        pytest.param(
            [*MOE, ("kv", ("expret",))],
            ("exp",),
            (8,),
            ["rule 5 ['kv', [expret]]", "'expret'", "data, tensor, expert", "remove"],
            id="unknown-mesh-axis",
        ),
    ],
)
def test_errors_name_the_row_the_array_and_the_fix_in_three_lines(
    rules: Rules, names: tuple[str, ...], shape: tuple[int, ...], told: list[str]
) -> None:
    with pytest.raises(UserError) as raised:
        RuleTable(rules).on(SIZES).resolve("slots", names, shape)
    message = str(raised.value)
    assert len(message.splitlines()) <= 3
    assert [part for part in told if part not in message] == []


def mesh() -> Mesh:
    devices = np.array(jax.devices()).reshape(2, 1, 4)
    return Mesh(devices, tuple(SIZES), axis_types=(AxisType.Auto,) * 3)


def annotate_slots(sharding: Sharding, batch: str) -> NamedSharding:
    fix = "weights will be gathered; flag=true moves tokens instead"
    slots = jax.jit(lambda x: sharding(x, "exp", batch, None, name="slots", consequence=fix))(
        jnp.zeros((8, 8, 3))
    )
    assert isinstance(slots.sharding, NamedSharding)
    return slots.sharding


def test_a_conflict_is_reported_with_its_consequence_in_one_line() -> None:
    sharding = Sharding(mesh(), RuleTable(MOE), "record")
    placed = annotate_slots(sharding, "batch")
    assert placed.spec == PartitionSpec(None, ("data", "expert"))
    ((key, conflict),) = sharding.conflicts.items()
    assert key == (conflict.array, conflict.dim) == ("slots", "exp")
    assert sharding.conflict_lines() == [str(conflict)]
    assert str(conflict) == (
        "slots: dim 'exp' stays unsharded: rule 3 ['exp', [expert]] lost expert to 'batch'; "
        "weights will be gathered; flag=true moves tokens instead"
    )
    assert set(sharding.resolutions) == {"slots"}


def test_a_conflict_of_which_the_layer_states_nothing_has_a_fix() -> None:
    rules: Rules = [("embed", ("data",)), ("vocab", ("expert", "data"))]
    sharding = Sharding(mesh(), RuleTable(rules))
    with pytest.warns(UserWarning, match="dim 'vocab' stays unsharded") as told:
        sharding.named_sharding("table", ("vocab", "embed"), (8, 8))
    line = (
        "table: dim 'vocab' stays unsharded: "
        "rule 2 ['vocab', [expert, data]] lost data to 'embed'; "
        "leave data out of the rule of 'embed', or add a rule of 'vocab' with other mesh axes"
    )
    assert [str(each.message) for each in told] == [line]
    assert sharding.conflict_lines() == [line]


def test_without_a_conflict_nothing_is_reported() -> None:
    sharding = Sharding(mesh(), RuleTable(MOE), "error")
    placed = annotate_slots(sharding, "batch_no_exp")
    assert placed.spec == PartitionSpec("expert", "data")
    assert not sharding.conflicts


def test_a_conflict_can_be_made_an_error() -> None:
    with pytest.raises(UserError, match="rule_conflicts=error: slots: dim 'exp'") as raised:
        annotate_slots(Sharding(mesh(), RuleTable(MOE), "error"), "batch")
    assert "flag=true" in str(raised.value)
    assert len(str(raised.value).splitlines()) <= 3


def test_the_source_of_a_constraint_is_where_the_tensor_was_annotated() -> None:
    sharding = Sharding(mesh(), RuleTable(MOE), "record")

    def gathered(x: jax.Array) -> jax.Array:
        return sharding(sharding(x, "exp", None, None, name="a") * 2, None, None, None, name="b")

    text = jax.jit(gathered).lower(jnp.zeros((8, 8, 3))).compile().as_text() or ""
    sources = [each.source for each in extract_collectives(text).collectives]
    assert sources
    assert all(source is not None and "test_rules.py:" in source for source in sources)
