"""The examples in the front door's docstrings run, and every form of a program reads the same."""

from __future__ import annotations

import doctest
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from rich.console import Console

import moe_shard.lowering
from moe_shard.errors import UserError
from moe_shard.lowering import LoweringReport, assert_collectives, diff, report, verdict
from tests.lowering.fixtures_hand_counted import HAND_COUNTED, read

MESH = {"data": 2, "expert": 4}
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def run_examples(text: str, names: dict[str, Any], of: str) -> int:
    """Run the examples of a docstring; returns how many there are."""
    test = doctest.DocTestParser().get_doctest(text, names, of, of, 0)
    runner = doctest.DocTestRunner(optionflags=OPTIONS)
    said: list[str] = []
    runner.run(test, out=said.append, clear_globs=False)
    names.update(test.globs)
    assert not runner.failures, "".join(said)
    return runner.tries


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """The names that the room's own example defines: the one compile of these tests."""
    found: dict[str, Any] = {}
    assert run_examples(str(moe_shard.lowering.__doc__), found, "moe_shard.lowering") > 10
    return found


@pytest.mark.parametrize("name", sorted({*moe_shard.lowering.__all__} - {"LoweringReport"}))
def test_examples_run(name: str, names: dict[str, Any]) -> None:
    function = getattr(moe_shard.lowering, name)
    assert run_examples(function.__doc__, dict(names), name) >= 1


def test_every_form_reads_the_same(names: dict[str, Any], tmp_path: Path) -> None:
    compiled, lowered = names["compiled"], jax.jit(names["moe"]).lower(names["w"], names["x"])
    text = compiled.as_text()
    path = tmp_path / "step.after_optimizations.txt"
    path.write_text(text)
    (tmp_path / "step.before_optimizations.txt").write_text(lowered.as_text("hlo"))
    of_compiled = report(compiled)
    assert (of_compiled.verdict, of_compiled.mesh) == ("expert-parallel", MESH)
    assert of_compiled.memory is not None
    assert report(lowered) == of_compiled
    of_text = [
        report(text, mesh=names["mesh"]),
        report(text, mesh=MESH),
        report(text, before=lowered.as_text("hlo")),
        report(path),
        report(str(path)),
        report(tmp_path),
    ]
    for each in of_text:
        assert each.collectives == of_compiled.collectives
        assert (each.mesh, each.verdict) == (MESH, "expert-parallel")
        assert diff(compiled, each).same
    assert diff(path, compiled).same
    assert diff(text, compiled).same, "the mesh that the executable names is used for the text"


def test_expert_axes_decide(names: dict[str, Any]) -> None:
    assert verdict(names["compiled"], expert_axes=["data"]) == "no-expert-parallelism"
    assert verdict(names["compiled"], expert_axes=["expert"]) == "expert-parallel"


def test_printed_as_the_command_prints_it() -> None:
    found = report(read("cpu_moe"), mesh=HAND_COUNTED["cpu_moe"][0])
    console = Console(width=120, color_system=None)
    with console.capture() as plain:
        found.render_table(console)
    assert [line.rstrip() for line in plain.get().splitlines()] == str(found).splitlines()
    with console.capture() as rich:
        console.print(found)
    assert rich.get() == plain.get()


def test_a_program_that_cannot_be_read_says_the_fix(tmp_path: Path) -> None:
    for program, words in [
        (object(), r"from a object\nfix: pass jax\.jit"),
        (tmp_path / "absent.txt", "cannot read"),
        (str(tmp_path), "holds no HLO"),
        ("", "it is empty"),
        ("module @jit_f {\n}", "must begin with 'HloModule'"),
    ]:
        with pytest.raises(UserError, match=words):
            report(program)  # type: ignore[arg-type]


class Silent:
    def as_text(self) -> None:
        return None


def test_an_executable_without_text_says_the_fix() -> None:
    with pytest.raises(UserError, match=r"no text.*\nfix: compile with XLA_FLAGS"):
        report(Silent())


def test_the_message_shows_what_was_found(names: dict[str, Any]) -> None:
    with pytest.raises(AssertionError) as error:
        assert_collectives(names["compiled"], axis="expert", scope="combine", all_to_all=4)
    first, place, caption, listed = str(error.value).splitlines()
    assert first == "expected 4 all-to-all, found 1"
    assert place.startswith("    all-to-all x1 over expert, combine forward, 32768 B at ")
    assert caption == "all collectives over expert combine:"
    assert listed == "    all-to-all x1 over expert, combine forward, 32768 B"


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({}, "asserts nothing"),
        ({"scope": "dispach", "all_to_all": 0}, "no stage 'dispach'\nfix: one of router"),
        ({"pass_": "back", "all_to_all": 0}, "no pass 'back'"),
        ({"axis": "experts", "all_to_all": 0}, "no such axis\nfix: one of data 2, expert 4"),
    ],
)
def test_an_assertion_that_cannot_fail_is_refused(
    asked: dict[str, Any], words: str, names: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=words):
        assert_collectives(names["compiled"], **asked)


@pytest.mark.parametrize(
    "asked",
    [
        {"all_to_all": 17},
        {"all_to_all": 2, "scope": "dispach"},
        {"all_to_all": 2, "axis": "experts"},
    ],
)
def test_pytest_shows_the_line_of_the_caller(asked: dict[str, Any], names: dict[str, Any]) -> None:
    with pytest.raises((AssertionError, UserError)) as raised:
        assert_collectives(names["compiled"], **asked)
    shown = [entry.name for entry in raised.traceback.filter(raised)]
    assert shown == ["test_pytest_shows_the_line_of_the_caller"]


STRANGE = """\
HloModule step, is_scheduled=true, num_partitions=8

ENTRY %main (c: s32[1,32]) -> s32[4,32] {
  %c = s32[1,32]{1,0} parameter(0)
  ROOT %g = s32[4,32]{1,0} all-gather(%c), channel_id=1, replica_groups={{0,1,2,4},{3,5,6,7}}, dimensions={0}, use_global_device_ids=true
}
"""  # noqa: E501


def test_axes_that_cannot_be_read_fail_the_assertion() -> None:
    with pytest.raises(AssertionError, match="expected 0 all-gather over expert, found some"):
        assert_collectives(STRANGE, mesh=MESH, axis="expert", all_gather=0)
    assert_collectives(STRANGE, mesh=MESH, all_gather=1)


def test_the_room_is_loaded_when_it_is_used() -> None:
    code = (
        "import sys, moe_shard.lowering as lowering; assert 'diff' in dir(lowering);"
        "assert not any(name.startswith('moe_shard.lowering.') for name in sys.modules);"
        "lowering.report, lowering.diff, lowering.assert_collectives, lowering.verdict;"
        "assert 'jax' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'verdicts_'"):
        _ = importlib.import_module("moe_shard.lowering").verdicts_
    assert LoweringReport.__module__ == "moe_shard.lowering.reports"
