"""Make devices of a TARGET such as `v5e:2x4`, to compile for absent accelerators.

The devices can be put in a mesh and compiled for like real ones; nothing can be placed on them.
Each family's own compiler does the work: libtpu, and the GPU plugins of jax. Nothing here opens an
accelerator, and the variables that libtpu needs are set only while its topology is made.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from moe_shard.config.hardware import Hardware, list_hardware, load_hardware
from moe_shard.errors import UserError
from moe_shard.quiet import hide_accelerator_warnings
from moe_shard.runtime.targets import rocm

GPUS_PER_HOST = 8
MOST_DEVICES = 2**16
_INSTALL = "fix: make targets in a checkout, or: pip install 'moe_shard[targets]'"
_GPU_PLUGINS = {"cuda": ("cuda13", "cuda12"), "rocm": ("rocm7",)}


@dataclass(frozen=True)
class Target:
    """Describe hardware to compile for.

    Attributes:
        text: the argument, such as "v5e:2x4".
        name: the name of its file in `configs/hardware/`.
        hardware: one device of it.
        shape: chips along each dim of a TPU slice; (devices,) for other hardware.
    """

    text: str
    name: str
    hardware: Hardware
    shape: tuple[int, ...]

    @property
    def platform(self) -> str:
        """Return the platform whose compiler is used: "tpu", "cuda", "rocm" or "cpu"."""
        return self.hardware.compile.platform

    @property
    def backend(self) -> str:
        """Return what `jax.default_backend()` would be there: "tpu", "gpu" or "cpu"."""
        return "gpu" if self.platform in _GPU_PLUGINS else self.platform

    @property
    def note(self) -> str | None:
        """Return what the devices leave out of the real network; None if nothing."""
        if self.backend != "gpu" or self.shape[0] <= GPUS_PER_HOST:
            return None
        return (
            f"{self.text} is {self.shape[0] // GPUS_PER_HOST} hosts of {GPUS_PER_HOST}, compiled "
            "as one slice: ici_* sizes span the hosts, dcn_* sizes stay 1"
        )


def parse_target(text: str) -> Target:
    """Read a TARGET.

    Args:
        text: the name of a file in `configs/hardware/`, a colon, and a TPU topology or a number of
            devices.

    Raises:
        UserError: it does not have that form, or the hardware is not known.
    """
    name, colon, rest = text.strip().partition(":")
    if not colon:
        names = list_hardware()
        known = name.lower() if name.lower() in names else "h100"
        raise UserError(
            f"TARGET {text[:60]!r} has no size after a colon\n"
            f"fix: for example {_example(known)}; hardware: {', '.join(names)}"
        )
    hardware = load_hardware(name.lower())
    name = name.lower()
    dims = hardware.compile.topology_dims or 1
    sizes = rest.lower().split("x")
    good = len(sizes) == dims and all(re.fullmatch("[1-9][0-9]{0,5}", size) for size in sizes)
    if not good:
        what = f"a topology of {dims} dims" if dims > 1 else "a number of devices"
        raise UserError(
            f"TARGET {text[:60]!r}: {name} is followed by {what}\nfix: for example {_example(name)}"
        )
    target = Target(text.strip().lower(), name, hardware, tuple(map(int, sizes)))
    devices = target.shape[0] if dims == 1 else 1
    if devices > MOST_DEVICES:
        raise UserError(f"TARGET {text[:60]!r}: at most {MOST_DEVICES} devices")
    if target.backend == "gpu" and devices > GPUS_PER_HOST and devices % GPUS_PER_HOST:
        raise UserError(
            f"TARGET {text[:60]!r}: {devices} GPUs do not fill hosts of {GPUS_PER_HOST}\n"
            f"fix: {name}:{-(-devices // GPUS_PER_HOST) * GPUS_PER_HOST}"
        )
    return target


def _example(name: str) -> str:
    dims = load_hardware(name).compile.topology_dims
    return f"{name}:" + {2: "2x4", 3: "2x2x2"}.get(dims, "8")


def devices_for(target: Target) -> Sequence[jax.Device]:
    """Return devices of the target, to compile for.

    The process uses only the CPU from here on: it opens no accelerator.

    Raises:
        UserError: the target's compiler is not installed or is not the one of the installed jax,
            or it does not know such a topology.
    """
    jax.config.update("jax_platforms", "cpu")
    if target.platform == "cpu":
        return _simulated(target.shape[0])
    with hide_accelerator_warnings():
        try:
            if target.platform == "tpu":
                return _tpu_devices(target)
            return _gpu_devices(target)
        except (jax.errors.JaxRuntimeError, OSError) as error:
            reason = str(error).splitlines()[0][:200]
            raise UserError(
                f"no devices for TARGET {target.text}: {reason}\nfix: for example "
                f"{_example(target.name)}"
            ) from error


def compiled_with(target: Target) -> str:
    """Return which compiler was used, and that nothing ran."""
    if target.platform == "cpu":
        return "CPU's XLA, not run"
    if target.platform == "tpu":
        return f"TPU's XLA (libtpu {importlib.metadata.version('libtpu')}), not run"
    return {"cuda": "CUDA's XLA, not run", "rocm": "ROCm's XLA, not run"}[target.platform]


def _simulated(count: int) -> Sequence[jax.Device]:
    try:
        jax.config.update("jax_num_cpu_devices", count)
        devices = jax.devices("cpu")
    except RuntimeError:  # the backend has started with another number of devices
        devices = jax.devices("cpu")
    if len(devices) < count:
        raise UserError(
            f"this process has started with {len(devices)} simulated devices, {count} are wanted\n"
            "fix: ask for the target before anything else uses jax, without "
            "--xla_force_host_platform_device_count in XLA_FLAGS"
        )
    return devices[:count]


def _tpu_devices(target: Target) -> Sequence[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"TARGET {target.text} needs libtpu, which is not installed\n{_INSTALL}")
    _check_libtpu()
    how = target.hardware.compile
    options: dict[str, Any] = {"chip_config_name": how.chip_config} if how.chip_config else {}
    name = f"{how.topology}:{'x'.join(map(str, target.shape))}"
    with _environment(
        TPU_SKIP_MDS_QUERY="1",  # do not ask a metadata server whether this is a TPU host
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # no lock file: several compilations may run at once
        TPU_LOG_DIR="disabled",  # do not make /tmp/tpu_logs
        # No log files either: neither TPU_LOG_DIR nor a log level keeps all of them from TMPDIR.
        LIBTPU_INIT_ARGS=f"{os.environ.get('LIBTPU_INIT_ARGS', '')} --logtostderr=1".strip(),
        TPU_ACCELERATOR_TYPE="v5litepod-8",  # any value: it describes the host, not the target
        TPU_WORKER_HOSTNAMES="localhost",
    ):
        return topologies.get_topology_desc(name, platform="tpu", **options).devices


def _gpu_devices(target: Target) -> Sequence[jax.Device]:
    plugin = _gpu_plugin(target)
    if target.platform == "rocm":
        _register_rocm(plugin)
    hosts = max(target.shape[0] // GPUS_PER_HOST, 1)
    return topologies.get_topology_desc(
        target.text,
        platform=target.platform,
        topology=f"1x{hosts}x{target.shape[0] // hosts}",  # partitions x hosts x devices
        target_config=target.hardware.compile.target_config,
    ).devices


def _gpu_plugin(target: Target) -> Path:
    """Return the folder of jax's plugin for this platform, of jax's own version."""
    for kind in _GPU_PLUGINS[target.platform]:
        try:
            spec = importlib.util.find_spec(f"jax_plugins.xla_{kind}")
        except ModuleNotFoundError:  # there is no plugin at all
            spec = None
        if spec is not None and spec.origin is not None:
            package = f"jax-{kind}-pjrt"
            _check_version(package, jax.__version__, f"{package}=={_minor(jax.__version__)}.*")
            return Path(spec.origin).parent
    package = f"jax-{_GPU_PLUGINS[target.platform][-1]}-pjrt"
    raise UserError(f"TARGET {target.text} needs {package}, which is not installed\n{_INSTALL}")


def _register_rocm(plugin: Path) -> None:
    """Register the compiler; jax's own plugin refuses to where there is no AMD GPU."""
    from jax._src import xla_bridge  # jax has no public way to register a library as a plugin
    from jaxlib import xla_client

    xla_bridge.backends()  # jax's own attempt comes first, as it would at any later time
    if not xla_client.pjrt_plugin_loaded("rocm"):
        library = plugin / "xla_rocm_plugin.so"
        rocm.make_loadable(library)
        xla_bridge.register_plugin(
            "rocm", library_path=str(library), options={"platform_name": "ROCM"}
        )


def _check_libtpu() -> None:
    """Check libtpu's version: one that jax does not pin compiles, then cannot print the program."""
    for requirement in importlib.metadata.requires("jax") or ():
        if pinned := re.match(r"libtpu\s*==\s*([\d.]+)\.\*", requirement):
            _check_version("libtpu", pinned[1], f"libtpu=={pinned[1]}.*", parts=3)


def _check_version(package: str, wanted: str, fix: str, parts: int = 2) -> None:
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return  # built from source, whose owner knows
    if found.split(".")[:parts] != wanted.split(".")[:parts]:
        raise UserError(
            f"{package} {found} is not the one that belongs to jax {jax.__version__}\n"
            f"fix: pip install '{fix}'"
        )


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Set environment variables while the block runs."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
