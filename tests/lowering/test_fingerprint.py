"""Fingerprints: what counts as a difference, damaged files, and the goldens that are kept."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_shard.config import list_models, load_config
from moe_shard.errors import UserError
from moe_shard.lowering.differences import CollectiveSums, SumKey
from moe_shard.lowering.fingerprint import Fingerprint, Golden, read_golden
from moe_shard.lowering.reports import report_from_text
from moe_shard.lowering.verdict_names import VERDICTS
from tests.lowering.fixtures_hand_counted import HAND_COUNTED, read

ROOT = Path(__file__).resolve().parents[2]
GOLDENS = ROOT / "tests" / "goldens"
TARGETS = ("cpu:8", "v5e:2x4", "v5p:2x2x2", "v6e:2x4", "h100:8", "mi355x:8")
MEMORY = {
    "argument_bytes": 600,
    "output_bytes": 600,
    "temp_bytes": 400,
    "alias_bytes": 600,
    "total_bytes": 1000,
    "peak_bytes": 900,
}


def report(name: str, **changes: Any) -> dict[str, Any]:
    made = report_from_text(read(name), mesh=HAND_COUNTED[name][0], memory=MEMORY)
    return {**made.to_json(), **changes}


def test_a_fingerprint_is_the_hand_count() -> None:
    found = Fingerprint.of(report("tpu_moe"))
    assert found.verdict == "unknown"  # the fixture is cut
    assert found.mesh == {"fsdp": 2, "expert": 4}
    assert found.memory_bytes == 900  # of a TPU the peak
    assert Fingerprint.of(report("gpu_moe")).memory_bytes == 1000
    expected: dict[tuple[str, str, str, str], list[int]] = {}
    for kind, axes, scope, pass_, count, size in HAND_COUNTED["tpu_moe"][3]:
        row = expected.setdefault((scope, pass_, kind, axes), [0, 0])
        row[0] += count
        row[1] += count * size
    assert {
        (*key[:3], ",".join(key[3])): [each.count, each.bytes] for key, each in found.sums.items()
    } == expected


@pytest.mark.parametrize("name", sorted(HAND_COUNTED))
def test_what_is_kept_is_what_was_found(name: str) -> None:
    found = Fingerprint.of(report(name))
    kept = Fingerprint.from_json(json.loads(json.dumps(found.to_json())))
    assert kept == found
    assert found.differences(kept) == []


def test_every_kind_of_change_is_told() -> None:
    before = Fingerprint.of(report("gpu_moe"))
    collectives = report("gpu_moe")["collectives"]

    def after(**changes: Any) -> list[tuple[str, str]]:
        return before.differences(Fingerprint.of(report("gpu_moe", **changes)))

    assert after(verdict="mixed") == [("verdict", "unknown -> mixed")]
    assert after(verdict=None, collectives=[])[0][1] == "unknown -> refused by the compiler"
    assert after(mesh={"fsdp": 4, "expert": 2, "data": 1}) == [
        ("mesh", "fsdp 2, expert 4 -> fsdp 4, expert 2")
    ]
    assert after(mesh={"data": 1, "fsdp": 2, "expert": 4}) == []  # size 1 changes nothing
    gone = [each for each in collectives if each["scope"] != "dispatch"]
    ((where, what), (_, other)) = after(collectives=gone)
    assert where in ("dispatch forward", "dispatch backward")
    assert what == other == "-6 all-to-all(expert) 805 MB"
    wider = [
        {**each, "bytes": each["bytes"] + (each["kind"] == "all-reduce")} for each in collectives
    ]
    assert all("->" in what for _, what in after(collectives=wider))
    assert len(after(collectives=wider)) == 2
    # When the scheduler makes something asynchronous, in another order, nothing has changed.
    sync = [{**each, "async": False, "source": None} for each in reversed(collectives)]
    assert after(collectives=sync) == []


def test_memory_may_move_a_little() -> None:
    found = Fingerprint.of(report("gpu_moe"))
    assert found.differences(replace(found, memory_bytes=1050)) == []
    assert found.differences(replace(found, memory_bytes=950)) == []
    for other in (0, 949, 1051):
        assert found.differences(replace(found, memory_bytes=other)) == [
            ("memory", f"1,000 B -> {other:,} B")
        ]


WORDS = st.sampled_from(["dispatch", "experts", "all-gather", "all-to-all", "forward"])
SUMS = st.dictionaries(
    st.tuples(WORDS, WORDS, WORDS, st.lists(WORDS, max_size=2, unique=True).map(tuple)),
    st.builds(CollectiveSums, *[st.integers(0, 10**15)] * 3),
    max_size=6,
)


@given(SUMS, SUMS, st.sampled_from(VERDICTS), st.none() | st.sampled_from(VERDICTS))
def test_only_the_same_is_the_same(
    first: dict[SumKey, CollectiveSums],
    second: dict[SumKey, CollectiveSums],
    verdict: str,
    other: str | None,
) -> None:
    a, b = (Fingerprint(v, {"expert": 8}, s, 1) for v, s in ((verdict, first), (other, second)))
    assert Fingerprint.from_json(json.loads(json.dumps(a.to_json()))) == a
    assert a.differences(a) == []
    # A row for every sum that is not the same, whichever way they are compared; none is lost.
    moved = sum(
        first.get(k, CollectiveSums()) != second.get(k, CollectiveSums())
        for k in {**first, **second}
    )
    assert len(a.differences(b)) == len(b.differences(a)) == moved + (verdict != other)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=20), st.lists))
def test_any_other_content_is_one_error(content: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.json"
        path.write_text(json.dumps({"made_with": {}, "keys": [], "cells": {"x": content}}))
        with pytest.raises(UserError, match="is no golden file"):
            read_golden(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"cells": {}}', "\x00"])
def test_a_damaged_file_is_one_error(text: str, tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_text(text)
    with pytest.raises(UserError) as raised:
        read_golden(path)
    assert "fix: make goldens" in str(raised.value)
    with pytest.raises(UserError, match=r"there is no .*\nfix: make goldens"):
        read_golden(tmp_path / "other.json")


GOLDEN = Golden(
    {"jax": "1"}, {"h100:8 on": "make it"}, {"h100:8 on": Fingerprint.of(report("gpu_moe"))}
)


def test_a_golden_reads_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_text(GOLDEN.to_text())
    assert read_golden(path) == GOLDEN
    assert all(len(line) < 200 for line in GOLDEN.to_text().splitlines())
    (line,) = [line for line in GOLDEN.to_text().splitlines() if "combine forward" in line]
    assert line.strip(' ",') == "combine forward all-to-all expert 6 805306368 603979776"


@pytest.mark.parametrize(
    ("was", "is_"),
    [
        ('"unknown"', '"unknwon"'),
        ('"memory_bytes": 1000', '"memory_bytes": Infinity'),
        ('"memory_bytes": 1000', '"memory_byte": 1000'),
        ('"expert": 4', '"expert": "four"'),
        ("all-to-all expert 6", "all-to-all expert six"),
        ("all-to-all expert 6", "all-to-all expert"),
        ("combine forward", "combine backward"),  # which is there already, as after a bad merge
        ('"command"', '"comand"'),
        ("{\n", "<<<<<<< HEAD\n{\n"),
    ],
)
def test_a_damaged_line_is_one_error(was: str, is_: str, tmp_path: Path) -> None:
    text = GOLDEN.to_text()
    assert was in text
    path = tmp_path / "model.json"
    path.write_text(text.replace(was, is_, 1))
    with pytest.raises(UserError, match="is no golden file") as raised:
        read_golden(path)
    assert len(str(raised.value).splitlines()) == 2


# The flag decides nothing where tokens move in any case.
MODELS = [
    name
    for name in list_models()
    if (moe := load_config(name).model.moe) is not None and moe.moe_dispatch != "ragged"
]


def test_every_model_and_target_has_a_golden() -> None:
    assert {path.stem for path in GOLDENS.glob("*.json")} == set(MODELS)
    cells = {f"{target} {flag}" for target in TARGETS for flag in ("on", "off")}
    for model in MODELS:
        assert set(read_golden(GOLDENS / f"{model}.json").cells) == cells


@pytest.mark.parametrize("model", MODELS)
def test_the_flag_decides_everywhere(model: str) -> None:
    for cell, found in read_golden(GOLDENS / f"{model}.json").cells.items():
        on = cell.endswith(" on")
        assert found.verdict == ("expert-parallel" if on else "weight-gathered"), cell
        exchanged = [each.count for key, each in found.sums.items() if key[2] == "all-to-all"]
        assert sum(exchanged) == (8 if on else 0), cell  # four a layer, two layers


def test_the_results_page_shows_the_goldens() -> None:
    command = [sys.executable, "tools/lowering_matrix.py", "--markdown"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    shown = page.split("<!-- matrix -->\n")[1].split("<!-- /matrix -->")[0]
    assert shown.strip() == done.stdout.strip()
