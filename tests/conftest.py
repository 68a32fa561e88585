"""Every test runs on eight CPU devices; without them the suite fails, it never skips."""

from __future__ import annotations

import os

# Both are read once, when jax starts its backend, so they are set before anything imports jax.
DEVICES = 8
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), f"--xla_force_host_platform_device_count={DEVICES}"]
).strip()

import gc  # noqa: E402
from collections.abc import Iterator  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402

from tests.moe.build import forget_programs  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def _eight_cpu_devices() -> None:
    devices = jax.devices()
    assert len(devices) == DEVICES, f"the tests need {DEVICES} devices, jax has {devices}"
    assert {device.platform for device in devices} == {"cpu"}, devices


@pytest.fixture(scope="module", autouse=True)
def _programs_are_freed() -> Iterator[None]:
    """Every program holds some of the memory maps of its process, of which Linux allows 65,530.

    A worker that keeps the programs of all modules dies of a segmentation fault in LLVM.
    """
    yield
    forget_programs()
    jax.clear_caches()
    gc.collect()
