"""Read the specifications of accelerators, one YAML file each in `configs/hardware/`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moe_shard.config.load import configs_dir
from moe_shard.config.strict_yaml import read_mapping
from moe_shard.errors import UserError


@dataclass(frozen=True, kw_only=True)
class CompileTarget:
    """Describe how XLA compiles for an absent accelerator; see `runtime/targets/target.py`.

    Attributes:
        platform: "tpu", "cuda", "rocm" or "cpu".
        topology: libtpu's name of the TPU family; empty for other platforms.
        topology_dims: dims of the network between a TPU's chips; 0 for other platforms.
        chip_config: libtpu's name of how a chip's cores form devices; empty for its default.
        target_config: a `GpuTargetConfigProto` as text; empty for other platforms than GPUs.
    """

    platform: str
    topology: str = ""
    topology_dims: int = 0
    chip_config: str = ""
    target_config: str = ""


@dataclass(frozen=True)
class Hardware:
    """Describe one JAX device of an accelerator.

    Attributes:
        name: the name shown to people.
        device_kinds: values of `jax.Device.device_kind` that it goes by.
        peak_flops: dtype -> dense operations per second.
        hbm_bytes: bytes of memory; None where devices have none of their own (simulated ones).
        hbm_bandwidth: bytes per second; None where unknown.
        compile: how to compile for it where it is absent.
        link_bandwidth: bytes per second that it sends to devices of its slice or host, over all its
            links together; None where devices are simulated.
        network_bandwidth: bytes per second it sends to other hosts, or None where the links reach
            them too.
    """

    name: str
    device_kinds: tuple[str, ...]
    peak_flops: Mapping[str, float]
    hbm_bytes: int | None
    hbm_bandwidth: float | None
    compile: CompileTarget
    link_bandwidth: float | None = None
    network_bandwidth: float | None = None


def find_hardware(device_kind: str) -> Hardware | None:
    """Find an accelerator by its `device_kind`; None if it is not known."""
    for path in sorted((configs_dir() / "hardware").glob("*.yml")):
        if device_kind in read_mapping(path)["device_kinds"]:
            return _read(path)
    return None


def list_hardware() -> list[str]:
    """List the names of the files in `configs/hardware/`, sorted."""
    return sorted(path.stem for path in (configs_dir() / "hardware").glob("*.yml"))


def load_hardware(name: str) -> Hardware:
    """Read an accelerator from its file in `configs/hardware/`.

    Raises:
        UserError: there is no such file; the message has the nearest names.
    """
    names = list_hardware()
    if name not in names:
        near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.4)
        fix = f"did you mean {' or '.join(near)}?" if near else f"one of {', '.join(names)}"
        raise UserError(f"hardware {name[:60]!r} is not in configs/hardware/\nfix: {fix}")
    return _read(configs_dir() / "hardware" / f"{name}.yml")


def _read(path: Path) -> Hardware:
    content = read_mapping(path)
    return Hardware(
        **{
            **content,
            "device_kinds": tuple(content["device_kinds"]),
            "compile": CompileTarget(**content["compile"]),
        }
    )
