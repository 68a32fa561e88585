"""Compiled programs are kept for the next start, and a cache that fails costs only time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.checkpoints.emulator import BUCKET, emulator
from tests.test_train import REPOSITORY, TINY

START = """
import contextlib, io, json, os, pathlib, sys, warnings
warnings.simplefilter("error")
from moe_shard.quiet import hide_accelerator_warnings
with hide_accelerator_warnings():
    import jax
from moe_shard.config import load_config
from moe_shard.training.run import run

def start(name, *more):
    jax.clear_caches()
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        run(load_config("mixtral-tiny", [*sys.argv[1:], f"run_name={name}", *more]))
    folder = pathlib.Path("outputs") / name
    return {
        "compiled": [x for x in out.getvalue().splitlines() if x.startswith("compiled in ")],
        "notes": [x for x in err.getvalue().splitlines() if "cache" in x],
        "loss": json.loads((folder / "metrics.jsonl").read_text())["loss"],
        "lowering": json.loads((folder / "lowering.json").read_text()),
        "kept": sorted(str(path) for path in pathlib.Path("cache").glob("*-cache")),
    }

found = {}
"""
RUNS = """
pathlib.Path("file").touch()
ways = {"unusable": ["jax_cache_dir=file"], "off": ["jax_cache_dir="]}
# From one line, as the lines that call a program are part of it.
for name in ("first", "second", "damaged", "mended", "unusable", "off"):
    if name == "damaged":
        for entry in pathlib.Path("cache").glob("*-cache"):
            entry.write_bytes(entry.read_bytes()[:-50])
    found[name] = start(name, *ways.get(name, ()))
print(json.dumps(found))
"""
WARNED = """
from types import SimpleNamespace
import jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, Mesh
from moe_shard.runtime.compile import compile_step, report_step
from moe_shard.runtime.compile_cache import start_compile_cache
from moe_shard.runtime.devices import start_devices
from moe_shard.sharding.annotate import Sharding
from moe_shard.sharding.rules import RuleTable
from tests.lowering.test_remat_warnings import conflicting_step
start_devices(8)
start_compile_cache("cache")
devices = np.array(jax.devices()).reshape(2, 4)
mesh = Mesh(devices, ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
x = jax.ShapeDtypeStruct((16, 16, 16), jnp.float32)
printed = jax.stages.Compiled.as_text
calls = []
def forgetful(executable):
    # What was loaded has no text, as it may be on some backends.
    calls.append(executable)
    return None if len(calls) == 1 else printed(executable)

for name in ("first", "second", "unknown", "textless"):
    jax.clear_caches()
    if name == "textless":
        jax.stages.Compiled.as_text = forgetful
    step = jax.jit(conflicting_step(mesh))
    made = compile_step(SimpleNamespace(step=step, abstract_state=x, abstract_batch=x))
    report = report_step(made, Sharding(mesh, RuleTable([("exp", ("expert",))])), "cpu")
    found[name] = [report.warnings, made.cached.found, made.warnings_unknown]
    if name == "second":
        for path in pathlib.Path("cache").glob("*-partitioner.json"):
            path.unlink()
print(json.dumps(found))
"""


def printed(folder: os.PathLike[str], code: str, *arguments: str, **more: str) -> Any:
    """Run code in a process of its own, whose home and cache nobody shares."""
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-c", START + code, *arguments],
        cwd=folder,
        env={
            **os.environ,
            "JAX_ENABLE_COMPILATION_CACHE": "true",
            "XDG_CACHE_HOME": os.path.join(folder, "home"),
            "PYTHONPATH": os.pathsep.join(paths),
            **more,
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Start one run in six ways, in a process where a warning is an error."""
    few = ("steps=1", "dataset_type=synthetic", "enable_checkpointing=false")
    folder = tmp_path_factory.mktemp("runs")
    found: dict[str, Any] = printed(
        folder, RUNS, *TINY, *few, "enable_tensorboard=false", "jax_cache_dir=cache"
    )
    assert not (folder / "home").exists(), "only the folder that is named is written to"
    return found


def test_a_second_start_compiles_nothing_and_reports_the_same(starts: dict[str, Any]) -> None:
    first, second = starts["first"], starts["second"]
    assert len(first["kept"]) > 2, "the step, the initial state and what else is compiled"
    assert second["kept"] == first["kept"]
    (line,) = first["compiled"]
    assert " s (kept for the next start in /" in line
    (line,) = second["compiled"]
    assert " s (from /" in line
    assert line.endswith(("kB)", "MB)"))
    assert second["lowering"] == first["lowering"]
    assert second["loss"] == first["loss"]
    assert first["notes"] == second["notes"] == []


def test_a_damaged_entry_is_a_line_and_compiled_anew(starts: dict[str, Any]) -> None:
    damaged = starts["damaged"]
    (line,) = damaged["notes"]
    assert line.startswith("note: compilation cache /")
    assert "Error reading persistent compilation cache entry" in line
    assert line.endswith("removed and compiled anew")
    assert " s (kept for the next start in /" in damaged["compiled"][0]
    assert damaged["kept"] == starts["first"]["kept"]
    assert damaged["loss"] == starts["first"]["loss"]
    assert starts["mended"]["notes"] == []
    assert " s (from /" in starts["mended"]["compiled"][0]


def test_a_folder_that_cannot_be_written_is_a_line(starts: dict[str, Any]) -> None:
    (line,) = starts["unusable"]["notes"]
    assert line.startswith("note: no compilation cache: file: ")
    assert 'jax_cache_dir=""' in line
    assert starts["unusable"]["compiled"][0].endswith(" s")
    assert starts["unusable"]["loss"] == starts["first"]["loss"]


def test_it_can_be_switched_off(starts: dict[str, Any]) -> None:
    assert starts["off"]["notes"] == []
    assert starts["off"]["compiled"][0].endswith(" s")


def test_the_partitioners_warnings_come_with_the_program(tmp_path: Any) -> None:
    found = printed(tmp_path, WARNED)
    first, second, unknown, textless = found.values()
    assert [each[1] for each in (first, second, unknown)] == [0, 1, 1]
    (line,) = (line for line in first[0] if "rematerialization" in line)
    assert "test_remat_warnings.py:" in line
    assert second[0] == first[0], "with the line of source that the first compilation named"
    assert [each[2] for each in (first, second, unknown)] == [False, False, True]
    assert textless[1:] == [0, False], "it is compiled anew, and its warnings are its own"
    assert [line.split(" at ")[0] for line in textless[0]] == [
        line.split(" at ")[0] for line in first[0]
    ]


def test_the_environments_folder_stays(tmp_path: Any) -> None:
    code = """
from moe_shard.runtime.compile_cache import start_compile_cache
from moe_shard.runtime.devices import start_devices
start_devices(8)
for directory in ("mine", "", "auto"):
    found[directory] = str(start_compile_cache(directory).folder)
print(json.dumps([found, jax.config.jax_compilation_cache_dir]))
"""
    found, kept = printed(tmp_path, code, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "theirs"))
    assert set(found.values()) == {kept} == {str(tmp_path / "theirs")}
    found, kept = printed(tmp_path, code)
    assert found == {
        "mine": str(tmp_path / "mine"),
        "": "None",
        "auto": str(tmp_path / "home" / "moe_shard" / "jax"),
    }
    assert kept == found["auto"]


