"""Targets as a person types them, and what stands in for a compiler or runtime that is missing."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.metadata
import importlib.util
import logging
import os
from pathlib import Path
from typing import Any

import jax
import pytest

from moe_shard import quiet
from moe_shard.cli import compile as compile_command
from moe_shard.config.hardware import list_hardware, load_hardware
from moe_shard.errors import UserError
from moe_shard.lowering.reports import LoweringReport
from moe_shard.runtime.compile_target import TargetReport
from moe_shard.runtime.targets import rocm
from moe_shard.runtime.targets.elf import Function, Imports, placeholder
from moe_shard.runtime.targets.target import compiled_with, devices_for, parse_target


@pytest.mark.parametrize(
    ("text", "platform", "backend", "shape"),
    [
        ("cpu:8", "cpu", "cpu", (8,)),
        ("v5e:2x4", "tpu", "tpu", (2, 4)),
        ("v5p:4x4x2", "tpu", "tpu", (4, 4, 2)),
        ("TPU7X:4x4X4", "tpu", "tpu", (4, 4, 4)),
        ("h100:32", "cuda", "gpu", (32,)),
        (" mi355x:8 ", "rocm", "gpu", (8,)),
    ],
)
def test_a_target_is_read(text: str, platform: str, backend: str, shape: tuple[int, ...]) -> None:
    target = parse_target(text)
    assert (target.platform, target.backend, target.shape) == (platform, backend, shape)
    assert target.text == text.strip().lower()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("h100", "fix: for example h100:8"),
        ("", "has no size"),
        ("h1000:8", "did you mean h100"),
        ("v5:2x4", "did you mean v5"),
        ("quantum:8", "one of a100, b200"),
        ("v5e:8", "v5e is followed by a topology of 2 dims\nfix: for example v5e:2x4"),
        ("v5p:4x4", "topology of 3 dims\nfix: for example v5p:2x2x2"),
        ("h100:2x4", "h100 is followed by a number of devices\nfix: for example h100:8"),
        ("h100:0", "number of devices"),
        ("h100:-8", "number of devices"),
        ("h100:8:8", "number of devices"),
        ("cpu:\N{SUPERSCRIPT TWO}", "number of devices"),
        ("h100:12", "12 GPUs do not fill hosts of 8\nfix: h100:16"),
        ("mi355x:999999", "at most 65536"),
        ("../h100:8", "is not in configs/hardware/"),
    ],
)
def test_a_bad_target_says_the_fix(text: str, says: str) -> None:
    with pytest.raises(UserError) as raised:
        parse_target(text)
    assert says in str(raised.value)
    assert len(str(raised.value).splitlines()) <= 3


def test_every_hardware_can_be_a_target() -> None:
    wanted = {"v4", "v5e", "v5p", "v6e", "tpu7x", "a100", "h100", "h200", "b200", "mi300x"}
    assert wanted | {"mi355x", "cpu"} <= set(list_hardware())
    for name in list_hardware():
        how = load_hardware(name).compile
        assert bool(how.topology) == bool(how.topology_dims) == (how.platform == "tpu")
        assert bool(how.target_config) == (how.platform in ("cuda", "rocm"))
        assert how.target_config.count("{") == how.target_config.count("}")
        if how.target_config:
            assert f'platform_name: "{how.platform.upper()}"' in how.target_config


def test_many_hosts_are_said() -> None:
    assert parse_target("h100:8").note is None
    assert "4 hosts of 8" in (parse_target("h100:32").note or "")
    assert parse_target("cpu:32").note is None


@pytest.mark.parametrize(
    ("text", "package"),
    [("v6e:2x4", "libtpu"), ("b200:8", "jax-cuda12-pjrt"), ("mi300x:8", "jax-rocm7-pjrt")],
)
def test_without_the_compiler_the_command_is_named(
    text: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError) as raised:
        devices_for(parse_target(text))
    assert f"needs {package}, which is not installed" in str(raised.value)
    assert "make targets" in str(raised.value)
    assert "pip install 'moe_shard[targets]'" in str(raised.value)


@pytest.mark.parametrize(
    ("text", "package"), [("v6e:2x4", "libtpu"), ("mi300x:8", "jax-rocm7-pjrt")]
)
def test_the_compiler_of_another_jax_is_refused(
    text: str, package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spec = importlib.util.spec_from_file_location("plugin", tmp_path / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.0.1")
    with pytest.raises(UserError) as raised:
        devices_for(parse_target(text))
    assert f"{package} 0.0.1 is not the one that belongs to jax" in str(raised.value)
    assert f"fix: pip install '{package}==" in str(raised.value)


def test_simulated_devices_are_those_of_the_process() -> None:
    assert devices_for(parse_target("cpu:4")) == jax.devices()[:4]
    with pytest.raises(UserError, match="8 simulated devices, 16 are wanted"):
        devices_for(parse_target("cpu:16"))


def test_a_placeholder_exports_versioned_functions_that_fail(tmp_path: Path) -> None:
    functions = [
        Function("hipGetDeviceCount", "hip_4.2"),
        Function("hipGetErrorString", "hip_6.0"),
        Function("_ZN3foo3barEv"),
    ]
    path = tmp_path / "libhalf.so.7"
    path.write_bytes(placeholder("libhalf.so.7", functions))
    library = ctypes.CDLL(str(path))
    assert library.hipGetDeviceCount(None) == 100
    assert library._ZN3foo3barEv() == 100
    library.hipGetErrorString.restype = ctypes.c_char_p
    assert b"does not run" in library.hipGetErrorString(1)
    assert not hasattr(library, "hipInit")

    find = ctypes.CDLL(None).dlvsym
    find.restype, find.argtypes = ctypes.c_void_p, [ctypes.c_void_p, *[ctypes.c_char_p] * 2]
    assert find(library._handle, b"hipGetDeviceCount", b"hip_4.2")
    assert not find(library._handle, b"hipGetDeviceCount", b"hip_6.0")
    # It is found by the name it bears, as a plugin's loader looks for it.
    assert ctypes.CDLL("libhalf.so.7")._handle == library._handle


def test_imports_are_those_of_the_symbol_table() -> None:
    import _ctypes

    imports = Imports.read(Path(_ctypes.__file__))
    assert "libc.so.6" in imports.libraries
    wanted = {function.name: function for function in imports.functions}
    assert wanted["memcpy"].library == "libc.so.6"
    assert wanted["memcpy"].version.startswith("GLIBC_")
    assert wanted["PyErr_SetString"] == Function("PyErr_SetString")


def test_functions_go_where_their_version_is_and_the_rest_into_the_first() -> None:
    wanted = [Function("a", "V1", "libtwo.so"), Function("b"), Function("strlen")]
    files = rocm.placeholders(["libone.so", "libtwo.so"], wanted, [ctypes.CDLL(None)])
    assert files == {
        "libone.so": placeholder("libone.so", [Function("b")]),
        "libtwo.so": placeholder("libtwo.so", [Function("a", "V1", "libtwo.so")]),
    }


@pytest.mark.parametrize("content", [b"", b"no ELF", b"\x7fELF\x02\x01\x01" + bytes(80)])
def test_a_damaged_library_is_one_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "plugin.so"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is no shared library"):
        Imports.read(path)


def test_known_noise_is_held_back_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quiet, "_DRIVERS", ())
    logger = logging.getLogger("jax._src.xla_bridge")
    with quiet.hide_accelerator_warnings():
        with quiet.hide_accelerator_warnings():
            os.write(2, b"I0000 00:00:1.1 1 cudart_stub.cc:31] Could not find cuda drivers\n")
        os.write(2, b"F0000 00:00:1.1 1 something.cc:1] Check failed\n")
        logger.warning("Jax plugin configuration error: Exception when calling ...")
    assert capfd.readouterr().err == "F0000 00:00:1.1 1 something.cc:1] Check failed\n"


def test_where_there_is_an_accelerator_all_is_said(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quiet, "_DRIVERS", (os.devnull,))
    with quiet.hide_accelerator_warnings():
        os.write(2, b"cudart_stub.cc\n")
    assert capfd.readouterr().err == "cudart_stub.cc\n"


def report(target: str, total: int | None, refusal: str | None = None) -> TargetReport:
    memory = None if total is None else {"total_bytes": total}
    lowering = LoweringReport("gpu", 8, {}, None, (), {}, memory, ())
    parsed = parse_target(target)
    return TargetReport(parsed, lowering, "an XLA", 1.0, 1, "", refusal, (), ())


@pytest.mark.parametrize(
    ("target", "total", "fits", "line"),
    [
        ("h100:8", 20 * 10**9, True, "20.0 GB of 85.9 GB (NVIDIA H100 SXM): fits"),
        ("h100:8", 80 * 10**9, True, "fits, with XLA_PYTHON_CLIENT_MEM_FRACTION=0.98"),
        ("h100:8", 90 * 10**9, False, "90.0 GB of 85.9 GB (NVIDIA H100 SXM): does not fit"),
        ("v5e:2x4", 17 * 10**9, True, "17.0 GB of 17.2 GB (TPU v5e): fits"),
        ("cpu:8", 10**9, None, "1.0 GB (simulated CPU: no memory of its own to fit in)"),
        ("h100:8", None, None, "unknown"),
    ],
)
def test_memory_is_judged_against_the_device(
    target: str, total: int | None, fits: bool | None, line: str
) -> None:
    judged = report(target, total)
    assert judged.fits is fits
    assert judged.memory_line().startswith("memory per device: ")
    assert judged.memory_line().endswith(line)


@pytest.mark.parametrize(("target", "fits"), [("v5e:2x4", True), ("h100:8", False)])
def test_the_peak_counts_where_the_compiler_goes_by_it(target: str, fits: bool) -> None:
    judged = report(target, 100 * 10**9)
    judged.lowering.memory["peak_bytes"] = 17 * 10**9  # type: ignore[index]
    assert judged.fits is fits


def test_a_refusal_does_not_fit() -> None:
    refused: Any = dataclasses.replace(report("v5e:2x4", None), refusal="out of memory: ...")
    assert refused.fits is False
    assert refused.to_json()["fits"] is False


def test_the_report_says_that_nothing_ran() -> None:
    assert compiled_with(parse_target("mi355x:8")) == "ROCm's XLA, not run"
    assert compiled_with(parse_target("h100:8")) == "CUDA's XLA, not run"


def test_more_rematerializations_than_allowed_are_a_finding(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = report("h100:8", 10**9)
    lowering = dataclasses.replace(found.lowering, rematerializations=3)
    found = dataclasses.replace(found, lowering=lowering)
    assert [compile_command._judge(found, None, most) for most in (None, 3, 2)] == [0, 0, 1]
    assert "3 involuntary full rematerializations, at most 2 expected" in capsys.readouterr().err
