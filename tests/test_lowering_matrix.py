"""Check the output and the files of the matrix tool, with a table in place of a compiler."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moe_shard.errors import run_command
from moe_shard.lowering.fingerprint import Golden, read_golden

ROOT = Path(__file__).resolve().parents[1]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the tool on its own goldens, which replace compilation."""
    spec = importlib.util.spec_from_file_location("matrix", ROOT / "tools" / "lowering_matrix.py")
    assert spec
    assert spec.loader
    tool: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    shutil.copytree(tool.GOLDENS, tmp_path / "goldens")
    monkeypatch.setattr(tool, "GOLDENS", tmp_path / "goldens")
    now = {model: read_golden(tool._file(model)).cells for model in tool.flag_models()}
    for model, cells in now.items():
        commands = {cell: " ".join(tool._command(model, cell)) for cell in cells}
        tool._file(model).write_text(Golden(tool._versions(), commands, cells).to_text())
    tool.compile_in_earnest = tool._compile
    monkeypatch.setattr(tool, "_compile", lambda model, cell: now[model][cell])
    tool.now = now
    return tool


@pytest.fixture
def run(matrix: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lowering_matrix.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            run_command(matrix.main)
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err

    return run


def change(tool: Any, cell: str, **changes: Any) -> None:
    tool.now["mixtral-tiny"][cell] = replace(tool.now["mixtral-tiny"][cell], **changes)


def rewrite(tool: Any, **changes: Any) -> None:
    path = tool._file("mixtral-tiny")
    path.write_text(replace(read_golden(path), **changes).to_text())


def test_nothing_has_changed(run: Run) -> None:
    code, out, err = run()
    assert code == 0
    assert out.startswith("36 cells, all as in ")
    assert err.splitlines()[0].startswith("1/36 mixtral-")
    assert "note" not in err
    code, out, _ = run("--json", "--model", "mixtral-tiny", "--target", "h100:8")
    assert (code, json.loads(out)) == (0, {"differences": [], "other_versions": {}})


def test_a_change_is_a_row_and_exit_code_1(run: Run, matrix: Any) -> None:
    change(matrix, "h100:8 on", verdict="mixed", memory_bytes=10**9)
    change(matrix, "cpu:8 off", verdict=None, sums={})
    code, out, _ = run("--model", "mixtral-tiny")
    assert code == 1
    assert "expert-parallel -> mixed" in out
    assert "-> 1,000,000,000 B" in out
    assert "weight-gathered -> refused by the compiler" in out
    assert out.count("h100:8 on") == 2
    assert "v5e:2x4" not in out
    assert "make goldens" in out.splitlines()[-1]
    code, out, _ = run("--json", "--target", "h100:8")
    assert code == 1
    assert json.loads(out)["differences"][0] == {
        "model": "mixtral-tiny",
        "cell": "h100:8 on",
        "where": "verdict",
        "change": "expert-parallel -> mixed",
    }


def test_a_refresh_keeps_what_is_found_and_nothing_else(run: Run, matrix: Any) -> None:
    before = {path.name: path.read_text() for path in matrix.GOLDENS.iterdir()}
    assert run("--refresh")[0] == 0
    assert {path.name: path.read_text() for path in matrix.GOLDENS.iterdir()} == before
    change(matrix, "h100:8 on", memory_bytes=1)
    change(matrix, "cpu:8 on", memory_bytes=2)
    code, out, _ = run("--refresh", "--target", "h100:8")
    assert (code, "git diff" in out) == (0, True)
    cells = read_golden(matrix._file("mixtral-tiny")).cells
    assert list(cells) == matrix._cells()
    assert cells["h100:8 on"].memory_bytes == 1
    assert cells["cpu:8 on"].memory_bytes > 2  # was not requested
    # Recording all cells at once repairs a file that cannot be read.
    matrix._file("mixtral-tiny").write_text("<<<<<<< HEAD")
    code, _, err = run("--refresh", "--target", "h100:8")
    assert (code, err.splitlines()[-1]) == (2, "fix: make goldens")
    assert run("--refresh")[0] == 0
    assert run()[0] == 0


def test_other_compilers_are_said_and_the_differences_still_shown(run: Run, matrix: Any) -> None:
    rewrite(matrix, made_with={**matrix._versions(), "libtpu": "0.0.1"})
    code, out, err = run("--json")
    assert code == 0
    assert json.loads(out)["other_versions"] == {"libtpu": ["0.0.1", matrix._versions()["libtpu"]]}
    change(matrix, "v5e:2x4 on", verdict="mixed")
    code, out, err = run()
    assert code == 1
    assert "expert-parallel -> mixed" in out
    assert err.splitlines()[-1].startswith("note: other compilers than those of the goldens (libtp")
    # Otherwise cells of two compilers in one file would be recorded as from one compiler.
    code, _, err = run("--refresh", "--target", "h100:8", "--model", "mixtral-tiny")
    assert (code, len(err.splitlines())) == (2, 2)


def test_goldens_of_other_keys_are_not_compared(run: Run, matrix: Any) -> None:
    golden = read_golden(matrix._file("mixtral-tiny"))
    rewrite(matrix, commands={**golden.commands, "h100:8 on": "another"})
    assert run()[0] == 2
    _, _, err = run("--refresh", "--target", "cpu:8")
    assert err == (
        "error: mixtral-tiny.json, h100:8 on: made by another command\nfix: make goldens\n"
    )


def test_what_is_missing_is_said(run: Run, matrix: Any) -> None:
    golden = read_golden(matrix._file("mixtral-tiny"))
    cells = {name: each for name, each in golden.cells.items() if name != "v6e:2x4 on"}
    rewrite(matrix, cells=cells)
    code, out, _ = run()
    assert code == 1
    assert "is not in the golden file" in out
    code, out, err = run("--markdown")
    assert (code, out) == (2, "")
    assert "there is no v6e:2x4 on" in err
    matrix._file("mixtral-tiny").unlink()
    for arguments in ((), ("--markdown",)):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert err.endswith("fix: make goldens\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--model", "mixtral-9x"),
        ("--target", "v5e:4x4"),
        ("--refresh", "--json"),
        ("mixtral-tiny",),
    ],
)
def test_bad_usage_is_one_line(arguments: tuple[str, ...], run: Run) -> None:
    code, out, err = run(*arguments)
    assert (code, out, len(err.splitlines())) == (2, "", 1)


