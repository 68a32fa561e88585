"""Make the device mesh, a `jax.sharding.Mesh`, from sizes of its axes or a configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from moe_shard.config.mesh_config import MESH_AXES, MeshConfig
from moe_shard.errors import UserError


def make_mesh(
    *,
    data: int = 1,
    fsdp: int = 1,
    fsdp_transpose: int = 1,
    tensor: int = 1,
    context: int = 1,
    expert: int = 1,
    dcn: Mapping[str, int] | None = None,
    devices: Sequence[jax.Device] | None = None,
    explicit: bool = False,
) -> Mesh:
    """Lay devices out in a mesh of the six axes that the default rule table names.

    >>> import moe_shard as ms
    >>> mesh = ms.make_mesh(data=2, expert=4)
    >>> {axis: size for axis, size in mesh.shape.items() if size > 1}
    {'data': 2, 'expert': 4}
    >>> ms.make_mesh(data=-1, expert=2).shape["data"]  # -1: what the others leave of 8 devices
    4

    Args:
        data: size of the axis over which only batches are split.
        fsdp: size of the axis over which batches and parameters are split; parameters are gathered
            where they are used.
        fsdp_transpose: size of the axis that splits the other dim of parameters in the same way.
        tensor: size of the axis over which products are split.
        context: size of the axis over which the positions of a sequence are split.
        expert: size of the axis over which experts are split.
        dcn: axis -> size across slices, which a slower network joins; the axis's size in the mesh
            is its size inside a slice times this one.
        devices: the devices, all of which are used; by default all of the default backend's.
        explicit: whether the axes are Explicit (shardings are part of array types) instead of Auto.

    Raises:
        UserError: the sizes do not multiply to the number of devices, two of them are -1, or they
            cannot be laid out on the hardware's network.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = dict(zip(MESH_AXES, (data, fsdp, fsdp_transpose, tensor, context, expert), strict=True))
    across = dict.fromkeys(MESH_AXES, 1) | dict(dcn or {})
    if unknown := [axis for axis in across if axis not in MESH_AXES]:
        raise UserError(
            f"make_mesh: dcn names {unknown[0]!r}, which is no axis of this mesh\n"
            f"fix: one of {', '.join(MESH_AXES)}"
        )
    slices = math.prod(across.values())
    if min(across.values()) < 1 or len(devices) % slices:
        raise UserError(
            f"make_mesh: dcn={dict(dcn or {})} does not split {len(devices)} devices into slices\n"
            "fix: sizes from 1 whose product divides the devices"
        )
    sizes = _filled(sizes, len(devices) // slices, slices)
    config = MeshConfig(ici=tuple(sizes.values()), dcn=tuple(across[axis] for axis in MESH_AXES))
    return mesh_from_config(config, devices, explicit=explicit)


def _filled(sizes: dict[str, int], total: int, slices: int) -> dict[str, int]:
    """Replace the -1 so that the sizes multiply to `total`.

    Raises:
        UserError: no size makes them do so.
    """
    asked = ", ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1)
    for axis, size in sizes.items():
        if not isinstance(size, int) or (size < 1 and size != -1):
            raise UserError(f"make_mesh({axis}={size}): not a size\nfix: a number from 1, or -1")
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise UserError(
            f"make_mesh({asked}): only one axis can take what the others leave\n"
            f"fix: give {free[1]} a size"
        )
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if total % fixed or (not free and fixed != total):
        rest = f"data={total // fixed}" if total % fixed == 0 and sizes["data"] == 1 else ""
        rest = rest or f"sizes whose product is {total}"
        raise UserError(
            f"make_mesh({asked}): the sizes multiply to {fixed}, and there are {total} devices"
            f"\nfix: {rest}{_other_devices(fixed, total, slices)}"
        )
    return {axis: total // fixed if size == -1 else size for axis, size in sizes.items()}


def _other_devices(wanted: int, total: int, slices: int) -> str:
    """Name the way to as many devices as wanted, where there is one."""
    if wanted < total:
        return f", or devices=jax.devices()[:{wanted}]"
    if jax.default_backend() == "cpu":
        count = wanted * slices
        return f", or simulate {count}: XLA_FLAGS=--xla_force_host_platform_device_count={count}"
    return ""


def count_slices(devices: Sequence[jax.Device]) -> int:
    """Count the groups of devices joined by ICI (or NVLink, XGMI); DCN lies between them."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def mesh_from_config(
    config: MeshConfig,
    devices: Sequence[jax.Device] | None = None,
    *,
    explicit: bool = False,
) -> Mesh:
    """Build the mesh that a configuration describes.

    Args:
        config: the axes and their `ici_*` and `dcn_*` parallelism, -1 to fill.
        devices: the devices to use; by default all of the default backend's.
        explicit: whether the axes are Explicit. By default they are Auto: the partitioner decides
            what the annotations leave open.

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
                "fix: sizes of ici_*_parallelism that are products of the slice's own dims"
            ) from error
    kind = AxisType.Explicit if explicit else AxisType.Auto
    return Mesh(array, config.mesh_axes, axis_types=(kind,) * len(config.mesh_axes))


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
    """Lay out slices of consecutive devices as `create_hybrid_device_mesh` does: DCN outermost."""
    rank = len(ici_shape)
    order = [axis for pair in zip(range(rank), range(rank, 2 * rank), strict=True) for axis in pair]
    shape = tuple(d * i for d, i in zip(dcn_shape, ici_shape, strict=True))
    return devices.reshape(dcn_shape + ici_shape).transpose(order).reshape(shape)


def _sizes(sizes: dict[str, int]) -> str:
    return "{" + ", ".join(f"{axis}: {size}" for axis, size in sizes.items() if size > 1) + "}"
