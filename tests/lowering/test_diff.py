"""What changed between two lowerings, judged by hand counts of the fixtures and by arithmetic."""

from __future__ import annotations

import copy
import io
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from moe_shard.cli.diff import main
from moe_shard.errors import UserError
from moe_shard.lowering.differences import Diff, compare, from_json, load, load_pair
from tests.lowering.fixtures_hand_counted import FOLDER

MESH = {"data": 1, "fsdp": 1, "expert": 8}
MOE, GATHERED = str(FOLDER / "cpu_moe.txt"), str(FOLDER / "cpu_gathered.txt")


def collective(kind: str, scope: str, count: int, size: int, **more: Any) -> dict[str, Any]:
    return {
        "kind": kind,
        "axes": ["expert"],
        "scope": scope,
        "pass": "forward",
        "count": count,
        "bytes": size,
        "wire_bytes": size * 7 // 8,
        "async": False,
        "spmd_generated": True,
        "op_name": "",
        "source": None,
        **more,
    }


def record(*collectives: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "backend": "cpu",
        "num_devices": 8,
        "mesh": MESH,
        "verdict": "expert-parallel",
        "collectives": list(collectives),
        "totals": {},
        "memory": {"temp_bytes": 1000, "total_bytes": 3000},
        **more,
    }


def diff(a: dict[str, Any], b: dict[str, Any]) -> Diff:
    return compare(from_json(json.dumps(a), "A"), from_json(json.dumps(b), "B"))


def test_the_flag_in_words() -> None:
    gathered = record(
        collective("all-gather", "dispatch", 1, 30_000_000),
        collective("all-gather", "dispatch", 2, 29_000_000),
        verdict="weight-gathered",
        memory={"temp_bytes": 4000, "total_bytes": 6000},
    )
    moved = record(collective("all-to-all", "dispatch", 2, 2_000_000))
    found = diff(gathered, moved)
    assert found.lines() == [
        "dispatch forward: -3 all-gather(expert) 88.0 MB, +2 all-to-all(expert) 4.0 MB",
        "total: 3 -> 2 collectives, 88.0 MB -> 4.0 MB (-95 %)",
        "verdict: weight-gathered -> expert-parallel",
        "memory per device: temp 4.0 kB -> 1.0 kB (-75 %), total 6.0 kB -> 3.0 kB (-50 %)",
    ]
    assert not found.same
    data = json.loads(json.dumps(found.to_json()))
    assert data["same"] is False
    assert data["a"]["totals"]["count"] == 3
    assert data["changes"][0] == {
        "scope": "dispatch",
        "pass": "forward",
        "kind": "all-gather",
        "axes": ["expert"],
        "a": {"count": 3, "bytes": 88_000_000, "wire_bytes": 77_000_000, "asynchronous": 0},
        "b": {"count": 0, "bytes": 0, "wire_bytes": 0, "asynchronous": 0},
    }
    assert data["summary"] == found.lines()


def test_fixtures_counted_by_hand() -> None:
    """cpu_gathered has 2 all-gathers and 1 all-reduce, cpu_moe 4 all-to-alls and 1 all-reduce."""
    found = compare(*load_pair(GATHERED, MOE, MESH))
    changed = Counter[tuple[str, str]]()
    for change in found.changes:
        changed[change.key[2], "gone"] += change.a.count
        changed[change.key[2], "new"] += change.b.count
        assert change.key[3] == ("expert",)
    assert +changed == {
        ("all-gather", "gone"): 2,
        ("all-reduce", "gone"): 1,
        ("all-to-all", "new"): 4,
        ("all-reduce", "new"): 1,
    }
    assert sum(change.b.bytes for change in found.changes if "to-all" in change.key[2]) == 16384
    assert "verdict: weight-gathered -> expert-parallel" in found.lines()
    assert [c.weight for c in found.changes] == sorted(c.weight for c in found.changes)[::-1]


