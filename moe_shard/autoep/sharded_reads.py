"""Read parameters from the host onto devices, each device its own shards.

A reader of Hugging Face's or MaxText's files decides what is read, and in which parts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from moe_shard.autoep.host_blocks import Bounds, ParamPath, bounds_of_slices, leaves_of
from moe_shard.models.params import Params

Progress = Callable[[int, int], object]
"""Called with the bytes done and all bytes."""


class BlockReader(Protocol):
    """Read one parameter."""

    def blocks(self, bounds: Bounds) -> Iterable[tuple[Bounds, np.ndarray]]:
        """Yield the parts of a shard, each with its bounds in the parameter, read when needed."""


def read_sharded(
    specs: Params, reader_of: Callable[[ParamPath, Any], BlockReader], progress: Progress
) -> Params:
    """Read parameters onto this process's devices; the host holds one part at a time.

    A shard that several devices hold is read once.

    Args:
        specs: the parameters' specs: leaves with a shape, a dtype and a sharding.
        reader_of: makes the reader of a parameter, from its path and its leaf.
        progress: called as bytes arrive.
    """
    leaves = leaves_of(specs)
    total = sum(
        size_of(bounds) * np.dtype(leaf.dtype).itemsize
        for _, leaf in leaves
        for bounds in _shards_of(leaf)
    )
    done = 0
    arrays = []
    for path, leaf in leaves:
        reader = reader_of(path, leaf)
        parts: list[jax.Array] = []
        for bounds, devices in _shards_of(leaf).items():
            shards: list[jax.Array] = []
            for within, block in reader.blocks(bounds):
                shards = _send(block, within, bounds, devices, shards)
                done += block.nbytes
                del block  # otherwise it would stay in memory while the next one is read
                progress(done, total)
            parts += shards
        arrays.append(jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts))
    params: Params = jax.tree.unflatten(jax.tree.structure(specs), arrays)
    return params


def size_of(bounds: Bounds) -> int:
    """Return the number of elements within bounds."""
    return math.prod(high - low for low, high in bounds)


def rounding_lines(rounded: Mapping[tuple[str, str], Collection[str]]) -> list[str]:
    """Name the tensors whose numbers are rounded, one line for each pair of dtypes.

    Args:
        rounded: (dtype in the checkpoint, dtype here) -> names of tensors.
    """
    return [
        f"{len(names)} tensors are {there} and rounded to {here} here, such as "
        f"{next(iter(names))}; weight_dtype={there} keeps them"
        for (there, here), names in rounded.items()
    ]


def _shards_of(leaf: Any) -> dict[Bounds, list[jax.Device]]:
    """Return an array's distinct shards on this process's devices, and the devices of each."""
    found: dict[Bounds, list[jax.Device]] = {}
    for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items():
        found.setdefault(bounds_of_slices(index, leaf.shape), []).append(device)
    return found


def _send(
    block: np.ndarray,
    within: Bounds,
    bounds: Bounds,
    devices: list[jax.Device],
    shards: list[jax.Array],
) -> list[jax.Array]:
    """Send a part of a shard to the devices that hold it.

    Args:
        block: the part.
        within: its bounds in the parameter.
        bounds: the bounds of the shard.
        devices: the devices that hold the shard.
        shards: the shard on each device, as received so far; empty: not yet started.
    """
    sent = [jax.device_put(block, device) for device in devices]
    if within == bounds:
        shards = sent
    else:
        shape = tuple(high - low for low, high in bounds)
        shards = shards or [_zeros_on(shape, block.dtype, device) for device in devices]
        starts = np.array(
            [low - first for (low, _), (first, _) in zip(within, bounds, strict=True)], np.int32
        )
        shards = [_put(*pair, starts) for pair in zip(shards, sent, strict=True)]
    # The host's copies are not needed after this; without waiting they would accumulate.
    jax.block_until_ready(sent)
    return shards


def _zeros_on(shape: tuple[int, ...], dtype: np.dtype[Any], device: jax.Device) -> jax.Array:
    """Make zeros on one device; `jnp.zeros` makes them on the first device and copies them."""
    place = SingleDeviceSharding(device)
    zeros: jax.Array = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=place)()
    return zeros


@functools.partial(jax.jit, donate_argnums=0)
def _put(array: jax.Array, block: jax.Array, starts: jax.Array) -> jax.Array:
    """Write a block into an array, in place."""
    return jax.lax.dynamic_update_slice(array, block, list(starts))
