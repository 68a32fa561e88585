"""Check which programs are shown, and when an expectation does not hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from moe_shard.watching.programs import Expectation, Programs, WatchedProgram

FIXTURES = Path(__file__).parents[1] / "lowering" / "fixtures"
MESH = {"data": 1, "fsdp": 1, "expert": 8}
# 16 FLOPs on each of two devices.
SMALL = """HloModule jit_small, num_partitions=2

ENTRY %main (a: f32[2,2], b: f32[2,2]) -> f32[2,2] {
  %a = f32[2,2]{1,0} parameter(0)
  %b = f32[2,2]{1,0} parameter(1)
  ROOT %dot = f32[2,2]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
KERNEL = SMALL.replace(
    "dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
    'custom-call(%a, %b), custom_call_target="tpu_custom_call"',
)


def add(programs: Programs, folder: Path, text: str) -> WatchedProgram | None:
    path = folder / f"module_{len(list(folder.iterdir()))}.after_optimizations.txt"
    path.write_text(text)
    return programs.add(path)


def moe() -> str:
    return (FIXTURES / "cpu_moe.txt").read_text()


def test_small_is_what_is_small_beside_the_largest_so_far(tmp_path: Path) -> None:
    programs = Programs(MESH)
    small = add(programs, tmp_path, SMALL)
    assert small is not None, "the largest so far"
    assert (small.name, small.flops, small.trains) == ("jit_small", 16, False)
    large = add(programs, tmp_path, moe())
    assert large is not None
    assert large.trains
    assert large.report.verdict == "expert-parallel"
    assert add(programs, tmp_path, SMALL.replace("jit_small", "jit_other")) is None
    assert add(programs, tmp_path, SMALL) is None
    assert (programs.passed_over, programs.repeated) == (1, 1)
    assert programs.shown == [small, large]


def test_a_kernel_of_unknown_work_is_shown(tmp_path: Path) -> None:
    programs = Programs(MESH)
    add(programs, tmp_path, moe())
    assert add(programs, tmp_path, KERNEL) is not None


def test_one_device_and_no_product_are_shown_on_request(tmp_path: Path) -> None:
    single = SMALL.replace(", num_partitions=2", "")
    copying = (
        "HloModule jit_copy, replica_count=2\n\nENTRY %main (p: f32[2]) -> f32[2] {\n"
        "  ROOT %p = f32[2]{0} parameter(0)\n}\n"
    )
    for everything in (False, True):
        programs = Programs(MESH, everything=everything)
        shown = [add(programs, tmp_path, text) is not None for text in (single, copying)]
        assert shown == [everything, everything]
        assert programs.passed_over == (0 if everything else 2)


def test_what_cannot_be_read_is_kept_with_its_reason(tmp_path: Path) -> None:
    programs = Programs(MESH)
    assert add(programs, tmp_path, moe()[:-40]) is None
    assert programs.add(tmp_path / "gone") is None
    assert len(programs.unread) == 2
    assert "cannot read" in programs.unread["gone"]


@pytest.mark.parametrize(
    ("expected", "verdicts", "failure"),
    [
        ("expert-parallel", ["expert-parallel"], None),
        ("expert-parallel", ["forward none", "expert-parallel", "expert-parallel"], None),
        ("expert-parallel", ["expert-parallel", "none"], "no-expert-parallelism in p1"),
        ("expert-parallel", ["forward mixed", "expert-parallel"], "mixed in p0"),
        ("expert-parallel", ["forward none"], "no-expert-parallelism in every program shown"),
        ("expert-parallel", [], "no program over several devices was seen"),
        ("expert-parallel", ["expert-parallel", "?"], "no verdict in p1"),
        ("no-expert-parallelism", ["forward none", "none"], None),
        ("no-expert-parallelism", ["none", "expert-parallel"], "expert-parallel in p1"),
        ("weight-gathered", ["mixed"], "expected weight-gathered, found mixed in p0"),
    ],
)
def test_an_expectation(
    tmp_path: Path, expected: str, verdicts: list[str], failure: str | None
) -> None:
    given = add(Programs(MESH), tmp_path, SMALL)
    assert given is not None
    names: dict[str, str | None] = {"none": "no-expert-parallelism", "?": None}
    programs = []
    for index, text in enumerate(verdicts):
        verdict = text.removeprefix("forward ")
        report = replace(given.report, verdict=names.get(verdict, verdict))
        trains = not text.startswith("forward ")
        programs.append(replace(given, name=f"p{index}", report=report, trains=trains))
    found = Expectation(expected).failure(programs)
    if failure is None:
        assert found is None
    else:
        assert found is not None
        assert found.startswith(f"expected {expected}, ")
        assert found.endswith(failure)
