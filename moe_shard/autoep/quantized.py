"""Find weights that are stored as few bits and scales.

Two formats are read, both as published by the models' authors:

- `fp8` (DeepSeek-V3, arXiv 2412.19437): a matrix in float8_e4m3, [..., O, I], and, under its
  name and `_scale_inv`, a factor for each block of `weight_block_size`.
- `mxfp4` (gpt-oss; OCP Microscaling Formats 1.0): `<name>_blocks`, bytes of two e2m1 numbers each,
  the low half first, [E, O, I / 32, 16], and `<name>_scales`, an exponent of two for every 32
  numbers. Together they encode `<name>`, [E, I, O].

Weights are read as bfloat16 and exported as bfloat16, or stored in one of the two formats again
where that is asked for (`quantize`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from moe_shard.autoep.headers import TensorHeader
from moe_shard.config.keys import shown
from moe_shard.errors import UserError

CONFIG_KEY = "quantization_config"
DTYPE = "BF16"
"""Dtype of decoded tensors."""

_BASE = (
    "the bfloat16 model that it was made from, which its card names: "
    "`hf download ID --local-dir DIR`"
)
_LOADED = (
    "AutoModelForCausalLM.from_pretrained(DIR, dtype='bfloat16'{0}) of transformers, then "
    "{1}save_pretrained(NEW), and NEW"
)
_UNREAD: Mapping[str, tuple[str, str]] = {
    "gptq": ("integers by groups, rounded one by one", _BASE),
    "awq": ("integers by groups, scaled by activations", _BASE),
    "compressed-tensors": (
        "llm-compressor's formats",
        _LOADED.format(", quantization_config=CompressedTensorsConfig(run_compressed=False)", ""),
    ),
    "bitsandbytes": ("blocks of 8 or 4 bits", _LOADED.format("", "dequantize() and ")),
    "fbgemm_fp8": ("fp8 with a scale for each row", _BASE),
    **dict.fromkeys(
        ("aqlm", "auto-round", "bitnet", "eetq", "higgs", "hqq", "modelopt", "quanto", "quark"),
        ("a format of its own", _BASE),
    ),
    **dict.fromkeys(("spqr", "torchao", "vptq"), ("a format of its own", _BASE)),
}
"""Other values of `quant_method` -> what they are, and how to come by a model that is read."""

_SCALE, _BLOCKS, _SCALES = "_scale_inv", "_blocks", "_scales"
_DEFAULT_BLOCK = [128, 128]
_E4M3 = ("e4m3", "float8_e4m3fn")
_GROUP, _GROUP_BYTES = 32, 16
_SCALE_DTYPES = frozenset({"F32", "BF16", "F16", "F8_E8M0"})


@dataclass(frozen=True)
class Scheme:
    """Describe what `quantization_config` states.

    Attributes:
        method: `fp8` or `mxfp4`.
        block: outputs and inputs that share a scale.
    """

    method: str
    block: tuple[int, int]

    @property
    def words(self) -> str:
        """Return the scheme's name, for a report."""
        return f"{self.method}, a scale for each {self.block[0]} x {self.block[1]}"


@dataclass(frozen=True)
class Quantized(TensorHeader):
    """Describe a tensor stored as bits and scales; dtype and shape are those of the weights.

    Attributes:
        bits: its numbers, as stored; `file`, `begin` and `end` refer to them.
        scales: the factors of the numbers.
        scheme: how they are quantized.
    """

    bits: TensorHeader
    scales: TensorHeader
    scheme: Scheme


def read_scheme(content: Any, where: Path) -> Scheme | None:
    """Read a `quantization_config`; None where it is null.

    Args:
        content: its value.
        where: the file, for messages.

    Raises:
        UserError: it states an unsupported scheme.
    """
    if content is None:
        return None
    content = content if isinstance(content, dict) else {"quant_method": content}
    method = content.get("quant_method")
    if method == "mxfp4":
        return Scheme(method, (1, _GROUP))
    block = content.get("weight_block_size", _DEFAULT_BLOCK)
    if method == "fp8" and content.get("fmt", "e4m3") in _E4M3 and _is_block(block):
        return Scheme(method, tuple(block))
    if method in _UNREAD:
        kind, fix = _UNREAD[method]
        bits = content.get("bits", content.get("w_bit"))
        each = f", {bits} bits a weight" if type(bits) is int else ""
        raise UserError(
            f"{where}: {CONFIG_KEY}: the weights are stored as {method}{each} ({kind}), which is "
            f"not read\nfix: {fix}"
        )
    more = [key for key in ("fmt", "weight_block_size") if method == "fp8" and key in content]
    stored = ", ".join([shown(method), *(f"{key}={shown(content[key])}" for key in more)])
    raise UserError(
        f"{where}: {CONFIG_KEY}: the weights are stored as {stored}\n"
        "fix: convert the model to bfloat16 first; read are plain weights, mxfp4, and fp8 (e4m3) "
        "with a scale for each block"
    )


