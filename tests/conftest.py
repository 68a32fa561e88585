"""Run every test on eight CPU devices; without them the suite fails, it never skips."""

from __future__ import annotations

import os

from tests.quick import FLAGS

# All are read once, when jax starts its backend, so they are set before anything imports jax.
DEVICES = 8
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # a test compiles, in a folder of nobody's
os.environ["XLA_FLAGS"] = " ".join(
    [f"--xla_force_host_platform_device_count={DEVICES}", FLAGS, os.environ.get("XLA_FLAGS", "")]
).strip()

import gc  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

from tests import shape_checks  # noqa: E402

shape_checks.install()  # before anything imports the package

from tests.moe.build import forget_programs  # noqa: E402

# What is slow is the machine, never the test: a second on one may be ten on another.
hypothesis.settings.register_profile(
    "slow machines", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("slow machines")


@pytest.fixture(scope="session", autouse=True)
def _eight_cpu_devices() -> None:
    devices = jax.devices()
    assert len(devices) == DEVICES, f"the tests need {DEVICES} devices, jax has {devices}"
    assert {device.platform for device in devices} == {"cpu"}, devices


# A program uses some of its process's memory maps, of which Linux allows 65,530: a worker that
# keeps the programs of all modules dies of a segmentation fault in LLVM. No single module needs the
# 50,000 maps that MAPS_KEPT leaves.
MAPS_KEPT = 15_000
MAPS = Path("/proc/self/maps")


@pytest.fixture(scope="module", autouse=True)
def _programs_are_freed() -> Iterator[None]:
    """Drop all programs once there are many; dropping them after every module costs a minute."""
    yield
    if not MAPS.exists() or MAPS.read_bytes().count(b"\n") > MAPS_KEPT:
        forget_programs()
        jax.clear_caches()
        gc.collect()
