"""Check what `moe-shard watch` shows of a command's programs, and its expectations of them."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.watched import (
    GATHERED,
    MESH,
    MOE,
    ONE_DEVICE,
    PLAIN,
    WRITER,
    environment,
    read_until,
    started,
    watch,
)


def test_a_program_is_shown_while_the_command_waits(tmp_path: Path) -> None:
    code = WRITER + (
        "stem = 'module_0001.jit_step.cpu_after_optimizations'\n"
        "told = 'Memory Space: x (color=0)\\nTotal bytes: 1234567'\n"
        "write(stem + '-memory-usage-report.txt', told)\n"
        f"compiled({str(MOE)!r}); say('step 0 ' + input())"
    )
    with started(tmp_path, *MESH, "--", *PLAIN, code) as process:
        shown = read_until(process, "memory per device: ")
        assert "total 1.2 MB" in shown
        assert "watch: jit_loss, " in shown
        assert "all-to-all" in shown
        assert "verdict: expert-parallel" in shown
        (folder,) = (path for path in tmp_path.glob("*/*") if path.is_dir())
        out, err = process.communicate("runs\n", timeout=60)
    assert (process.returncode, out) == (0, "step 0 runs\n")
    assert err == "watch: 1 program shown\n"
    assert folder.name == "0"


def test_a_mesh_of_other_size_is_not_used(tmp_path: Path) -> None:
    code = WRITER + f"compiled({str(MOE)!r})"
    found, _, err = watch(tmp_path, "--mesh", "expert=4", "--", *PLAIN, code)
    assert found == 0
    assert "--mesh has 4 devices and this program 8: --mesh is not used" in err


def test_half_a_program_is_waited_for(tmp_path: Path) -> None:
    # Cut after a computation, where the first half looks like a complete text.
    code = WRITER + (
        f"text = open({str(MOE)!r}).read(); at = text.index('\\n}}', len(text) // 2) + 3\n"
        "name = 'module_0001.jit_step.cpu_after_optimizations.txt'\n"
        "write(name, text[:at]); time.sleep(.5); say('half'); write(name, text[at:], 'a'); input()"
    )
    with started(tmp_path, *MESH, "--", *PLAIN, code) as process:
        assert "verdict: expert-parallel" in read_until(process, "verdict:")
        assert process.communicate("\n", timeout=60) == ("half\n", "watch: 1 program shown\n")


def test_a_text_that_stays_broken_is_said(tmp_path: Path) -> None:
    code = WRITER + "write('a.after_optimizations.txt', 'HloModule jit_f, num_partitions=8\\n')"
    found, _, err = watch(tmp_path, "--", *PLAIN, code)
    assert found == 0
    assert "watch: cannot read a.after_optimizations.txt: " in err
    code = WRITER + "write('a.after_optimizations.txt', 'HloModule', 'w'); sys.exit(4)"
    found, _, err = watch(tmp_path, "--expect", "mixed", "--", *PLAIN, code)
    assert found == 4
    assert "watch: expected mixed, but no program over several devices was seen" in err


@pytest.mark.parametrize(
    ("expected", "own", "found", "told"),
    [
        ("expert-parallel", 0, 0, None),
        ("weight-gathered", 0, 1, "expected weight-gathered, found expert-parallel in jit_loss"),
        ("no-expert-parallelism", 5, 5, "found expert-parallel in jit_loss"),
    ],
)
def test_expect(tmp_path: Path, expected: str, own: int, found: int, told: str | None) -> None:
    code = WRITER + f"compiled({str(MOE)!r}); say('on'); sys.exit({own})"
    result, out, err = watch(tmp_path, *MESH, "--expect", expected, "--", *PLAIN, code)
    assert (result, out) == (found, "on\n")
    assert ("expected" in err) == (told is not None)
    assert (told or "") in err


def test_stop_ends_the_command(tmp_path: Path) -> None:
    code = WRITER + (
        "signal.signal(signal.SIGTERM, lambda *_: (say('saved'), sys.exit(75)))\n"
        f"compiled({str(GATHERED)!r}); time.sleep(60)"
    )
    options = (*MESH, "--expect", "expert-parallel", "--stop")
    found, out, err = watch(tmp_path, *options, "--", *PLAIN, code)
    assert (found, out) == (1, "saved\n")
    assert "expected expert-parallel, found weight-gathered in jit_loss" in err
    code = WRITER + f"compiled({str(MOE)!r}); time.sleep(.5); sys.exit(6)"
    assert watch(tmp_path, *options, "--", *PLAIN, code)[0] == 6


def test_stop_ends_a_command_that_will_not(tmp_path: Path) -> None:
    code = WRITER + (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"compiled({str(GATHERED)!r}); time.sleep(60)"
    )
    patched = (
        "import sys; from moe_shard.cli import watch; watch._GRACE_S = .3;"
        "sys.exit(watch.main(sys.argv[1:]))"
    )
    options = (*MESH, "--expect", "expert-parallel", "--stop")
    done = subprocess.run(
        [sys.executable, "-c", patched, *options, "--", *PLAIN, code],
        env=environment(tmp_path),
        timeout=30,
        capture_output=True,
    )
    assert done.returncode == 1
    assert list(tmp_path.iterdir()) == []


def test_nobody_waits_for_a_large_program_after_an_interruption(tmp_path: Path) -> None:
    slow = (
        "import sys, time; from moe_shard.cli import watch; watch._PATIENCE_S = .1\n"
        "from moe_shard.watching import programs\n"
        "def add(self, path): print('reading', file=sys.stderr, flush=True); time.sleep(60)\n"
        "programs.Programs.add = add; sys.exit(watch.main(sys.argv[1:]))"
    )
    code = WRITER + f"compiled({str(MOE)!r}); time.sleep(60)"
    command = [sys.executable, "-c", slow, "--", *PLAIN, code]
    with started(tmp_path, command=command) as process:
        read_until(process, "reading")
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGTERM
    assert "watch: interrupted: the last programs have not been read" in err


def test_json_is_alone_on_standard_output(tmp_path: Path) -> None:
    code = WRITER + f"say('mine'); compiled({str(MOE)!r}); sys.exit(3)"
    found, out, err = watch(
        tmp_path, *MESH, "--json", "--expect", "mixed", "--", *PLAIN, code, "more"
    )
    assert found == 3
    data = json.loads(out)
    assert data["command"][-1] == "more"
    assert data["exit_code"] == 3
    assert data["failure"] == "expected mixed, found expert-parallel in jit_loss"
    (program,) = data["programs"]
    assert program["verdict"] == "expert-parallel"
    assert program["program"] == "jit_loss"
    assert program["totals"]["all-to-all"]["count"] == 4
    assert "mine\n" in err


def test_small_programs_are_counted(tmp_path: Path) -> None:
    code = WRITER + (
        f"compiled({str(MOE)!r}); compiled({str(MOE)!r}, 'module_0002.jit_step')\n"
        f"write('module_0003.jit_add.cpu_after_optimizations.txt', {ONE_DEVICE!r})\n"
        "write('module_0003.jit_add.ir-no-opt.ll', 'x' * 1000)\n"
        "time.sleep(.5); stem = 'module_0001.jit_step.cpu_after_optimizations'\n"
        "write(stem + '-memory-usage-report.txt', 'late')\n"
        "time.sleep(.5); say(sum(1 for each in FOLDER.iterdir()))"
    )
    found, out, err = watch(tmp_path, *MESH, "--", *PLAIN, code)
    assert (found, out) == (0, "0\n"), "what has been read is removed, and what nobody reads"
    assert err.splitlines()[-1] == (
        "watch: 1 program shown; 1 small or of one device were not (--all shows them);"
        " 1 had the text of an earlier one"
    )
    _, _, err = watch(tmp_path, *MESH, "--all", "--", *PLAIN, code)
    assert "watch: jit_add, " in err
    assert "watch: 2 programs shown; 1 had the text of an earlier one" in err


# A plain JAX program that sets its own flags: tokens to experts, a product, tokens back.
STEP = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("expert",))
def exchange(rows):
    return jax.lax.all_to_all(rows, "expert", 0, 0, tiled=True)
def layer(x, w):
    with jax.named_scope("dispatch"):
        rows = exchange(x)
    with jax.named_scope("experts"):
        rows = jnp.tanh(rows @ w[0])
    with jax.named_scope("combine"):
        return exchange(rows)
sharded = jax.shard_map(layer, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
def step(w, x):
    loss, grad = jax.value_and_grad(lambda w: jnp.mean(sharded(x, w) ** 2))(w)
    return loss, w - grad
place = lambda each: jax.device_put(each, NamedSharding(mesh, P("expert")))
w, x = place(np.ones((8, 64, 64), np.float32)), place(np.ones((512, 64), np.float32))
compiled = jax.jit(step).lower(w, x).compile()
print("compiled", input(), flush=True)
loss, w = compiled(w, x)
print("step 0", float(loss), os.environ["XLA_FLAGS"])
"""


def test_a_real_program_is_shown_before_its_first_step(tmp_path: Path) -> None:
    cache, temporary = tmp_path / "cache", tmp_path / "temporary"
    temporary.mkdir()
    more = {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache)}
    more |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    more |= {"JAX_ENABLE_COMPILATION_CACHE": "true"}
    command = ("--expect", "expert-parallel", "--", sys.executable, "-c")
    with started(temporary, *command, STEP, **more) as process:
        shown = read_until(process, "verdict:")
        assert len(re.findall(r"^ +all-to-all +expert ", shown, re.M)) == 3
        assert "verdict: expert-parallel" in shown
        out, err = process.communicate("now\n", timeout=60)
    assert process.returncode == 0
    assert out == "compiled now\nstep 0 1.0 --xla_force_host_platform_device_count=8\n"
    assert "watch: 1 program shown" in err
    assert not cache.exists() or not list(cache.iterdir()), (
        "nothing comes from or goes to the cache"
    )
