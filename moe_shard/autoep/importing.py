"""Tensors of a checkpoint into parameters that are sharded over a mesh.

A plan says which part of which parameter each tensor fills. They go a part at a time: of a stack of
layers the host holds one layer's part of one shard, never the stack.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from moe_shard.autoep.dequantize import numbers
from moe_shard.autoep.fitting import naming, pieces_by_param, same_names, seen
from moe_shard.autoep.headers import TensorHeader
from moe_shard.autoep.host_blocks import Bounds, Index, Path, bounds_of, leaves_of
from moe_shard.autoep.quantized import Quantized
from moe_shard.autoep.tensor_plan import Piece, Plan
from moe_shard.autoep.tensors import DTYPES, copy, is_exact, view
from moe_shard.errors import UserError
from moe_shard.models.params import Params

Progress = Callable[[int, int], object]
"""Told of bytes done and bytes in all."""

Take = tuple[slice, ...]

_BLOCK = 16 * 2**20
"""Bytes that are put together on the host and sent at once, where a tensor's part is no larger."""

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


def import_params(
    plan: Plan,
    headers: Mapping[str, TensorHeader],
    specs: Params,
    *,
    say: Callable[[str], object] = lambda _: None,
    progress: Progress = lambda _done, _all: None,
) -> Params:
    """Read parameters, each device its own shards; of several processes, each those of its devices.

    The values are the checkpoint's in the parameters' dtypes. A wider dtype holds them exactly; a
    narrower one is said.

    Args:
        plan: of the checkpoint's tensors.
        headers: where the tensors are.
        specs: what the parameters are to be: leaves with a shape, a dtype and a sharding.
        say: told of numbers that are rounded.
        progress: told as bytes arrive on this process's devices.

    Raises:
        UserError: the plan does not fill each element of each parameter once, a tensor is missing,
            of another shape or of integers, or its file cannot be read.
    """
    leaves = dict(leaves_of(specs))
    pieces = _by_param(plan, headers, leaves)
    _say_what_is_rounded(pieces, headers, leaves, say)
    total = sum(
        math.prod(high - low for low, high in bounds) * np.dtype(leaf.dtype).itemsize
        for leaf in leaves.values()
        for bounds in shards_of(leaf)
    )
    done = 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        progress(done, total)

    arrays = []
    for path, leaf in leaves.items():
        reader = _Reader(leaf, pieces[path], headers)
        parts = [
            part
            for bounds, devices in shards_of(leaf).items()
            for part in reader.read(bounds, devices, advance)
        ]
        arrays.append(jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts))
    params: Params = jax.tree.unflatten(jax.tree.structure(specs), arrays)
    return params


def _by_param(
    plan: Plan, headers: Mapping[str, TensorHeader], leaves: Mapping[Path, Any]
) -> dict[Path, dict[Index, Piece]]:
    """The pieces of each parameter by their index; together they are all of it, once."""
    found = pieces_by_param(plan, headers)
    same_names("parameter", map(".".join, leaves), map(".".join, found))
    for path, of_param in found.items():
        shape = leaves[path].shape
        depth = len(next(iter(of_param)))
        wanted = set(np.ndindex(shape[:depth]))
        if odd := wanted ^ of_param.keys():
            raise UserError(
                f"{'.'.join(path)}, of shape {shape}: the checkpoint "
                f"{'lacks' if min(odd) in wanted else 'has another'} part {list(min(odd))}\n"
                "fix: the checkpoint's number of layers and experts has to be the model's"
            )
    return found


def _say_what_is_rounded(
    pieces: Mapping[Path, Mapping[Index, Piece]],
    headers: Mapping[str, TensorHeader],
    leaves: Mapping[Path, Any],
    say: Callable[[str], object],
) -> None:
    rounded: dict[tuple[str, str], list[str]] = {}
    for path, of_param in pieces.items():
        dtype = np.dtype(leaves[path].dtype)
        for piece in of_param.values():
            entry = headers[piece.tensor]
            if entry.dtype not in _FLOATS:
                raise UserError(
                    f"tensor {piece.tensor} is {entry.dtype}, not numbers of {dtype.name}\n"
                    "fix: a checkpoint that is not quantized"
                )
            if not is_exact(DTYPES[entry.dtype], dtype):
                key = DTYPES[entry.dtype].name, dtype.name
                rounded.setdefault(key, []).append(piece.tensor)
    for (there, here), names in rounded.items():
        say(
            f"{len(names)} tensors are {there} and rounded to {here} here, such as {names[0]}; "
            f"weight_dtype={there} keeps them"
        )