@pytest.mark.parametrize(
    ("place", "seconds", "why"),
    [("gs://x/y", 0.2, "no answer within 0 s"), ("nowhere://x", 60, "'nowhere://'")],
)
def test_a_bucket_that_does_not_answer_is_a_line(
    tmp_path: Any, place: str, seconds: float, why: str
) -> None:
    code = """
from moe_shard.runtime import compile_cache
from moe_shard.runtime.devices import start_devices
compile_cache._ANSWER_SECONDS = float(sys.argv[1])
start_devices(8)
made = compile_cache.start_compile_cache("auto")
print(json.dumps([made.folder, made.notes, jax.config.jax_compilation_cache_dir]))
"""
    surroundings = {
        "JAX_COMPILATION_CACHE_DIR": place,
        "STORAGE_EMULATOR_HOST": "http://127.0.0.1:9",
    }
    folder, (note,), kept = printed(tmp_path, code, str(seconds), **surroundings)
    assert folder is None
    assert kept is None
    assert note.startswith(f"no compilation cache: JAX_COMPILATION_CACHE_DIR={place}: {why}")


def test_a_bucket_keeps_programs_and_no_warnings(tmp_path: Any) -> None:
    code = """
from moe_shard.runtime.compile_cache import count_cached, keep_warnings, kept_warnings
from moe_shard.runtime.compile_cache import start_compile_cache
from moe_shard.runtime.devices import start_devices
start_devices(8)
made = start_compile_cache("auto")
said = []
for _ in range(2):
    jax.clear_caches()
    with count_cached() as counted:
        jax.jit(lambda x: x + 1).lower(1.0).compile()
    said.append(made.words(counted))
keep_warnings("key", ["a line"])
print(json.dumps([made.notes, said, kept_warnings("key"), os.listdir()]))
"""
    place = f"gs://{BUCKET}/programs"
    every = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    with emulator() as variables:
        found = printed(tmp_path, code, JAX_COMPILATION_CACHE_DIR=place, **variables, **every)
    notes, (first, second), warned, files = found
    assert notes == files == []
    assert first == f" (kept for the next start in {place})"
    assert second == f" (from {place})"
    assert warned is None
