"""Start the devices of a command: real accelerators, or simulated CPU devices."""

from __future__ import annotations

import os

import jax

from moe_shard.errors import UserError, first_line
from moe_shard.quiet import hide_accelerator_warnings

_NUMPY: dict[str, tuple[object, ...]] = {
    "jax_enable_x64": (False,),
    "jax_numpy_rank_promotion": ("allow", "warn"),
    "jax_numpy_dtype_promotion": ("standard",),
}
"""Settings of jax that change arithmetic -> the values that this package is written for."""
_COUNT_FLAG = "--xla_force_host_platform_device_count"


def start_devices(num_simulated: int) -> str:
    """Start the backend; call this before anything else uses jax's devices.

    Several processes are joined if the environment describes them: by
    `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, or by the variables of
    Slurm and TPU pods, which jax reads itself. Simulated devices are divided among the processes.

    Args:
        num_simulated: number of CPU devices to simulate if there is no accelerator; a count in
            `XLA_FLAGS` takes precedence.

    Returns:
        One line on what the command runs on.

    Raises:
        UserError: an accelerator's runtime is installed and does not start, or jax has settings
            that this package does not support.
    """
    _refuse_other_numpy()
    sharing = _join_processes()
    if _COUNT_FLAG not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", max(num_simulated // sharing, 1))
    try:
        with hide_accelerator_warnings():
            devices = jax.devices()
    # jax fails an assertion when a platform is requested by name and has no devices.
    except (RuntimeError, AssertionError) as error:
        asked = os.environ.get("JAX_PLATFORMS")
        why = first_line(error, 200) if str(error) else f"there is none of JAX_PLATFORMS={asked}"
        raise UserError(
            f"jax cannot start its devices: {why}\nfix: JAX_PLATFORMS=cpu simulates them on the CPU"
        ) from error
    if devices[0].platform == "cpu":
        return (
            f"no accelerator: simulating {len(devices)} devices on the CPU "
            "(num_simulated_devices); speed means nothing here, the collectives do"
        )
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{len(devices)} x {devices[0].device_kind}{processes}"


def _refuse_other_numpy() -> None:
    """Refuse settings of jax under which the layers, Flax or Optax cannot be traced."""
    for name, normal in _NUMPY.items():
        found = getattr(jax.config, name)
        if found in normal:
            continue
        shown = f"{name.upper()}={found}"
        raise UserError(
            f"{shown}: this package computes in the dtypes of its keys, with jax's usual promotion"
            f"\nfix: take {name.upper()} out of the environment"
        )


def _join_processes() -> int:
    """Join the processes of this run.

    Returns:
        The number of processes that share the simulated devices, from the three variables.
    """
    if address := os.environ.get("JAX_COORDINATOR_ADDRESS"):
        try:
            count = int(os.environ["JAX_NUM_PROCESSES"])
            index = int(os.environ["JAX_PROCESS_ID"])
        except (KeyError, ValueError) as error:
            raise UserError(
                "JAX_COORDINATOR_ADDRESS is set, but JAX_NUM_PROCESSES or JAX_PROCESS_ID is not a "
                "number\nfix: set all three, or none"
            ) from error
        jax.distributed.initialize(address, count, index)
        return count
    tpu_hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    if len(tpu_hosts) > 1 or os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        jax.distributed.initialize()
    return 1
