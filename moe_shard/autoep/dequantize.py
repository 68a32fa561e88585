"""Decode quantized tensors to float32: bits times scales, as `quantized` describes them.

Where a scale is a power of two, float32 holds the product exactly; otherwise it is rounded once.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from moe_shard.autoep.headers import TensorHeader
from moe_shard.autoep.quantized import Quantized
from moe_shard.autoep.tensor_plan import Take
from moe_shard.autoep.tensors import DTYPES, copy, view

_BYTES = np.arange(256, dtype=np.uint8)
_E4M3 = _BYTES.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
_E8M0 = _BYTES.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
"""The number that each byte encodes; 255 is NaN."""
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_HALVES = np.concatenate([_E2M1, -_E2M1])
_E2M1_PAIRS = np.stack([_HALVES[_BYTES & 15], _HALVES[_BYTES >> 4]], axis=1).view(np.uint64)[:, 0]
"""The two numbers of each byte in one element, so that one lookup finds both."""


def read(tensor: TensorHeader) -> np.ndarray:
    """Return a tensor in its own dtype: a view of its file, or the decoded numbers.

    Args:
        tensor: a tensor from a checked header.

    Raises:
        UserError: its file cannot be read.
    """
    if not isinstance(tensor, Quantized):
        return view(tensor)
    plain = np.empty(tensor.shape, DTYPES[tensor.dtype])
    copy(plain, numbers(tensor))
    return plain


def numbers(tensor: Quantized, take: Take = ()) -> np.ndarray:
    """Decode a part of a quantized tensor to float32, and little more than that part.

    Args:
        tensor: a tensor from a checked header.
        take: the part, a slice for each of the first dims.

    Raises:
        UserError: its file cannot be read.
    """
    whole = (slice(None),) * len(tensor.shape)
    take = take + whole[len(take) :]
    bits, scales = view(tensor.bits), view(tensor.scales)
    if tensor.scheme.method == "mxfp4":
        experts, ins, outs = take
        return _mxfp4(bits[experts, outs], scales[experts, outs]).swapaxes(1, 2)[:, ins]
    *outer, rows, columns = take
    part = _fp8(bits[tuple(outer)], scales[tuple(outer)], tensor.scheme.block)
    return part[..., rows, columns]


def _mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Decode [E, O, I / 32, 16] bytes and [E, O, I / 32] exponents to [E, O, I]."""
    pairs = np.take(_E2M1_PAIRS, blocks).view(np.float32)
    pairs *= np.take(_E8M0, scales)[..., None]
    return pairs.reshape(*scales.shape[:-1], -1)


def _fp8(bits: np.ndarray, scales: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """Decode [..., O, I] with a scale for each block of O and I; the last blocks may be smaller."""
    rows, columns = block
    found = np.take(_E4M3, bits.view(np.uint8))
    wide = np.repeat(scales.astype(np.float32), columns, axis=-1)[..., : bits.shape[-1]]
    for at in range(scales.shape[-2]):
        found[..., at * rows : (at + 1) * rows, :] *= wide[..., at : at + 1, :]
    return found
