"""Compile Mixtral's layers for four absent machines, and check that no files are left.

This needs the compilers of `make targets`, and minutes: run `make test-targets`. A missing compiler
is a failure.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.targets

REPOSITORY = Path(__file__).resolve().parents[1]
SHORT = ("base_num_decoder_layers=1", "max_target_length=256")
FLAG_OFF = "moe_dispatch_no_expert_sharding=false"
CONTRACT = {
    "backend", "num_devices", "mesh", "verdict", "collectives", "totals", "memory",
    "target", "hardware", "compile_time_s", "fits", "compiled_with", "rematerializations",
    "estimate", "moe", "attention",
}  # fmt: skip
# Files that libtpu leaves behind unless prevented.
SHARED_PLACES = [Path("/tmp/libtpu_lockfile"), Path("/tmp/tpu_logs")]


@dataclass(frozen=True)
class Done:
    """Hold a process that has ended, and the files it left in its home and temporary folders."""

    code: int
    out: str
    err: str
    left: set[str]

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out)


Run = Callable[..., Done]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run the command with a home directory of its own and list the files that it leaves."""

    def run(*arguments: str) -> Done:
        places = [tmp_path / name for name in ("home", "temporary", "here")]
        for place in places:
            place.mkdir()
        home, temporary, here = places
        # As in a user's shell: no variable restricts jax to the CPU.
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("JAX_", "XLA_", "TPU_", "XDG_"))
        }
        environment |= {"HOME": str(home), "TMPDIR": str(temporary)}
        before = _shared()
        command = [sys.executable, str(REPOSITORY / "tools" / "compile_for.py"), *arguments]
        process = subprocess.Popen(
            command,
            cwd=here,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        out, err = process.communicate(timeout=600)
        with pytest.raises(ProcessLookupError):  # no process of its session remains
            os.killpg(process.pid, 0)
        assert _shared() == before
        left = {
            str(path.relative_to(tmp_path))
            for place in places
            for path in place.rglob("*")
            if path.is_file()
        }
        return Done(process.returncode, out, err, left)

    return run


def _shared() -> set[Path]:
    return {path for place in SHARED_PLACES for path in (place, *place.glob("*")) if path.exists()}


def totals(report: dict[str, Any], *kinds: str) -> list[int]:
    return [report["totals"].get(kind, {"count": 0})["count"] for kind in kinds]


@pytest.mark.parametrize("target", ["v5e:2x4", "v6e:2x4", "h100:8", "mi355x:8"])
def test_the_flag_decides_what_moves(target: str, run: Run, tmp_path: Path) -> None:
    on = run(
        "mixtral-8x7b",
        target,
        *SHORT,
        "--expect",
        "expert-parallel",
        "--json",
        "--dump",
        str(tmp_path / "d"),
    )
    assert (on.code, on.err) == (0, "")
    assert set(on.json) == CONTRACT
    assert on.json["verdict"] == "expert-parallel"
    moe = [c for c in on.json["collectives"] if c["scope"] in ("dispatch", "experts", "combine")]
    assert sum(c["count"] for c in moe if c["kind"] == "all-to-all") == 4
    assert (on.json["target"], on.json["num_devices"]) == (target, 8)
    assert on.json["mesh"]["expert"] == 8
    assert on.json["fits"] is True
    assert on.json["memory"]["total_bytes"] > 1e9
    assert on.json["compiled_with"].endswith("XLA, not run") or "libtpu" in on.json["compiled_with"]
    assert all("placeholders" in path for path in on.left), on.left

    hlo = (tmp_path / "d" / "train_step.after_optimizations.txt").read_text()
    assert hlo.startswith("HloModule jit_step")
    read = subprocess.run(
        [
            sys.executable,
            str(REPOSITORY / "tools" / "hlo_report.py"),
            str(tmp_path / "d"),
            "--json",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(read.stdout)["totals"] == on.json["totals"]


@pytest.mark.parametrize("target", ["v5e:2x4", "v6e:2x4", "h100:8", "mi355x:8"])
def test_without_the_flag_weights_are_gathered(target: str, run: Run) -> None:
    off = run("mixtral-8x7b", target, *SHORT, FLAG_OFF, "--expect", "expert-parallel")
    assert off.code == 1
    # The rule conflict and its fix may be reported as well.
    backend = "tpu" if target.startswith("v") else "gpu"
    found = f"found weight-gathered (as compiled for {backend})"
    assert off.err.splitlines()[-1] == f"expected expert-parallel, {found}"
    assert "verdict: weight-gathered" in off.out
    assert ": fits" in off.out
    assert "not run" in off.out


def test_a_page_shows_the_flag_off_beside_the_flag_on(run: Run, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = run("mixtral-tiny", "h100:8", "--html", str(page), "--max-rematerializations", "0")
    assert done.code == 0, done.err
    text = page.read_text(encoding="utf-8")
    off, on = text.split('<section class="panel">')[1:]
    for panel, value, verdict in (
        (off, "false", "weight-gathered"),
        (on, "true", "expert-parallel"),
    ):
        assert f"moe_dispatch_no_expert_sharding: {value}" in panel
        assert f">{verdict}</p>" in panel
        assert "of 85.9 GB" in panel
        assert "x the least" in panel
        assert "an estimate, nothing was run" in panel
    assert "moe/placement.py:" in on


def test_the_compiler_of_a_tpu_refuses_what_does_not_fit(run: Run) -> None:
    done = run("mixtral-8x7b", "v5e:2x4", "per_device_batch_size=8", "--json")
    assert done.code == 1
    assert done.err.splitlines()[-2].startswith("out of memory: RESOURCE_EXHAUSTED")
    assert done.err.splitlines()[-1].startswith("fix: a smaller per_device_batch_size")
    assert (done.json["fits"], done.json["verdict"], done.json["memory"]) == (False, None, None)


def test_what_a_gpu_cannot_hold_is_said(run: Run) -> None:
    done = run(
        "mixtral-8x7b",
        "a100:8",
        *SHORT,
        "per_device_batch_size=8192",
        "gradient_accumulation_steps=1",
    )
    assert done.code == 1
    assert "GB (NVIDIA A100 SXM 80 GB): does not fit" in done.err.splitlines()[-2]
    assert len(done.err.splitlines()) <= 3
