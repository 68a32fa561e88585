"""Tensors of a checkpoint into parameters that are sharded over a mesh, and back.

A plan says which part of which parameter each tensor fills. Both ways go a part at a time: of a
stack of layers the host holds one layer's part of one shard, never the stack.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from moe_shard.autoep.dequantize import numbers
from moe_shard.autoep.headers import TensorHeader
from moe_shard.autoep.plan import Piece, Plan
from moe_shard.autoep.quantized import Quantized
from moe_shard.autoep.tensors import DTYPES, copy, is_exact, view, write
from moe_shard.errors import UserError
from moe_shard.models.params import Params

Progress = Callable[[int, int], object]
"""Told of bytes done and bytes in all."""

Path = tuple[str, ...]
Index = tuple[int, ...]
Take = tuple[slice, ...]
Bounds = tuple[tuple[int, int], ...]
"""First and one past the last element along each dim."""

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
    pieces = _by_param(plan, headers, specs)
    leaves = dict(_leaves(specs))
    _say_what_is_rounded(pieces, headers, leaves, say)
    total = sum(
        math.prod(high - low for low, high in bounds) * np.dtype(leaf.dtype).itemsize
        for leaf in leaves.values()
        for bounds in _shards(leaf)
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
            for bounds, devices in _shards(leaf).items()
            for part in reader.read(bounds, devices, advance)
        ]
        arrays.append(jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts))
    params: Params = jax.tree.unflatten(jax.tree.structure(specs), arrays)
    return params


def export_params(
    plan: Plan,
    headers: Mapping[str, TensorHeader],
    params: Params,
    *,
    progress: Progress = lambda _done, _all: None,
) -> None:
    """Write the tensors of a plan into files of their full lengths, a tensor at a time.

    Each is in its own dtype, so that what was imported is written bit for bit. What the plan
    carries is left to the caller.

    Args:
        plan: of the checkpoint's tensors.
        headers: where each tensor belongs.
        params: on devices of this process.
        progress: told as bytes are written.

    Raises:
        UserError: a tensor is not of the plan, or not filled by it; a number is too large for its
            dtype; there are several processes.
    """
    pieces: dict[str, list[Piece]] = {}
    for piece in plan.pieces:
        pieces.setdefault(piece.tensor, []).append(piece)
    _same_names("tensor", headers, {*pieces, *plan.carried})
    arrays = dict(_leaves(params))
    if not all(array.is_fully_addressable for array in arrays.values()):
        raise UserError(
            "an export of parameters that are on other processes' devices as well\n"
            "fix: export from their checkpoint, in one process: tools/export_hf.py"
        )
    # File by file and front to back.
    order = sorted(pieces, key=lambda name: (headers[name].file, headers[name].begin))
    total = sum(headers[name].end - headers[name].begin for name in order)
    done = 0
    for name in order:
        entry = headers[name]
        tensor = np.empty(entry.shape, DTYPES[entry.dtype])
        filled = 0
        for piece in pieces[name]:
            target = _seen(piece, tensor)
            with _naming(piece):
                _fetch(arrays[piece.param], piece.index, target)
            filled += target.size
        if filled != tensor.size:
            raise UserError(
                f"tensor {name}: {filled} of its {tensor.size} elements are in parameters\n"
                "fix: the family's patterns have to take all of it"
            )
        write(entry, tensor)
        done += entry.end - entry.begin
        progress(done, total)


def _leaves(tree: Params) -> list[tuple[Path, Any]]:
    return [
        (tuple(key.key for key in path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _by_param(
    plan: Plan, headers: Mapping[str, TensorHeader], specs: Params
) -> dict[Path, dict[Index, Piece]]:
    """The pieces of each parameter by their index; together they are all of it, once."""
    _same_names("tensor", headers, {piece.tensor for piece in plan.pieces} | {*plan.carried})
    found: dict[Path, dict[Index, Piece]] = {}
    for piece in plan.pieces:
        of_param = found.setdefault(piece.param, {})
        if piece.index in of_param:
            raise UserError(
                f"{'.'.join(piece.param)}{list(piece.index)} is filled by tensor {piece.tensor} "
                f"and by {of_param[piece.index].tensor}\nfix: the family's patterns name it twice"
            )
        of_param[piece.index] = piece
    leaves = dict(_leaves(specs))
    _same_names(
        "parameter", {".".join(path) for path in leaves}, {".".join(path) for path in found}
    )
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


def _same_names(what: str, here: Iterable[str], planned: Iterable[str]) -> None:
    here, planned = set(here), set(planned)
    if odd := sorted(here ^ planned):
        raise UserError(
            f"{what} {odd[0]} is {'of no' if odd[0] in here else 'in the'} plan"
            f"{'' if odd[0] in here else ' and not there'} ({len(odd)} such)\n"
            "fix: a family whose patterns take each tensor, or another checkpoint"
        )


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


def _shards(leaf: Any) -> dict[Bounds, list[jax.Device]]:
    """The distinct shards of an array on this process's devices, and which hold each."""
    found: dict[Bounds, list[jax.Device]] = {}
    for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items():
        found.setdefault(_bounds(index, leaf.shape), []).append(device)
    return found


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> Bounds:
    cut = (part.indices(size) for part, size in zip(index, shape, strict=True))
    return tuple((low, high) for low, high, _ in cut)


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
            arrays = [_zeros(shape, self.dtype, device) for device in devices]
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
            with _naming(piece):
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
            yield (), self._checked(piece, view(entry))[whole]
            return
        self._checked(piece, np.broadcast_to(np.float32(0), entry.shape))
        layout = piece.layout
        if len(entry.shape) == 3 and layout.keeps_first:
            for at, expert in enumerate(range(*within[0].indices(entry.shape[0]))):
                one = numbers(entry, (slice(expert, expert + 1), *layout.take[1:]))
                yield (at,), layout.arrange(one)[0][whole[1:]]
        else:
            yield (), layout.arrange(numbers(entry, layout.take))[whole]

    def _checked(self, piece: Piece, tensor: np.ndarray) -> np.ndarray:
        """A tensor as its parameter has it."""
        seen = _seen(piece, tensor)
        if seen.shape != self.shape[self.depth :]:
            raise UserError(
                f"tensor {piece.tensor} has shape {list(tensor.shape)}: "
                f"as a part of {'.'.join(piece.param)} that is {list(seen.shape)}, not "
                f"{list(self.shape[self.depth :])}\n"
                "fix: the checkpoint and its config.json have to be of one model"
            )
        return seen


