"""Real programs of three compilers against counts taken by hand."""

from __future__ import annotations

from collections import Counter

import pytest

from moe_shard.lowering.collectives import extract_collectives, wire_bytes
from moe_shard.lowering.reports import report_from_text
from tests.lowering.fixtures_hand_counted import HAND_COUNTED, read

NAMES = sorted(HAND_COUNTED)


@pytest.mark.parametrize("name", NAMES)
def test_counts_and_bytes(name: str) -> None:
    mesh, verdict, backend, rows = HAND_COUNTED[name]
    report = report_from_text(read(name), mesh=mesh)
    found: Counter[tuple[str, str, str, str, int]] = Counter()
    for each in report.collectives:
        found[each.kind, ",".join(each.axes), each.scope, each.pass_, each.bytes] += each.count
    expected: Counter[tuple[str, str, str, str, int]] = Counter()
    for kind, axes, scope, pass_, count, size in rows:
        expected[kind, axes, scope, pass_, size] += count
    assert found == expected
    assert (report.verdict, report.backend) == (verdict, backend)
    assert report.num_devices == 8
    assert report.warnings == ()


@pytest.mark.parametrize("name", NAMES)
def test_totals_are_count_times_bytes(name: str) -> None:
    rows = HAND_COUNTED[name][3]
    report = report_from_text(read(name), mesh=HAND_COUNTED[name][0])
    for kind in {row[0] for row in rows}:
        same = [row for row in rows if row[0] == kind]
        assert report.totals[kind] == {
            "count": sum(row[4] for row in same),
            "bytes": sum(row[4] * row[5] for row in same),
        }
    assert set(report.totals) == {row[0] for row in rows}


def test_async_is_told_from_sync() -> None:
    assert all(each.is_async for each in extract_collectives(read("gpu_moe")).collectives)
    assert not any(each.is_async for each in extract_collectives(read("cpu_moe")).collectives)
    tpu = extract_collectives(read("tpu_gathered")).collectives
    by_kind = {each.kind: each.is_async for each in tpu}
    assert by_kind["all-gather"]
    assert by_kind["collective-permute"]
    assert not by_kind["reduce-scatter"]


def test_spmd_generated_is_marked_where_jax_says_so() -> None:
    assert all(
        each.spmd_generated for each in extract_collectives(read("cpu_moe_jax012")).collectives
    )
    assert not any(each.spmd_generated for each in extract_collectives(read("cpu_moe")).collectives)


@pytest.mark.parametrize("name", NAMES)
def test_every_source_is_a_line_of_the_program(name: str) -> None:
    for each in extract_collectives(read(name)).collectives:
        assert each.source is not None
        file, _, line = each.source.partition(":")
        assert file == "program.py"
        assert line.isdecimal()


def test_a_mesh_without_names_is_counted_from_the_text() -> None:
    report = report_from_text(read("cpu_moe"))
    assert report.mesh == {"axis_0": 8}
    assert report.verdict == "expert-parallel"
    assert {each.axes for each in report.collectives} == {("axis_0",)}
    assert any("does not name its mesh" in warning for warning in report.warnings)


def test_wire_bytes() -> None:
    # A ring of 4: what one device sends, for 1200 bytes of output.
    assert wire_bytes("all-gather", 1200, 4) == 900
    assert wire_bytes("all-reduce", 1200, 4) == 1800
    assert wire_bytes("reduce-scatter", 1200, 4) == 3600
    assert wire_bytes("all-to-all", 1200, 4) == 900
    assert wire_bytes("ragged-all-to-all", 1200, 4) == 900
    assert wire_bytes("collective-permute", 1200, 4) == 1200
    assert wire_bytes("all-gather", 1200, 1) == 0


def test_fixtures_name_no_machine() -> None:
    for name in NAMES:
        text = read(name)
        assert not any(
            path in text for path in ("/work", "/root", "/tmp", "/home", "site-packages")
        )
