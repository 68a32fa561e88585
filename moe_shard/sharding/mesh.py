"""The device mesh: from parallelism sizes in the configuration to a `jax.sharding.Mesh`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from moe_shard.config.mesh_config import MeshConfig
from moe_shard.errors import UserError


def count_slices(devices: Sequence[jax.Device]) -> int:
    """Number of groups of devices joined by ICI (or NVLink, XGMI); DCN lies between them."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Build the mesh that a configuration asks for.

    The axes are Auto: the partitioner decides what the annotations leave open.

    Args:
        config: the axes and their `ici_*` and `dcn_*` parallelism, -1 to fill.
        devices: the devices to use; all of the default backend's by default.

    Raises:
        UserError: the sizes do not multiply to the number of devices, or the sizes cannot be laid
            out on the hardware's network.
    """
    devices = list(jax.devices() if devices is None else devices)
    slices = count_slices(devices)
    simulated = slices == 1 and devices[0].platform == "cpu"
    if simulated:
        # Simulated devices have no network, so they can stand for any number of slices.
        slices = math.prod(size for size in config.dcn if size != -1)
    ici, dcn = config.resolve_levels(len(devices), slices)
    ici_shape = tuple(ici[axis] for axis in config.mesh_axes)
    dcn_shape = tuple(dcn[axis] for axis in config.mesh_axes)
    if simulated:
        array = _interleave(np.asarray(devices), ici_shape, dcn_shape)
    else:
        try:
            array = _lay_out(devices, ici_shape, dcn_shape)
        except (NotImplementedError, ValueError) as error:
            raise UserError(
                f"mesh {_sizes(ici)} (ici) x {_sizes(dcn)} (dcn) does not fit the network of "
                f"{len(devices)} x {devices[0].device_kind}\n{str(error).splitlines()[0][:160]}\n"
                "choose ici_*_parallelism as products of the slice's own dims"
            ) from error
    return Mesh(array, config.mesh_axes, axis_types=(AxisType.Auto,) * len(config.mesh_axes))


def _lay_out(
    devices: Sequence[jax.Device], ici_shape: tuple[int, ...], dcn_shape: tuple[int, ...]
) -> np.ndarray:
    if math.prod(dcn_shape) > 1:
        return mesh_utils.create_hybrid_device_mesh(
            ici_shape, dcn_shape, devices, allow_split_physical_axes=True
        )
    return mesh_utils.create_device_mesh(ici_shape, devices, allow_split_physical_axes=True)


def _interleave(
    devices: np.ndarray, ici_shape: tuple[int, ...], dcn_shape: tuple[int, ...]
) -> np.ndarray:
    """Lay slices of consecutive devices out as `create_hybrid_device_mesh` does: DCN outermost."""
    rank = len(ici_shape)
    order = [axis for pair in zip(range(rank), range(rank, 2 * rank), strict=True) for axis in pair]
    shape = tuple(d * i for d, i in zip(dcn_shape, ici_shape, strict=True))
    return devices.reshape(dcn_shape + ici_shape).transpose(order).reshape(shape)


def _sizes(sizes: dict[str, int]) -> str:
    return "{" + ", ".join(f"{axis}: {size}" for axis, size in sizes.items() if size > 1) + "}"