def test_the_same_text_without_a_mesh_is_the_same() -> None:
    found = compare(load(MOE), load(MOE))
    assert found.same
    assert found.lines() == ["the same: collectives, verdict and memory"]


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"async": True}, "experts forward: all-gather(expert) asynchronous 0 -> 2"),
        ({"count": 3}, "experts forward: all-gather(expert) 2 -> 3, 8.2 kB -> 12.3 kB (+50 %)"),
        ({"bytes": 4097}, "experts forward: all-gather(expert) 8,192 -> 8,194 B"),
        (
            {"wire_bytes": 2048},
            "experts forward: all-gather(expert) on the wire 7.2 kB -> 4.1 kB (-43 %)",
        ),
        (
            {"pass": "backward"},
            "experts backward: +2 all-gather(expert) 8.2 kB",
        ),
        (
            {"axes": ["fsdp", "expert"]},
            "experts forward: -2 all-gather(expert) 8.2 kB, +2 all-gather(fsdp, expert) 8.2 kB",
        ),
    ],
)
def test_one_thing_changed(changed: dict[str, Any], line: str) -> None:
    before = collective("all-gather", "experts", 2, 4096)
    found = diff(record(before), record({**before, **changed}))
    assert not found.same
    assert line in found.lines()
    assert found.lines()[-2:] == [
        "verdict: expert-parallel, as before",
        "memory per device: as before",
    ]


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"backend": "tpu"}, "devices: 8 (cpu) -> 8 (tpu)"),
        ({"mesh": {"fsdp": 2, "expert": 4}}, "mesh: expert 8 -> fsdp 2, expert 4"),
        ({"verdict": "mixed"}, "verdict: expert-parallel -> mixed"),
        ({"memory": {"temp_bytes": 2000, "total_bytes": 3000}}, "memory per device: temp 1.0 kB"),
        ({"memory": None, "verdict": "mixed"}, "memory: not recorded in B"),
    ],
)
def test_only_the_surroundings_changed(changed: dict[str, Any], line: str) -> None:
    before = record(collective("all-gather", "experts", 2, 4096))
    found = diff(before, {**before, **changed})
    assert not found.same
    assert any(each.startswith(line) for each in found.lines())
    assert "collectives: the same 2, 8.2 kB" in found.lines()


def test_what_does_not_count() -> None:
    one, two = collective("all-gather", "experts", 2, 8), collective("all-reduce", "loss", 1, 8)
    before = record(one, two)
    half = {**one, "count": 1}
    after = record(two, half, {**half, "op_name": "other", "source": "x.py:3"}, memory=None)
    after["mesh"] = {"expert": 8}
    assert diff(before, after).same
    assert diff(after, before).same


sides = st.lists(
    st.builds(
        collective,
        st.sampled_from(["all-gather", "all-to-all"]),
        st.sampled_from(["dispatch", "experts", "optimizer"]),
        st.integers(1, 4),
        st.integers(0, 5000),
    ),
    max_size=6,
)


@settings(max_examples=150)
@given(sides, sides)
def test_the_changes_are_what_takes_one_total_to_the_other(a: list[Any], b: list[Any]) -> None:
    there, back = diff(record(*a), record(*b)), diff(record(*b), record(*a))
    bytes_a, bytes_b = (sum(each["count"] * each["bytes"] for each in side) for side in (a, b))
    count_a, count_b = (sum(each["count"] for each in side) for side in (a, b))
    assert sum(c.b.bytes - c.a.bytes for c in there.changes) == bytes_b - bytes_a
    assert sum(c.b.count - c.a.count for c in there.changes) == count_b - count_a
    assert {(c.key, c.a, c.b) for c in there.changes} == {(c.key, c.b, c.a) for c in back.changes}
    assert there.same == (not there.changes)
    assert diff(record(*a), record(*copy.deepcopy(a)[::-1])).same


