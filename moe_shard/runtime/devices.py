"""Start the devices of a command: real accelerators, or simulated CPU devices."""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from pathlib import Path

import jax
from jax._src.clusters import ClusterEnv, GceTpuCluster

from moe_shard.errors import UserError, first_line
from moe_shard.quiet import hide_accelerator_warnings
from moe_shard.runtime.jax_settings import refuse_settings_of_jax
from moe_shard.runtime.launch import Launch, why_alone
from moe_shard.runtime.team import Team

_TPU_NODES = ("/dev/accel0", "/dev/vfio/0")
_HEARTBEAT_S = 600
_DETECTION_S = 60
_EXPLICIT = "set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID on each"
_COUNT_FLAG = "--xla_force_host_platform_device_count"


def start_devices(num_simulated: int, team: Team | None = None) -> str:
    """Start the backend; call this before anything else uses jax's devices.

    Several processes are joined if the environment describes them (`launch.py`). Simulated devices
    are divided among the processes.

    Args:
        num_simulated: number of CPU devices to simulate if there is no accelerator; a count in
            `XLA_FLAGS` takes precedence.
        team: the processes of the run; None: those of the environment, which then end together
            but are not asked to stop.

    Returns:
        One line on what the command runs on, and another where it is alone and several processes
        seem to be meant.

    Raises:
        UserError: an accelerator's runtime is installed and does not start, jax has settings that
            this package does not support, or the processes cannot be joined.
    """
    refuse_settings_of_jax()
    sharing = _join_processes(team)
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
    why = why_alone(os.environ) if jax.process_count() == 1 else ""
    return "\n".join(filter(None, (_device_line(devices), why)))


def _device_line(devices: Sequence[jax.Device]) -> str:
    if devices[0].platform == "cpu":
        return (
            f"no accelerator: simulating {len(devices)} devices on the CPU "
            "(num_simulated_devices); speed means nothing here, the collectives do"
        )
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{len(devices)} x {devices[0].device_kind}{processes}"


def _join_processes(team: Team | None) -> int:
    """Join the processes of this run; return how many there are.

    Raises:
        UserError: they cannot be joined.
    """
    if team is None:
        team = Team(signals=False).__enter__()
        atexit.register(team.leave)
    launch = team.launch
    if launch is None and any(Path(node).exists() for node in _TPU_NODES):
        launch = _tpu_vm()
    if launch is None:
        return 1
    count, index, address = launch.count, launch.index, launch.address
    if address is None or count is None or index is None:
        address, count, index = _ask_jax(launch)
    team.meet(address, index, count)
    if count == 1:
        return 1
    # The team answers SIGTERM, and sees a death before jax's heartbeats, which end a process.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            team.jax_address,
            count,
            index,
            # Else, where a launcher has started it, a process gets one GPU of its host.
            cluster_detection_method="deactivate" if launch.owns_host else None,
            heartbeat_timeout_seconds=_HEARTBEAT_S,
        )
    except RuntimeError as error:
        raise UserError(
            f"jax cannot join process {index} of {count} at {address}: {first_line(error)}\n"
            "fix: the same versions of jax and of this package on every host"
        ) from error
    return count


def _ask_jax(launch: Launch) -> tuple[str, int, int]:
    """Let jax find, from the launcher's other variables or metadata, what `launch` has not."""
    try:
        address, count, index, _ = ClusterEnv.auto_detect_unset_distributed_params(
            launch.address, launch.count, launch.index, None, None, _DETECTION_S
        )
    # Whatever is wrong with the launcher's variables or with a metadata server.
    except Exception as error:
        raise UserError(
            f"jax cannot find the processes that {launch.launcher} has started: "
            f"{first_line(error)}\nfix: {_EXPLICIT}"
        ) from error
    if address is None or count is None or index is None:
        raise UserError(
            f"jax does not recognise the processes of {launch.launcher}\nfix: {_EXPLICIT}"
        )
    return address, count, index


def _tpu_vm() -> Launch | None:
    """Ask the metadata of a TPU virtual machine, which has no variables, if it is in a pod."""
    if os.environ.get("TPU_SKIP_MDS_QUERY"):
        return None
    try:
        alone = not GceTpuCluster.is_env_present() or GceTpuCluster.get_process_count() == 1
    except Exception:  # no metadata server, or another cloud's
        return None
    return None if alone else Launch(None, None, None, None, "the TPU pod")