def test_a_cell_that_deviates_says_so_in_the_matrix(run: Run, matrix: Any) -> None:
    golden = read_golden(matrix._file("mixtral-tiny"))
    cells = dict(golden.cells)
    cells["v5p:2x2x2 on"] = replace(cells["v5p:2x2x2 on"], verdict="mixed", sums={})
    rewrite(matrix, cells=cells)
    _, out, _ = run("--markdown", "--model", "mixtral-tiny")
    on, off = out.splitlines()[2:]
    assert on.startswith("| mixtral-tiny | on | `expert-parallel` | 8 | ")
    assert on.split(" | ")[6] == "`mixed`, 0, 0 B"
    assert off.count("`") == 2


@pytest.mark.parametrize(
    ("code", "err", "exit_code", "said", "times"),
    [
        (1, "Traceback\nKeyError: 1", 1, "no report, exit code 1: KeyError: 1\n", 1),
        (-15, "", 1, "no report, exit code -15: no message\n", 2),
        (2, "note: a\nerror: no libtpu\nfix: b\n", 2, "h100:8 on: no libtpu\nfix: b\n", 1),
    ],
)
def test_a_compilation_that_fails(
    code: int,
    err: str,
    exit_code: int,
    said: str,
    times: int,
    run: Run,
    matrix: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done = subprocess.CompletedProcess([], code, "", err)
    calls: list[list[str]] = []
    monkeypatch.setattr(matrix, "_cells", lambda *_: ["h100:8 on"])
    monkeypatch.setattr(matrix, "_compile", matrix.compile_in_earnest)

    def ran(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        return done

    monkeypatch.setattr(subprocess, "run", ran)
    before = matrix._file("mixtral-tiny").read_text()
    found, _, told = run("--refresh", "--model", "mixtral-tiny")
    assert found == exit_code
    assert said in told
    assert len(told.splitlines()) == 2
    assert len(calls) == times  # a killed compilation is retried
    assert matrix._file("mixtral-tiny").read_text() == before


def test_what_does_not_fit_is_compared_too(
    run: Run, matrix: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = {
        "backend": "tpu",
        "num_devices": 8,
        "mesh": {"expert": 8},
        "verdict": None,
        "collectives": [],
        "memory": None,
    }
    done = subprocess.CompletedProcess([], 1, json.dumps(refused), "out of memory")
    monkeypatch.setattr(matrix, "_compile", matrix.compile_in_earnest)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    code, out, _ = run("--model", "mixtral-tiny", "--target", "v5e:2x4")
    assert code == 1
    assert "expert-parallel -> refused by the compiler" in out
