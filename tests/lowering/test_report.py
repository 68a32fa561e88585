"""The report, and the command line as a person uses it."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from moe_shard.cli.report import main
from moe_shard.errors import UserError
from moe_shard.lowering.memory import memory_from_compiled
from moe_shard.lowering.reports import report_from_text
from moe_shard.scopes import FURTHER_ROUNDS
from tests.lowering.fixtures_hand_counted import FOLDER, read

ROOT = Path(__file__).parents[2]
MESH = {"data": 1, "fsdp": 1, "expert": 8}
MESH_TEXT = "data=1,fsdp=1,expert=8"
CONTRACT = {"backend", "num_devices", "mesh", "verdict", "collectives", "totals", "memory"}
COLLECTIVE = ["kind", "axes", "scope", "pass", "count", "bytes", "wire_bytes", "async"]
COLLECTIVE += ["spmd_generated", "op_name", "source", "role", "parameter"]


def rendered(name: str, **options: object) -> str:
    buffer = io.StringIO()
    report = report_from_text(read(name), **options)  # type: ignore[arg-type]
    report.render_table(Console(file=buffer, width=120))
    return buffer.getvalue()


def test_json_has_the_keys_of_the_contract() -> None:
    report = report_from_text(read("cpu_moe"), mesh=MESH)
    data = json.loads(json.dumps(report.to_json()))
    assert set(data) == CONTRACT
    assert all(list(each) == COLLECTIVE for each in data["collectives"])
    assert data["mesh"] == MESH
    assert data["totals"]["all-to-all"] == {"count": 4, "bytes": 16384}
    assert data["collectives"][0]["axes"] == ["expert"]
    assert data["memory"] is None


def test_table() -> None:
    memory = {"argument_bytes": 1500, "output_bytes": 20, "total_bytes": 2_500_000}
    text = rendered("cpu_moe", mesh=MESH, memory=memory)
    cells = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    assert cells[4] == ["all-to-all", "expert", "dispatch", "forward", "1", "4.1 kB", "4.1 kB"]
    assert ["total", "5", "17.4 kB"] in cells
    assert "verdict: expert-parallel" in text
    assert "argument 1.5 kB, output 20 B, total 2.5 MB" in text


def test_table_without_a_mesh_counts_its_axes() -> None:
    text = rendered("cpu_moe")
    assert "axis_0 8" in text
    assert "verdict: expert-parallel" in text
    assert "warning: the text does not name its mesh: it is shown as axis_0=8" in text


def test_same_rows_are_added_up() -> None:
    text = rendered("tpu_gathered", mesh={"expert": 8})
    rows = [line for line in text.splitlines() if "collective-permute" in line]
    assert len(rows) == 3
    assert "144" in rows[0]


def test_told_backend_wins() -> None:
    assert report_from_text(read("cpu_moe"), backend="gpu").backend == "gpu"


def test_an_expert_axis_of_size_1() -> None:
    mesh = {"fsdp": 8, "expert": 1}
    assert report_from_text(read("cpu_moe"), mesh=mesh).verdict == "no-expert-parallelism"


def test_a_mesh_of_another_size_is_refused() -> None:
    with pytest.raises(UserError, match="4 devices"):
        report_from_text(read("cpu_moe"), mesh={"expert": 4})


def test_memory() -> None:
    sizes = {"argument": 100, "output": 50, "temp": 30, "alias": 40}
    stats = SimpleNamespace(**{f"{key}_size_in_bytes": size for key, size in sizes.items()})
    compiled = SimpleNamespace(memory_analysis=lambda: stats)
    expected = {f"{key}_bytes": size for key, size in sizes.items()}
    assert memory_from_compiled(compiled) == {**expected, "total_bytes": 140}
    assert memory_from_compiled(SimpleNamespace(memory_analysis=lambda: None)) is None


def run(*arguments: str, stdin: bytes = b"") -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "hlo_report.py"), *arguments],
        input=stdin,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
        timeout=60,
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


MOE = str(FOLDER / "cpu_moe.txt")


def test_command_on_a_file() -> None:
    code, out, err = run(MOE, "--mesh", MESH_TEXT, "--expect", "expert-parallel")
    assert (code, err) == (0, "")
    assert "verdict: expert-parallel" in out


def test_command_on_standard_input_prints_one_json_object() -> None:
    code, out, err = run("-", "--json", "--mesh", MESH_TEXT, stdin=read("cpu_moe").encode())
    assert (code, err) == (0, "")
    assert set(json.loads(out)) == CONTRACT


def test_expectation_that_does_not_hold() -> None:
    code, out, err = run(MOE, "--mesh", MESH_TEXT, "--expect", "mixed", "--json")
    assert code == 1
    assert err == "expected mixed, found expert-parallel (as compiled for cpu)\n"
    assert json.loads(out)["verdict"] == "expert-parallel"


def test_other_expert_axes() -> None:
    gathered = str(FOLDER / "cpu_gathered.txt")
    arguments = (gathered, "--mesh", "ep=8", "--expert-axes", "ep", "--expect", "weight-gathered")
    assert run(*arguments)[0] == 0
    # Nothing is called expert: it is the axis over which the experts' weights are split.
    assert run(gathered, "--mesh", "ep=8", "--expect", "weight-gathered")[0] == 0
    assert run(gathered, "--expect", "weight-gathered")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (("-",), b"", "not HLO text"),
        (("-",), b"\xff\xfe\x00", "not UTF-8"),
        (("-",), b"#!/bin/sh\n", "must begin with 'HloModule'"),
        (("no/such/file",), b"", "cannot read no/such/file"),
        ((str(FOLDER.parent),), b"", "holds no HLO"),
        ((MOE, "--mesh", "expert=4"), b"", "4 devices"),
        ((MOE, "--mesh", "expert"), b"", "cannot read 'expert'"),
        ((MOE, "--mesh", "a=2,a=4"), b"", "cannot read 'a=4'"),
        ((MOE, "--mesh", MESH_TEXT, "--expert-axes", "ep"), b"", "no axis ep"),
        ((MOE, "--stages", "wi"), b"", "write it as wi_0=experts"),
        ((MOE, "--stages", "wi=expert"), b"", "no stage 'expert'"),
        ((MOE, "--expect", "fast"), b"", "invalid choice"),
        ((MOE, "--nonsense"), b"", "unrecognized arguments"),
        ((), b"", "PATH"),
    ],
)
def test_bad_usage_is_short(arguments: tuple[str, ...], stdin: bytes, message: str) -> None:
    code, out, err = run(*arguments, stdin=stdin)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("error: ")
    assert len(err.splitlines()) <= 3


def test_dump_folder_the_largest_module_is_read(tmp_path: Path) -> None:
    dump = tmp_path / "dump"
    dump.mkdir()
    prefix = "module_0001.jit_step.cpu_after_optimizations"
    (dump / f"{prefix}.txt").write_text(read("cpu_moe"), encoding="utf-8")
    (dump / f"{prefix}-buffer-assignment.txt").write_text("x" * 500_000, encoding="utf-8")
    shutil.copy(FOLDER / "cpu_none.txt", dump / "module_0000.jit_init.cpu_after_optimizations.txt")
    code, out, err = run(str(dump), "--json")
    assert code == 0
    assert json.loads(out)["totals"]["all-to-all"]["count"] == 4
    assert f"reading {prefix}.txt, the largest of 2 modules" in err


def test_run_folder_gives_the_mesh(tmp_path: Path) -> None:
    hlo = tmp_path / "hlo"
    hlo.mkdir()
    shutil.copy(MOE, hlo / "step.after_optimizations.txt")
    (tmp_path / "lowering.json").write_text(json.dumps({"mesh": MESH}), encoding="utf-8")
    assert run(str(tmp_path), "--expect", "expert-parallel")[0] == 0
    assert run(str(hlo / "step.after_optimizations.txt"), "--expect", "expert-parallel")[0] == 0
    (tmp_path / "lowering.json").write_text("[]", encoding="utf-8")
    code, _, err = run(str(tmp_path))
    assert code == 2
    assert "has no mesh\nfix: --mesh" in err


def test_the_command_does_not_load_jax() -> None:
    code = (
        "import sys, runpy; sys.argv = ['hlo_report.py', sys.argv[1]];\n"
        f"runpy.run_path({str(ROOT / 'tools' / 'hlo_report.py')!r});\n"
        "sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, MOE], env=environment, check=False)
    assert done.returncode == 0


def test_further_rounds_are_counted_once_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Make the trip count of cpu_scan's inner loop unknown."""
    text = read("cpu_scan").replace("direction=LT", "direction=EQ")
    inner = next(line for line in text.split("\n") if '"known_trip_count":{"n":"3"}' in line)
    changed = re.sub(r'op_name="[^"]*"', f'op_name="f/{FURTHER_ROUNDS}/while"', inner)
    changed = changed.replace('"known_trip_count":{"n":"3"}', '"none":{}')
    path = tmp_path / "step.txt"
    path.write_text(text.replace(inner, changed))
    counts = {}
    for more in ((), ("--further-rounds",)):
        assert main([str(path), "--json", "--mesh", "fsdp=2,expert=4", *more]) == 0
        shown = capsys.readouterr()
        counts[more] = sum(each["count"] for each in json.loads(shown.out)["collectives"])
        assert ("counted once: 1 loops" if more else "not counted: 1 loops") in shown.err
    # In the inner loop two all-to-alls, five times; 20 outside it.
    assert counts == {(): 20, ("--further-rounds",): 20 + 2 * 5}
