"""View and write the bytes of tensors in safetensors files in place."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np

from moe_shard.autoep.headers import TensorHeader
from moe_shard.errors import UserError

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""safetensors' names of dtypes."""

_STRIPE = 64  # elements: a transpose then reads and writes whole cache lines
_LARGE = 4 * 2**20  # bytes: below it, threads cost more than they save
_POOL = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="tensors")


def view(entry: TensorHeader) -> np.ndarray:
    """View a tensor in its file: mapped, not read, and read-only.

    Args:
        entry: the entry of a checked header.

    Raises:
        UserError: the file is gone, or shorter than its header states.
    """
    dtype = DTYPES[entry.dtype]
    if entry.begin == entry.end:
        return np.empty(entry.shape, dtype)
    try:
        size = entry.end - entry.begin
        data = np.memmap(entry.file, np.uint8, "r", offset=entry.begin, shape=(size,))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{entry.file}: bytes {entry.begin} to {entry.end} cannot be read: {error}\n"
            "fix: the file is damaged or was cut short; download it again"
        ) from error
    # A plain array: slices of it lack memmap's overhead, and keep the map alive.
    return np.frombuffer(data, dtype).reshape(entry.shape)


def writable(entry: TensorHeader) -> np.ndarray:
    """View a tensor's place in a file of full length; assigning to it writes the file.

    Args:
        entry: the place.
    """
    dtype = DTYPES[entry.dtype]
    if entry.begin == entry.end:
        return np.empty(entry.shape, dtype)
    size = entry.end - entry.begin
    data = np.memmap(entry.file, np.uint8, "r+", offset=entry.begin, shape=(size,))
    return np.frombuffer(data, dtype).reshape(entry.shape)


def write(entry: TensorHeader, tensor: np.ndarray) -> None:
    """Write a tensor to its place in a file of full length.

    Args:
        entry: the place.
        tensor: an array of the entry's shape and dtype, in C order.
    """
    assert tensor.flags.c_contiguous, entry
    assert (tensor.shape, tensor.dtype) == (entry.shape, DTYPES[entry.dtype]), entry
    with entry.file.open("r+b") as file:
        file.seek(entry.begin)
        file.write(tensor.reshape(-1).view(np.uint8).data)


def is_exact(source: np.dtype[Any], target: np.dtype[Any]) -> bool:
    """Return whether every number of one floating-point dtype exists in another."""
    a, b = ml_dtypes.finfo(source), ml_dtypes.finfo(target)
    return a.nmant <= b.nmant and a.maxexp <= b.maxexp and a.minexp >= b.minexp


def copy(target: np.ndarray, source: np.ndarray) -> None:
    """Copy elements into an array, rounding to its dtype; bit for bit if the dtype is the same.

    A transposed source is copied in stripes: otherwise a cache line would be fetched again for each
    of its elements along one dim, which is several times slower.

    Raises:
        FloatingPointError: a number is too large for float16 (bfloat16 has float32's range).
    """
    if target.itemsize < source.itemsize:
        # In memory order, whichever dim that is: a cast in stripes takes twice the time.
        with np.errstate(over="raise"):
            source = source.astype(target.dtype, order="K")
    if target.dtype == source.dtype:
        # As integers: casts of the narrow dtypes hold a lock.
        bits = np.dtype(f"u{target.itemsize}")
        target, source = target.view(bits), source.view(bits)

    def assign(stripe: slice) -> None:
        with np.errstate(over="raise"):
            target[..., stripe] = source[..., stripe]

    # In the memory order of the target: sequential writes matter more than sequential reads.
    order = np.argsort([-abs(stride) for stride in target.strides], kind="stable")
    target, source = target.transpose(order), source.transpose(order)
    flat = not source.ndim or source.strides[-1] == source.itemsize
    if flat or target.nbytes < _LARGE:
        with np.errstate(over="raise"):
            target[...] = source
        return
    stripes = [slice(at, at + _STRIPE) for at in range(0, target.shape[-1], _STRIPE)]
    for _ in _POOL.map(assign, stripes):
        pass