def _seen(piece: Piece, tensor: np.ndarray) -> np.ndarray:
    """A tensor, or room for one, as its parameter has it."""
    try:
        return piece.layout.view(tensor)
    except (ValueError, IndexError) as error:
        raise UserError(
            f"tensor {piece.tensor} of shape {list(tensor.shape)} is no part of "
            f"{'.'.join(piece.param)}: {error}\n"
            "fix: the checkpoint and its config.json have to be of one model"
        ) from error


@contextmanager
def _naming(piece: Piece) -> Iterator[None]:
    try:
        yield
    except FloatingPointError as error:
        raise UserError(
            f"a number is too large for float16: tensor {piece.tensor}, parameter "
            f"{'.'.join(piece.param)}\nfix: weight_dtype=bfloat16 or float32"
        ) from error


def _zeros(shape: tuple[int, ...], dtype: np.dtype[Any], device: jax.Device) -> jax.Array:
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


def _fetch(array: jax.Array, index: Index, target: np.ndarray) -> None:
    """Copy the part at an index of an array's first dims to the host, shard by shard."""
    depth = len(index)
    seen = set()
    for shard in array.addressable_shards:
        bounds = _bounds(shard.index, array.shape)
        inside = all(low <= at < high for at, (low, high) in zip(index, bounds, strict=False))
        if bounds in seen or not inside:
            continue
        seen.add(bounds)
        starts = [at - low for at, (low, _) in zip(index, bounds, strict=False)]
        part = _take(shard.data, np.array(starts, np.int32))
        within: Any = (*(slice(*bound) for bound in bounds[depth:]), ...)
        copy(target[within], np.asarray(part))


@jax.jit
def _take(shard: jax.Array, index: jax.Array) -> jax.Array:
    """The part at an index of the first dims, as an array that is freed after use."""
    return jax.lax.dynamic_slice(
        shard,
        [*index, *[0] * (shard.ndim - index.size)],
        [*[1] * index.size, *shard.shape[index.size :]],
    ).reshape(shard.shape[index.size :])
