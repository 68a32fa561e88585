"""Environments in which a command cannot run are answered with the fix."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import jax
import pytest

from moe_shard import quiet
from moe_shard.config import load_config
from moe_shard.errors import UserError
from moe_shard.runtime.compile_target import compile_for_target
from moe_shard.runtime.devices import start_devices
from moe_shard.runtime.explained import explain_config
from moe_shard.runtime.targets.target import parse_target


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        (partial(jax.enable_x64, True), "JAX_ENABLE_X64=True"),
        (partial(jax.numpy_rank_promotion, "raise"), "JAX_NUMPY_RANK_PROMOTION=raise"),
        (partial(jax.numpy_dtype_promotion, "strict"), "JAX_NUMPY_DTYPE_PROMOTION=strict"),
        (jax.disable_jit, "JAX_DISABLE_JIT=True"),
        (partial(jax.transfer_guard, "disallow"), "JAX_TRANSFER_GUARD=disallow"),
        (
            partial(jax.transfer_guard_device_to_host, "disallow_explicit"),
            "JAX_TRANSFER_GUARD_DEVICE_TO_HOST=disallow_explicit",
        ),
    ],
)
def test_settings_under_which_nothing_works_are_refused(
    setting: Callable[[], AbstractContextManager[None]], told: str
) -> None:
    config, target = load_config("mixtral-tiny"), parse_target("cpu:8")
    for command in (
        lambda: start_devices(8),
        lambda: explain_config(config),
        lambda: compile_for_target(config, target),
    ):
        with setting(), pytest.raises(UserError) as raised:
            command()
        what, fix = str(raised.value).splitlines()
        assert what.startswith(f"{told}: ")
        assert fix.startswith("fix: take JAX_")


def test_a_platform_that_is_not_there() -> None:
    code = (
        "from moe_shard.errors import run_command\n"
        "from moe_shard.quiet import hide_accelerator_warnings\n"
        "with hide_accelerator_warnings():\n"
        "    from moe_shard.runtime.devices import start_devices\n"
        "run_command(lambda: print(start_devices(8)))"
    )
    for platform in ("cuda", "nonsense"):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            env={**os.environ, "JAX_PLATFORMS": platform},
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stdout) == (2, "")
        what, fix = done.stderr.splitlines()
        assert what.startswith("error: jax cannot start its devices: ")
        assert platform in what
        assert fix == "fix: JAX_PLATFORMS=cpu simulates them on the CPU"


def test_a_flag_that_xla_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags in ("--xla_cpu_multi_thread_eigen=false", ""):
        monkeypatch.setenv("XLA_FLAGS", flags)
        with quiet.hide_accelerator_warnings():
            pass
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=a --xla_nonsense=1")
    with pytest.raises(UserError) as raised, quiet.hide_accelerator_warnings():
        pass
    what, fix = str(raised.value).splitlines()
    assert what == "XLA_FLAGS: XLA does not know --xla_nonsense=1"
    assert fix.startswith("fix: take it out")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--xla_cpu_enable_fast_math=perhaps", "Couldn't interpret value perhaps"),
        ("flags.txt", 'Could not open file "flags.txt"'),
        ("--xla_force_host_platform_device_count=0", "not a number of devices"),
        ("--xla_dump_hlo_as_nothing", "XLA does not know"),
    ],
)
def test_flags_that_xla_cannot_read(monkeypatch: pytest.MonkeyPatch, flags: str, said: str) -> None:
    monkeypatch.setenv("XLA_FLAGS", flags)
    with pytest.raises(UserError) as raised, quiet.hide_accelerator_warnings():
        pass
    what, fix = str(raised.value).splitlines()
    assert what.startswith("XLA_FLAGS: ")
    assert said in what
    assert fix.startswith("fix: ")


def test_a_variable_that_jax_cannot_read() -> None:
    code = (
        "from moe_shard.errors import run_command\n"
        "from moe_shard.quiet import hide_accelerator_warnings\n"
        "def main():\n"
        "    with hide_accelerator_warnings():\n"
        "        import jax\n"
        "run_command(main)"
    )
    for name, value in (("JAX_ENABLE_X64", "perhaps"), ("JAX_DEFAULT_PRNG_IMPL", "dice")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, name: value},
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stdout) == (2, "")
        what, fix = done.stderr.splitlines()
        assert what.startswith(f"error: {name}={value}: jax refuses it: ")
        assert fix.startswith("fix: take it out")


@pytest.mark.parametrize(
    "command",
    [
        *(["train", "mixtral-tiny", "steps=0"], ["generate", "mixtral-tiny", "a"], ["bench"]),
        *(["explain", "mixtral-tiny"], ["compile", "mixtral-tiny", "cpu:8"], ["profile", "."]),
        *(["export", ".", "exported"], ["import", "--model", "mixtral-tiny", ".", "imported"]),
    ],
    ids=lambda command: str(command[0]),
)
def test_every_command_that_loads_jax_answers_it_in_two_lines(
    tmp_path: Path, command: list[str]
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "moe_shard", *command],
        cwd=tmp_path,
        env={**os.environ, "JAX_ENABLE_X64": "perhaps"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    what, fix = done.stderr.splitlines()
    assert what.startswith("error: JAX_ENABLE_X64=perhaps: jax refuses it: ")
    assert fix.startswith("fix: take it out")
