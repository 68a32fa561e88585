"""What is known of accelerators: one YAML each in `configs/hardware/`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moe_shard.config.load import configs_dir
from moe_shard.config.strict_yaml import read_mapping


@dataclass(frozen=True)
class Hardware:
    """One JAX device of an accelerator.

    Attributes:
        name: for people.
        device_kinds: what `jax.Device.device_kind` says.
        peak_flops: dtype -> operations per second, dense.
        hbm_bytes: memory.
        hbm_bandwidth: bytes per second.
    """

    name: str
    device_kinds: tuple[str, ...]
    peak_flops: Mapping[str, float]
    hbm_bytes: int
    hbm_bandwidth: float


def find_hardware(device_kind: str) -> Hardware | None:
    """The accelerator that calls itself so, or None if it is not known."""
    for path in sorted((configs_dir() / "hardware").glob("*.yml")):
        content = read_mapping(path)
        if device_kind in content["device_kinds"]:
            return Hardware(**{**content, "device_kinds": tuple(content["device_kinds"])})
    return None
