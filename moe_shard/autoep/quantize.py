"""Store the projections of a plain model directory in few bits: the reverse of `dequantize`.

The formats are those of `quantized`. Stored so are the matrices of attention, dense MLPs and
experts. Norms, routers, embedding, head, biases and carried tensors stay as they are, and
`modules_to_not_convert` names those that another reader would take for projections.

- `fp8`: a block's scale is its largest magnitude over 448, the largest number of e4m3.
- `mxfp4`: the power of two that OCP Microscaling Formats 1.0 gives: of 32 numbers' largest
  magnitude, its exponent less 2, the exponent of e2m1's largest number. Only stacked experts,
  [E, I, O], have this format. Larger numbers than 6 become 6.

Both round to nearest, ties to even, from the numbers of the plain directory.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from moe_shard.autoep.exporting import reserve
from moe_shard.autoep.headers import DTYPE_BYTES, INDEX, TensorHeader, read_file, read_headers
from moe_shard.autoep.manifest import make_file, new_header
from moe_shard.autoep.plain import PT_METADATA
from moe_shard.autoep.quantized import CONFIG_KEY, Scheme, stored_names
from moe_shard.autoep.strict_json import read_object
from moe_shard.autoep.tensor_plan import Piece, TensorPlan
from moe_shard.autoep.tensors import view, writable, write
from moe_shard.errors import UserError
from moe_shard.files import write_text

Method = Literal["fp8", "mxfp4"]
SCHEMES: Mapping[str, Scheme] = {
    "fp8": Scheme("fp8", (128, 128)),
    "mxfp4": Scheme("mxfp4", (1, 32)),
}
_PROJECTIONS = frozenset(
    {
        *("query", "key", "value", "out", "query_down", "query_up", "latent_down", "latent_up"),
        *("gate", "up", "down"),
    }
)
_EXPERTS = "experts"
_FLOATS = frozenset({"F32", "BF16", "F16"})
_E4M3_MAX, _E2M1_MAX, _E2M1_EXPONENT = 448.0, 6.0, 2
_BIAS = 127


@dataclass(frozen=True)
class QuantizedTensor:
    """Describe how one tensor is to be stored.

    Attributes:
        plain: the tensor as it is.
        bits: name, dtype and shape of its numbers.
        scales: name, dtype and shape of their scales.
    """

    plain: TensorHeader
    bits: tuple[str, str, tuple[int, ...]]
    scales: tuple[str, str, tuple[int, ...]]


def quantize_directory(
    folder: Path,
    plan: TensorPlan,
    method: Method,
    *,
    progress: Callable[[int, int], object] = lambda _done, _all: None,
) -> str:
    """Store the projections of a plain model directory as few bits; the directory is changed.

    Args:
        folder: the directory; what is half done if this fails is worth nothing.
        plan: which tensor fills which parameter.
        method: the format.
        progress: called with the bytes read and all bytes.

    Returns:
        A line on what was stored how, and how far it is from what it was.

    Raises:
        UserError: the model has no tensor that the format can hold, or a number is not finite.
        OSError: the disk is too small.
    """
    headers = read_headers(folder)
    chosen = _chosen(headers, plan, method)
    if not chosen:
        raise UserError(
            f"{method} is for stacked experts [E, in, out], in a multiple of 32, which the tensors "
            "of this checkpoint are not\nfix: fp8"
            if method == "mxfp4"
            else "no matrix of attention, MLP or experts is among the tensors\nfix: plain weights"
        )
    total = sum(stored.plain.nbytes for stored in chosen.values())
    done, error, power = 0, 0.0, 0.0
    places: dict[str, str] = {}
    for file in sorted({entry.file for entry in headers.values()}):
        own = {name: entry for name, entry in headers.items() if entry.file == file}
        aside = file.with_name(f"{file.name}.quantized")
        make_file(aside, new_header(_entries(own, chosen), PT_METADATA))
        reserve(aside)
        written = read_file(aside)
        for name, place in written.items():
            places[name] = file.name
            if name in own and name not in chosen:
                write(place, view(own[name]))
        for name in own.keys() & chosen.keys():
            stored = chosen[name]
            off, size = _store(stored, method, written)
            error, power, done = error + off, power + size, done + stored.plain.nbytes
            progress(done, total)
        os.replace(aside, file)
    _state(folder, headers, chosen, plan, method, places)
    return (
        f"{len(chosen):,} of {len(headers):,} tensors stored as {SCHEMES[method].words}: "
        f"{100 * math.sqrt(error / power) if power else 0:.2g}% from what they were, in the root "
        "of mean squares"
    )


def _chosen(
    headers: Mapping[str, TensorHeader], plan: TensorPlan, method: Method
) -> dict[str, QuantizedTensor]:
    """Return how each tensor that the format is for is to be stored, by name."""
    found = {}
    for piece in plan.pieces:
        entry = headers[piece.tensor]
        if piece.param[-1] not in _PROJECTIONS or entry.dtype not in _FLOATS:
            continue
        if method == "fp8" and len(entry.shape) >= 2:
            *outer, rows, columns = entry.shape
            high, wide = SCHEMES[method].block
            grid = (*outer, -(-rows // high), -(-columns // wide))
            bits, scales = stored_names(piece.tensor, method)
            found[piece.tensor] = QuantizedTensor(
                entry, (bits, "F8_E4M3", entry.shape), (scales, "F32", grid)
            )
        elif method == "mxfp4" and _is_stack(piece, entry):
            experts, ins, outs = entry.shape
            groups = (experts, outs, ins // 32)
            bits, scales = stored_names(piece.tensor, method)
            found[piece.tensor] = QuantizedTensor(
                entry, (bits, "U8", (*groups, 16)), (scales, "U8", groups)
            )
    return found


def _is_stack(piece: Piece, entry: TensorHeader) -> bool:
    """Return whether a tensor is [E, I, O], of all experts of a layer."""
    is_experts = _EXPERTS in piece.param and len(entry.shape) == 3
    return is_experts and not piece.layout.order and entry.shape[1] % 32 == 0


def _entries(
    own: Mapping[str, TensorHeader], chosen: Mapping[str, QuantizedTensor]
) -> dict[str, TensorHeader]:
    """Return the tensors of a new file, in the order of those that they stand for."""
    found = {}
    for name, entry in sorted(own.items(), key=lambda item: item[1].begin):
        if name not in chosen:
            found[name] = entry
            continue
        for stored, dtype, shape in (chosen[name].bits, chosen[name].scales):
            size = math.prod(shape) * DTYPE_BYTES[dtype]
            found[stored] = TensorHeader(entry.file, dtype, shape, 0, size)
    return found


def _store(
    stored: QuantizedTensor, method: Method, written: Mapping[str, TensorHeader]
) -> tuple[float, float]:
    """Write a tensor's bits and scales; return the sums of squares of what is lost and of all."""
    plain = view(stored.plain)
    bits, scales = (writable(written[each[0]]) for each in (stored.bits, stored.scales))
    encode = encode_fp8 if method == "fp8" else encode_mxfp4
    error = power = 0.0
    for index in np.ndindex(plain.shape[:-2]):
        matrix = plain[index].astype(np.float32)
        if not np.isfinite(matrix).all():
            raise UserError(
                f"{stored.bits[0]}: a number is not finite, which {method} cannot store\n"
                "fix: an earlier checkpoint"
            )
        bits[index], scales[index], decoded = encode(matrix)
        error += float(np.square(decoded - matrix, dtype=np.float64).sum())
        power += float(np.square(matrix, dtype=np.float64).sum())
    return error, power


