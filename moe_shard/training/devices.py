"""Which devices a command runs on: the accelerators there are, or simulated CPU devices."""

from __future__ import annotations

import os

import jax

from moe_shard.errors import UserError

_COUNT_FLAG = "--xla_force_host_platform_device_count"


def start_devices(num_simulated: int) -> str:
    """Start the backend; to be called before anything else asks jax for devices.

    Several processes are joined where the environment names a coordinator
    (`JAX_COORDINATOR_ADDRESS`) or a cluster that jax knows and has more than one host.

    Args:
        num_simulated: CPU devices to make if there is no accelerator; `XLA_FLAGS` that give a
            count of their own win.

    Returns:
        One line on what the command runs on.

    Raises:
        UserError: an accelerator's runtime is installed and does not start.
    """
    if _COUNT_FLAG not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", num_simulated)
    _join_processes()
    try:
        devices = jax.devices()
    except RuntimeError as error:
        raise UserError(
            f"jax cannot start its devices: {str(error).splitlines()[0][:200]}\n"
            "fix: JAX_PLATFORMS=cpu simulates them on the CPU"
        ) from error
    if devices[0].platform == "cpu":
        return (
            f"no accelerator: simulating {len(devices)} devices on the CPU "
            "(num_simulated_devices); speed means nothing here, the collectives do"
        )
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{len(devices)} x {devices[0].device_kind}{processes}"


def _join_processes() -> None:
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    tasks = os.environ.get("SLURM_NTASKS", "1")
    named = "JAX_COORDINATOR_ADDRESS" in os.environ
    if not jax.distributed.is_initialized() and (named or len(hosts) > 1 or tasks != "1"):
        jax.distributed.initialize()
