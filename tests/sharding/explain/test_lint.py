"""Check the lint of rule tables by trying every array; the resolver is compared with Flax's."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_shard.errors import UserError
from moe_shard.sharding.explain.lint import Lint, dead_rules, lint_rules, number_rules
from moe_shard.sharding.rules import RuleTable

AXES = ("data", "fsdp", "tensor", "expert")
Rules = list[tuple[str, tuple[str, ...]]]


def lints(rules: Rules) -> list[Lint]:
    return lint_rules(number_rules(rules), AXES)


def test_axes_that_are_wrong() -> None:
    found = lints([("a", ("data", "stage", "tensor")), ("b", ("fsdp", "fsdp", "expert"))])
    assert [(lint.level, lint.kind, lint.rules) for lint in found] == [
        ("error", "unknown-axis", (1,)),
        ("error", "repeated-axis", (2,)),
    ]
    assert "'stage'" in found[0].text
    (unused,) = lints([("a", ("data", "fsdp", "tensor"))])
    assert (unused.kind, unused.level) == ("unused-axis", "note")


@pytest.mark.parametrize(
    ("rules", "dead"),
    [
        ([("a", ("data",)), ("a", ("data",))], [("duplicate", (2, 1))]),
        ([("a", ("data", "fsdp")), ("a", ("fsdp", "data"))], [("duplicate", (2, 1))]),
        ([("a", ()), ("a", ("data",))], [("shadowed", (2, 1))]),
        ([("a", ("data",)), ("a", ("data", "fsdp"))], [("shadowed", (2, 1))]),
        # Nothing above takes fsdp, so rule 1 loses data or nothing.
        ([("a", ("data", "fsdp")), ("a", ("data",))], [("unreachable", (2, 1))]),
        ([("b", ("data",)), ("a", ("data", "fsdp")), ("a", ("data",))], [("unreachable", (3, 2))]),
        # b takes fsdp and leaves data.
        ([("b", ("fsdp",)), ("a", ("data", "fsdp")), ("a", ("data",))], []),
        # b takes fsdp and data.
        (
            [("b", ("data", "fsdp")), ("a", ("data", "fsdp")), ("a", ("data",))],
            [("unreachable", (3, 2))],
        ),
        # b is too late in the table.
        (
            [("a", ("data", "fsdp")), ("b", ("fsdp",)), ("a", ("data",))],
            [("unreachable", (3, 1))],
        ),
        # The only b that takes fsdp alone is dead itself.
        (
            [("b", ()), ("b", ("fsdp",)), ("a", ("data", "fsdp")), ("a", ("data",))],
            [("shadowed", (2, 1)), ("unreachable", (4, 3))],
        ),
        # MaxText's embed_moe after mlp_moe.
        ([("mlp", ("fsdp", "tensor")), ("emb", ("data", "fsdp")), ("emb", ("data",))], []),
    ],
)
def test_dead_rules(rules: Rules, dead: list[tuple[str, tuple[int, ...]]]) -> None:
    assert [(lint.kind, lint.rules) for lint in dead_rules(number_rules(rules))] == dead


def test_a_row_that_serves_by_size_alone_is_dead_to_flax_only() -> None:
    rules: Rules = [("a", ("data", "fsdp")), ("a", ("data",))]
    (note,) = dead_rules(number_rules(rules), by_flax=False)
    assert (note.level, note.kind, note.rules) == ("note", "by-size", (2, 1))
    assert note.text == (
        "rule 2 ['a', [data]] serves only where rule 1 ['a', [data, fsdp]] does not divide the dim"
        ": no rule above takes fsdp and leaves the rest"
    )


NAMES = ("a", "b", "c", "d")
tables = st.lists(
    st.tuples(
        st.sampled_from(NAMES),
        st.lists(st.sampled_from(AXES), unique=True, max_size=3).map(tuple),
    ),
    max_size=9,
)


def winners(rules: Rules, sizes: dict[str, int], size: int = 64 * 81) -> set[int]:
    """Return every rule that wins for some array, by trying all arrays."""
    table = RuleTable(rules).on(sizes)
    known = [name for name in NAMES if any(name == rule for rule, _ in rules)]
    won = set[int]()
    for count in range(1, len(known) + 1):
        for dims in itertools.combinations(known, count):
            try:
                decisions = table.resolve("x", dims, [size] * count).decisions
            except UserError:  # no rule divides the dim
                continue
            won |= {decision.won.number for decision in decisions if decision.won}
    return won


@settings(max_examples=300)
@given(tables)
def test_a_row_called_dead_never_wins(rules: Rules) -> None:
    found = dead_rules(number_rules(rules))
    assert not {lint.rules[0] for lint in found} & winners(rules, dict.fromkeys(AXES, 3))


@settings(max_examples=150)
@given(tables, st.sampled_from([1, 2, 3, 4, 6, 9, 12]))
def test_nor_where_rows_are_passed_over_for_their_sizes(rules: Rules, size: int) -> None:
    found = dead_rules(number_rules(rules), by_flax=False)
    dead = {lint.rules[0] for lint in found if lint.level == "warning"}
    by_size = {lint.rules[0] for lint in found if lint.kind == "by-size"}
    sizes = {"data": 2, "fsdp": 3, "tensor": 2, "expert": 3}
    assert not dead & winners(rules, sizes, size)
    # Where every rule divides they are not used either.
    assert not by_size & winners(rules, sizes)


@settings(max_examples=150)
@given(tables, st.sets(st.sampled_from(AXES)))
def test_a_shadowed_row_never_wins_on_any_mesh(rules: Rules, ones: set[str]) -> None:
    sizes = {axis: 1 if axis in ones else 2 for axis in AXES}
    found = [lint for lint in dead_rules(number_rules(rules)) if lint.kind != "unreachable"]
    assert not {lint.rules[0] for lint in found} & winners(rules, sizes)
