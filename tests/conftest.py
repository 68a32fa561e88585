"""Every test runs on eight CPU devices; without them the suite fails, it never skips."""

from __future__ import annotations

import os

# Both are read once, when jax starts its backend, so they are set before anything imports jax.
DEVICES = 8
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), f"--xla_force_host_platform_device_count={DEVICES}"]
).strip()

import jax  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def _eight_cpu_devices() -> None:
    devices = jax.devices()
    assert len(devices) == DEVICES, f"the tests need {DEVICES} devices, jax has {devices}"
    assert {device.platform for device in devices} == {"cpu"}, devices
