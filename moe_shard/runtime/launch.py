"""Read from the environment which of how many processes this one is, whoever has started it.

Explicit variables win, and complete what a launcher says: `JAX_COORDINATOR_ADDRESS` (HOST:PORT of
process 0), `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`. Launchers are Open MPI, torchrun, Slurm and
Kubernetes' indexed jobs, which JobSet makes; TPU pods are left to jax. Nothing here loads jax, so
that a wrong value is answered at once.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from moe_shard.errors import UserError

_ADDRESS, _COUNT, _INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_PORT = "JAX_COORDINATOR_PORT"
_HIGHEST_PORT = 65_535
_FIRST_PORT = 49_152
"""First port that no service has by convention, of which a launcher's job gets one."""


@dataclass(frozen=True)
class Launch:
    """Describe the processes of a run.

    Attributes:
        count: number of processes; None: jax asks the TPU's metadata.
        index: which of them this is, from 0; None: likewise.
        address: HOST:PORT at which process 0 listens; None: jax asks the launcher.
        owns_host: whether this process has all devices of its host. None: as jax decides, which
            gives each process of a host one GPU where a launcher started it.
        launcher: who has started the processes, for a person.
    """

    count: int | None
    index: int | None
    address: str | None
    owns_host: bool | None
    launcher: str


@dataclass(frozen=True)
class _Launcher:
    """Name the variables of a launcher.

    Attributes:
        name: for a person.
        count: the variable with the number of processes.
        index: the variable with the number of this process.
        mark: the variable that is set only in its processes.
        same: another variable that must have the value of `count`, if it is there.
        here: the variable with the number of processes on this host.
        address_by_jax: whether jax derives the coordinator's address from other variables.
    """

    name: str
    count: str
    index: str
    mark: str
    same: str = ""
    here: str = ""
    address_by_jax: str = ""


# In jax's order: mpirun starts its daemons with Slurm's srun, whose variables reach the processes.
_LAUNCHERS = (
    _Launcher(
        "Open MPI",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        here="OMPI_COMM_WORLD_LOCAL_SIZE",
        address_by_jax="OMPI_MCA_orte_hnp_uri",
    ),
    _Launcher("torchrun", "WORLD_SIZE", "RANK", "TORCHELASTIC_RUN_ID", here="LOCAL_WORLD_SIZE"),
    _Launcher(
        "Slurm",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_PROCID",
        "SLURM_STEP_NODELIST",
        same="SLURM_NTASKS",
        here="SLURM_STEP_TASKS_PER_NODE",
        address_by_jax="SLURM_JOB_ID",
    ),
)


def find_launch(env: Mapping[str, str]) -> Launch | None:
    """Find how many processes there are and which is this one; None if it is alone.

    Args:
        env: the environment.

    Raises:
        UserError: a value is no number or out of range, one is missing, or two contradict.
    """
    launcher = next((each for each in _LAUNCHERS if env.get(each.mark)), None)
    # Without a number of steps, Slurm has started a shell or a batch script, not processes.
    if launcher and launcher.name == "Slurm" and not env.get(launcher.count):
        launcher = None
    explicit = [name for name in (_ADDRESS, _COUNT, _INDEX) if env.get(name)]
    if not explicit and launcher is None:
        return _tpu_pod(env)
    count = _count(env, launcher)
    index_name = _index_name(env, launcher)
    if count == 1 and launcher and not explicit:
        return None
    missing = [name for name, there in ((_COUNT, count), (_INDEX, index_name)) if there is None]
    address = _address(env, launcher, count)
    by_jax = launcher is not None and bool(env.get(launcher.address_by_jax))
    if address is None and not by_jax:
        missing.insert(0, _ADDRESS)
    if missing:
        have = " and ".join(f"{name}={env[name]}" for name in explicit)
        raise UserError(
            f"{have or f'started by {launcher.name}' if launcher else have}: "
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set\n"
            f"fix: {_ADDRESS}=HOST:PORT of process 0, {_COUNT} and {_INDEX}, or none of them"
        )
    assert count is not None, "nothing is missing"
    assert index_name is not None, "nothing is missing"
    index = _whole(env, index_name)
    if index >= count:
        raise UserError(
            f"{index_name}={index}: there are {count} processes "
            f"({_COUNT if env.get(_COUNT) or launcher is None else launcher.count}={count}), "
            f"numbered from 0\nfix: {index_name}={'0' if count == 1 else f'0 to {count - 1}'}"
        )
    name = launcher.name if launcher else "the environment"
    return Launch(count, index, address, _owns_host(env, launcher), name)


def why_alone(env: Mapping[str, str]) -> str:
    """Return why a process is alone although its environment speaks of several; empty if not.

    Args:
        env: the environment, in which `find_launch` has found no other processes.
    """
    if any(env.get(name) for name in (_ADDRESS, _COUNT, _INDEX)):
        return ""

    def several(name: str) -> bool:
        value = env.get(name, "").strip()
        return value.isascii() and value.isdigit() and len(value) < 10 and int(value) > 1

    for launcher in _LAUNCHERS:
        if env.get(launcher.mark) and env.get(launcher.count):
            return ""  # which says that there is one
    if several("WORLD_SIZE"):
        return (
            f"one process, alone: WORLD_SIZE={env['WORLD_SIZE'].strip()} without torchrun's "
            f"TORCHELASTIC_RUN_ID is not read; several need torchrun, or {_ADDRESS}, {_COUNT} and "
            f"{_INDEX} in each"
        )
    if several("SLURM_NTASKS"):
        return (
            f"one process, alone: it is not one of srun's, and SLURM_NTASKS="
            f"{env['SLURM_NTASKS'].strip()}; the same command after srun starts all"
        )
    return ""