def shards_of(leaf: Any) -> dict[Bounds, list[jax.Device]]:
    """The distinct shards of an array on this process's devices, and which hold each."""
    found: dict[Bounds, list[jax.Device]] = {}
    for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items():
        found.setdefault(bounds_of(index, leaf.shape), []).append(device)
    return found


class _Reader:
    """Reads the shards of one parameter.

    Args:
        leaf: what the parameter is to be.
        pieces: that fill it, by index.
        headers: where their tensors are.
    """

    def __init__(
        self, leaf: Any, pieces: Mapping[Index, Piece], headers: Mapping[str, TensorHeader]
    ) -> None:
        self.shape, self.dtype = leaf.shape, np.dtype(leaf.dtype)
        self.pieces, self.headers = pieces, headers
        self.depth = len(next(iter(pieces)))

    def read(
        self, bounds: Bounds, devices: list[jax.Device], advance: Callable[[int], None]
    ) -> list[jax.Array]:
        """One shard, on each device that holds it; it is read once.

        Args:
            bounds: of the shard in the parameter.
            devices: that hold it.
            advance: told of bytes that have arrived.
        """
        shape = tuple(high - low for low, high in bounds)
        outer = self._outer_dims(shape)
        arrays = []
        if outer:
            arrays = [zeros_on(shape, self.dtype, device) for device in devices]
        for index in np.ndindex(shape[:outer]):
            block = self._block(bounds, index)
            sent = [jax.device_put(block, device) for device in devices]
            if outer:
                place = np.array(index, np.int32)
                arrays = [_put(*pair, place) for pair in zip(arrays, sent, strict=True)]
            else:
                arrays = sent
            # The host's copy is not needed from here on; without the wait they would pile up.
            jax.block_until_ready(sent)
            advance(block.nbytes)
        return arrays

    def _outer_dims(self, shape: tuple[int, ...]) -> int:
        """How many of the first dims are gone through one by one, so that a block is small."""
        size = self.dtype.itemsize
        fits = (d for d in range(self.depth) if math.prod(shape[d:]) * size <= _BLOCK)
        return next(fits, self.depth)

    def _block(self, bounds: Bounds, outer: Index) -> np.ndarray:
        """A shard's part at an index of its first dims, on the host."""
        lows = [low for low, _ in bounds]
        shape = tuple(high - low for low, high in bounds)[len(outer) :]
        block = np.empty(shape, self.dtype)
        within = tuple(slice(*part) for part in bounds[self.depth :])
        for inner in np.ndindex(shape[: self.depth - len(outer)]):
            index = tuple(map(sum, zip(lows, (*outer, *inner), strict=False)))
            piece = self.pieces[index]
            with naming(piece):
                for at, part in self._parts(piece, within):
                    copy(block[(*inner, *at, ...)], part)
        return block

    def _parts(self, piece: Piece, within: Take) -> Iterator[tuple[Index, np.ndarray]]:
        """What a shard has of a piece, as the parameter has it.

        What lies plain in its file is seen there, all at once. Quantized numbers are made anew, so
        of a tensor with all experts one expert's at a time.

        Args:
            piece: of the parameter.
            within: what the shard has of it.

        Yields:
            Where the part belongs in the shard's first dims, and the part.
        """
        entry = self.headers[piece.tensor]
        whole: Any = (*within, ...)
        if not isinstance(entry, Quantized):
            yield (), seen(piece, view(entry), self.shape)[whole]
            return
        seen(piece, np.broadcast_to(np.float32(0), entry.shape), self.shape)
        layout = piece.layout
        if len(entry.shape) == 3 and layout.keeps_first:
            for at, expert in enumerate(range(*within[0].indices(entry.shape[0]))):
                one = numbers(entry, (slice(expert, expert + 1), *layout.take[1:]))
                yield (at,), layout.arrange(one)[0][whole[1:]]
        else:
            yield (), layout.arrange(numbers(entry, layout.take))[whole]


def zeros_on(shape: tuple[int, ...], dtype: np.dtype[Any], device: jax.Device) -> jax.Array:
    """Made where they are wanted; `jnp.zeros` makes them on the first device, then copies them."""
    place = SingleDeviceSharding(device)
    zeros: jax.Array = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=place)()
    return zeros


@functools.partial(jax.jit, donate_argnums=0)
def _put(array: jax.Array, block: jax.Array, index: jax.Array) -> jax.Array:
    """Write a block at an index of the first dims, in place."""
    outer = array.ndim - block.ndim
    starts = [*index, *[0] * block.ndim]
    return jax.lax.dynamic_update_slice(array, block[(None,) * outer], starts)