def write_run(folder: Path, **more: Any) -> Path:
    (folder / "hlo").mkdir(parents=True)
    shutil.copy(MOE, folder / "hlo" / "step.after_optimizations.txt")
    known = compare(*load_pair(MOE, MOE, MESH)).a
    assert known.verdict == "expert-parallel"
    rows = [
        collective(kind, scope, sums.count, sums.bytes, wire_bytes=sums.wire_bytes, **{"pass": p})
        for (scope, p, kind, _), sums in known.sums.items()
    ]
    (folder / "lowering.json").write_text(json.dumps(record(*rows, **more)), encoding="utf-8")
    return folder


def test_all_that_one_may_give(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", verdict="mixed")
    ways = (run, run / "lowering.json", run / "hlo", run / "hlo" / "step.after_optimizations.txt")
    for way in ways:
        found = load(str(way))
        assert (found.verdict, found.mesh) == ("mixed", MESH), way
        assert found.memory == {"temp_bytes": 1000, "total_bytes": 3000}
        assert compare(load(str(run)), found).same, way
    # A bare text takes the mesh of the other, and so its axes.
    first, second = load_pair(MOE, str(run))
    assert first.mesh == MESH
    assert not compare(first, second).changes


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "not a lowering.json"),
        ("{}", "KeyError 'collectives'"),
        ('{"collectives": 3}', "not a lowering.json"),
        (json.dumps(record({"kind": "all-gather"})), "not a lowering.json"),
        (json.dumps(record(collective("x", "y", 1, 1), num_devices=None)), "not a lowering.json"),
        (json.dumps(record()).replace("8", "1e999"), "not a lowering.json"),
        (json.dumps(record(mesh=[])), "not a lowering.json"),
        ("{" * 100_000, "not a lowering.json"),
        ("[]", "must begin with 'HloModule'"),
    ],
)
def test_bad_input_is_three_lines_at_most(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "some.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as raised:
        load(str(path))
    assert told in str(raised.value)
    assert len(str(raised.value).splitlines()) <= 3


def test_standard_input_serves_one_side_only() -> None:
    with pytest.raises(UserError, match="both"):
        load_pair("-", "-")


def test_rendered_text_is_not_markup() -> None:
    a, b = record(), record(collective("all-gather", "[bold]", 1, 1, axes=["[/]"]))
    buffer = io.StringIO()
    diff(a, b).render(Console(file=buffer, width=60))
    assert "[bold] forward: +1 all-gather([/]) 1 B" in buffer.getvalue()


def test_each_side_may_have_a_mesh_of_its_own() -> None:
    other = {"data": 2, "expert": 4}
    a, b = load_pair(MOE, GATHERED, mesh_a=MESH, mesh_b=other)
    assert (a.mesh, b.mesh) == (MESH, other)
    assert {axes for *_, axes in a.sums} == {("expert",)}
    assert {axes for *_, axes in b.sums} == {("data", "expert")}
    assert "mesh: expert 8 -> data 2, expert 4" in compare(a, b).lines()
    # For the other side the common one counts.
    a, b = load_pair(MOE, GATHERED, mesh=MESH, mesh_b=other)
    assert (a.mesh, b.mesh) == (MESH, other)


def test_a_mesh_beside_a_recorded_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lowering.json").write_text(json.dumps(record()))
    with pytest.raises(UserError) as raised:
        load_pair(str(tmp_path), MOE, mesh_a={"expert": 4, "data": 2})
    assert "--mesh-a" in str(raised.value)
    assert "records its mesh, expert 8" in str(raised.value)
    assert load_pair(str(tmp_path), MOE, mesh_a=MESH)[0].mesh == MESH


def test_the_command_takes_both(capsys: pytest.CaptureFixture[str]) -> None:
    meshes = ["--mesh-a", "data=1,fsdp=1,expert=8", "--mesh-b", "data=2,expert=4"]
    assert main([MOE, MOE, *meshes]) == 0
    assert "mesh: expert 8 -> data 2, expert 4" in capsys.readouterr().out
    with pytest.raises(UserError, match="--mesh-b: cannot read 'expert'"):
        main([MOE, MOE, "--mesh-b", "expert"])