def _count(env: Mapping[str, str], launcher: _Launcher | None) -> int | None:
    found: dict[str, int] = {}
    names = (_COUNT, *((launcher.count, launcher.same) if launcher else ()))
    for name in names:
        if name and env.get(name):
            found[name] = _whole(env, name)
            if found[name] < 1:
                raise UserError(
                    f"{name}={found[name]}: a run has at least one process\n"
                    f"fix: {name}=the number of processes, or take it out"
                )
    if len(set(found.values())) > 1:
        shown = " and ".join(f"{name}={value}" for name, value in found.items())
        raise UserError(
            f"{shown} contradict each other\n"
            "fix: the number of processes of this run in each, or take the wrong one out"
        )
    return next(iter(found.values()), None)


def _index_name(env: Mapping[str, str], launcher: _Launcher | None) -> str | None:
    """Return the variable that has this process's number; None if there is none."""
    # An indexed job's number alone makes no run of several processes: it is used for sweeps too.
    names = [_INDEX, launcher.index if launcher else "JOB_COMPLETION_INDEX"]
    found = [name for name in names if env.get(name)]
    if launcher and len(found) > 1 and _whole(env, found[0]) != _whole(env, found[1]):
        raise UserError(
            f"{found[0]}={env[found[0]]} and {found[1]}={env[found[1]]} contradict each other\n"
            f"fix: take {_INDEX} out; {launcher.name} numbers its processes"
        )
    return found[0] if found else None


def _address(env: Mapping[str, str], launcher: _Launcher | None, count: int | None) -> str | None:
    if given := env.get(_ADDRESS):
        split_address(given, _ADDRESS)
        return given
    if env.get(_PORT):
        _port(env, _PORT)
    if launcher is None:
        return None
    if launcher.name == "torchrun" and env.get("MASTER_ADDR") and env.get("MASTER_PORT"):
        # torchrun itself listens at MASTER_PORT.
        port = _port(env, _PORT) if env.get(_PORT) else _port(env, "MASTER_PORT") % 65_535 + 1
        return _joined(env["MASTER_ADDR"], port)
    alone = launcher.here and env.get(launcher.here) == str(count)
    if launcher.name == "Open MPI" and alone and not env.get(launcher.address_by_jax):
        # Open MPI 5 names no host; on one host, what its processes have in common names a port.
        job = env.get("PMIX_NAMESPACE", "").encode()
        spread = _HIGHEST_PORT - _FIRST_PORT
        port = _port(env, _PORT) if env.get(_PORT) else _FIRST_PORT + zlib.crc32(job) % spread
        return _joined("127.0.0.1", port)
    return None


def _owns_host(env: Mapping[str, str], launcher: _Launcher | None) -> bool | None:
    if launcher is None:
        return True
    here = env.get(launcher.here, "").split("(")[0]  # Slurm: `1(x2)`, on two hosts one each
    return True if here == "1" else None


def _tpu_pod(env: Mapping[str, str]) -> Launch | None:
    hosts = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES", "")
    slices = env.get("MEGASCALE_NUM_SLICES", "1") or "1"
    if "," not in hosts and slices == "1":
        return None
    for name in ("TPU_WORKER_ID", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID"):
        if env.get(name):
            _whole(env, name)
    return Launch(None, None, None, None, "the TPU pod")


def split_address(address: str, name: str) -> tuple[str, int]:
    """Split HOST:PORT, where HOST may be an IPv6 address in brackets.

    Args:
        address: HOST:PORT.
        name: what has this value, for the error.

    Raises:
        UserError: it has another form, or the port is out of range.
    """
    host, colon, port = address.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    # A URL, or an IPv6 address without brackets.
    if (
        not colon
        or not bare
        or "/" in host
        or any(c.isspace() for c in host)
        or (":" in host and bare == host)
    ):
        raise UserError(
            f"{name}={address}: it is not HOST:PORT\n"
            f"fix: {name}=HOST:PORT at which process 0 will listen, such as node0:1234"
        )
    if not (port.isascii() and port.isdigit() and 1 <= int(port) <= _HIGHEST_PORT):
        raise UserError(
            f"{name}={address}: {port or 'nothing'} is no port\n"
            f"fix: a port from 1 to {_HIGHEST_PORT} that is free on process 0's host"
        )
    return bare, int(port)


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _port(env: Mapping[str, str], name: str) -> int:
    value = _whole(env, name)
    if not 1 <= value <= _HIGHEST_PORT:
        raise UserError(
            f"{name}={value} is no port\nfix: a port from 1 to {_HIGHEST_PORT}, or take it out"
        )
    return value


def _whole(env: Mapping[str, str], name: str) -> int:
    value = env[name].strip()
    if not (value.isascii() and value.isdigit() and len(value) < 10):
        raise UserError(
            f"{name}={env[name][:60]} is not a number from 0\n"
            "fix: the number, or take it out if this process is alone"
        )
    return int(value)
