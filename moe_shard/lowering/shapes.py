"""Parse HLO shapes such as `bf16[8,128]{1,0:T(8,128)(2,1)}` and `(f32[], s32[2]{0})`."""

from __future__ import annotations

import re

from moe_shard.errors import UserError

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<= ?]*)\]")
_TOKEN = re.compile(r"[()\[\]{},]")

# Bits of one element. Types narrower than a byte are stored packed.
_BITS = {
    "pred": 8,
    **{f"{sign}{bits}": bits for sign in "su" for bits in (1, 2, 4, 8, 16, 32, 64)},
    **{f"f{bits}": bits for bits in (16, 32, 64)},
    "bf16": 16,
    "c64": 64,
    "c128": 128,
    "token": 0,
    "opaque": 0,
}
_SMALL_FLOAT = re.compile(r"f(4|6|8)e\d+m\d+\w*")


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    if small := _SMALL_FLOAT.fullmatch(dtype):
        return int(small[1])
    raise UserError(f"unknown element type {dtype!r} in an HLO shape")


def shape_bytes(shape: str) -> int:
    """Return the bytes of an array, or of all the arrays of a tuple.

    A dim with a dynamic size (`<=8`) counts with its bound; padding by tiling is not counted.

    Raises:
        UserError: for an unknown element type, or a shape without an array.
    """
    arrays = _ARRAY.findall(shape)
    if not arrays and shape != "()":
        raise UserError(f"no array in the HLO shape {shape[:60]!r}")
    total = 0
    for dtype, dims in arrays:
        elements = 1
        for dim in re.findall(r"\d+", dims):
            elements *= int(dim)
        total += -(-elements * _bits(dtype) // 8)
    return total


def array_dims(shape: str) -> list[int]:
    """Return the sizes of the dims of an array; for a tuple, those of its first array.

    Raises:
        UserError: for a shape without an array.
    """
    found = _ARRAY.search(shape)
    if found is None:
        raise UserError(f"no array in the HLO shape {shape[:60]!r}")
    return [int(dim) for dim in re.findall(r"\d+", found[2])]


def tuple_elements(shape: str) -> list[str]:
    """Return the elements of a tuple shape, one level deep; an array is its own only element."""
    if not shape.startswith("("):
        return [shape]
    elements, depth, start = [], 0, 1
    for token in _TOKEN.finditer(shape):
        character = token[0]
        if character in "([{":
            depth += 1
            continue
        if character != ",":
            depth -= 1
        if depth == (1 if character == "," else 0):
            elements.append(re.sub(r"/\*.*?\*/", "", shape[start : token.start()]).strip())
            start = token.end()
    return [element for element in elements if element]