def _is_block(value: Any) -> bool:
    is_pair = isinstance(value, list) and len(value) == 2
    return is_pair and all(type(n) is int and n > 0 for n in value)


def stored_names(name: str, method: str) -> tuple[str, str]:
    """Return the names of a tensor's bits and of their scales."""
    if method == "mxfp4":
        return name + _BLOCKS, name + _SCALES
    return name, name + _SCALE


class _Found(NamedTuple):
    """Describe bits and scales that belong together.

    Attributes:
        name: name of the decoded tensor.
        bits: name of the tensor with them.
        scales: name of the tensor with their scales.
        shape: shape of the decoded tensor.
    """

    name: str
    bits: str
    scales: str
    shape: tuple[int, ...]


def with_scales(
    headers: Mapping[str, TensorHeader], scheme: Scheme | None, where: Path
) -> dict[str, TensorHeader]:
    """Join the bits of quantized tensors with their scales.

    Args:
        headers: the tensors as stored.
        scheme: the scheme in `config.json`; None: nothing is changed.
        where: the directory, for messages.

    Raises:
        UserError: bits have no scales, shapes or dtypes do not match, or no tensor is stored by
            the scheme.
    """
    found = dict(headers)
    if scheme is None:
        return found
    find = _find_mxfp4 if scheme.method == "mxfp4" else _find_fp8
    for name, tensor in headers.items():
        pair = find(name, tensor, headers, scheme, where)
        if pair is None:
            continue
        del found[pair.bits], found[pair.scales]
        if pair.name in found:
            raise UserError(
                f"{where}: {shown(pair.name)} and {shown(pair.bits)} are one thing\n"
                "fix: keep one of the two"
            )
        found[pair.name] = Quantized(
            file=tensor.file,
            dtype=DTYPE,
            shape=pair.shape,
            begin=tensor.begin,
            end=tensor.end,
            bits=tensor,
            scales=headers[pair.scales],
            scheme=scheme,
        )
    if len(found) == len(headers):
        raise UserError(
            f"{where}: config.json has {CONFIG_KEY} with {scheme.method}, but no tensor is stored "
            "so\nfix: remove it from config.json if the weights are plain"
        )
    return found


def _find_fp8(
    name: str,
    tensor: TensorHeader,
    headers: Mapping[str, TensorHeader],
    scheme: Scheme,
    where: Path,
) -> _Found | None:
    if tensor.dtype != "F8_E4M3" or len(tensor.shape) < 2:
        return None
    *outer, rows, columns = tensor.shape
    grid = (*outer, -(-rows // scheme.block[0]), -(-columns // scheme.block[1]))
    scales = name + _SCALE
    _check_scales(name, scales, grid, _SCALE_DTYPES, headers, where)
    return _Found(name, name, scales, tensor.shape)


def _find_mxfp4(
    name: str,
    tensor: TensorHeader,
    headers: Mapping[str, TensorHeader],
    _scheme: Scheme,
    where: Path,
) -> _Found | None:
    if not name.endswith(_BLOCKS):
        return None
    if tensor.dtype != "U8" or len(tensor.shape) != 4 or tensor.shape[-1] != _GROUP_BYTES:
        raise UserError(
            f"{where}: {shown(name)} is {tensor.dtype} of shape {shown(tensor.shape)}, not U8 "
            f"[experts, out, in / {_GROUP}, {_GROUP_BYTES}]\nfix: download the model again"
        )
    plain = name.removesuffix(_BLOCKS)
    experts, rows, groups, _ = tensor.shape
    scales = plain + _SCALES
    _check_scales(name, scales, (experts, rows, groups), {"U8"}, headers, where)
    return _Found(plain, name, scales, (experts, groups * _GROUP, rows))


def _check_scales(
    bits: str,
    scales: str,
    shape: tuple[int, ...],
    dtypes: Collection[str],
    headers: Mapping[str, TensorHeader],
    where: Path,
) -> None:
    found = headers.get(scales)
    if found is None or found.shape != shape or found.dtype not in dtypes:
        what = f"{found.dtype} of shape {shown(found.shape)}" if found else "missing"
        raise UserError(
            f"{where}: {shown(bits)}: its scales {shown(scales)} are {what}, not "
            f"{' or '.join(sorted(dtypes))} of shape {shown(shape)}\n"
            f"fix: the rest of the files, or the {CONFIG_KEY} of these tensors"
        )