def encode_fp8(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Encode [O, I] as e4m3 with a scale for each 128 x 128.

    Returns:
        Bits [O, I], scales [ceil(O / 128), ceil(I / 128)] in float32, and the decoded numbers.
    """
    high, wide = SCHEMES["fp8"].block
    rows, columns = (-(-n // each) for n, each in zip(matrix.shape, (high, wide), strict=True))
    scales = np.ones((rows, columns), np.float32)
    bits = np.empty(matrix.shape, ml_dtypes.float8_e4m3fn)
    decoded = np.empty_like(matrix)
    for at in np.ndindex(rows, columns):
        here = tuple(
            slice(n * each, (n + 1) * each) for n, each in zip(at, (high, wide), strict=True)
        )
        most = np.abs(matrix[here]).max()
        # A block of zeros has scale 1; so has one whose scale float32 cannot hold as a normal one.
        if most / _E4M3_MAX >= np.finfo(np.float32).tiny:
            scales[at] = most / np.float32(_E4M3_MAX)
        bits[here] = (matrix[here] / scales[at]).astype(bits.dtype)
        decoded[here] = bits[here].astype(np.float32) * scales[at]
    return bits, scales, decoded


def encode_mxfp4(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Encode [I, O] as e2m1, two numbers a byte, with an exponent for each 32 inputs.

    Returns:
        Bits [O, I / 32, 16], exponents [O, I / 32] with bias 127, and the decoded numbers [I, O].
    """
    groups = np.ascontiguousarray(matrix.T).reshape(matrix.shape[1], -1, 32)
    most = np.abs(groups).max(axis=-1)
    # frexp's fraction is in [0.5, 1), so its exponent is one more than that of the number.
    exponents = np.where(most > 0, np.frexp(most)[1] - 1 - _E2M1_EXPONENT, -_BIAS)
    exponents = np.clip(exponents, -_BIAS, _BIAS)
    scaled = np.ldexp(groups, -exponents[..., None])
    clipped = np.clip(scaled, -_E2M1_MAX, _E2M1_MAX)
    halves = clipped.astype(ml_dtypes.float4_e2m1fn)
    codes = halves.view(np.uint8) & 15
    bits = codes[..., 0::2] | codes[..., 1::2] << 4
    decoded = np.ldexp(halves.astype(np.float32), exponents[..., None])
    return bits, (exponents + _BIAS).astype(np.uint8), decoded.reshape(matrix.T.shape).T


def _state(
    folder: Path,
    headers: Mapping[str, TensorHeader],
    chosen: Mapping[str, QuantizedTensor],
    plan: TensorPlan,
    method: Method,
    places: Mapping[str, str],
) -> None:
    """Say in config.json and in the index how the tensors are stored."""
    scheme = SCHEMES[method]
    said: dict[str, Any] = {
        "quant_method": method,
        "modules_to_not_convert": sorted(_left_out(headers, chosen, plan)),
    }
    if method == "fp8":
        said |= {"fmt": "e4m3", "activation_scheme": "dynamic"}
        said["weight_block_size"] = list(scheme.block)
    _rewrite(folder / "config.json", {CONFIG_KEY: said})
    index = folder / INDEX
    if index.is_file():
        notes = read_object(index).get("metadata")
        size = sum(
            entry.nbytes
            for file in sorted(set(places.values()))
            for entry in read_file(folder / file).values()
        )
        notes = {**(notes if isinstance(notes, dict) else {}), "total_size": size}
        _rewrite(index, {"metadata": notes, "weight_map": dict(sorted(places.items()))})


def _left_out(
    headers: Mapping[str, TensorHeader], chosen: Mapping[str, QuantizedTensor], plan: TensorPlan
) -> Iterator[str]:
    """Yield the modules of matrices that stay as they are, but for the lookup."""
    lookup = {piece.tensor for piece in plan.pieces if piece.param == ("embedding", "table")}
    for name, entry in headers.items():
        is_linear = name.endswith(".weight") and len(entry.shape) == 2
        if is_linear and name not in chosen and name not in lookup:
            yield name.removesuffix(".weight")


def _rewrite(path: Path, changes: Mapping[str, Any]) -> None:
    """Change entries of a JSON file."""
    text = json.dumps(read_object(path) | dict(changes), indent=2, ensure_ascii=False)
    write_text(path, text + "\n")
