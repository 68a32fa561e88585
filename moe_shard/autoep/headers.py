"""Read the names, dtypes and shapes in a directory's safetensors files, without the weights.

A file is eight bytes with the length of its header, the header as JSON, then the tensors, one after
the other (https://github.com/huggingface/safetensors). Files are untrusted: everything in them
is checked against the file's size before it is used.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from moe_shard.autoep.not_a_model import refuse_foreign_file
from moe_shard.autoep.strict_json import parse_json, read_object
from moe_shard.config.keys import shown
from moe_shard.errors import UserError

DTYPE_BYTES: Mapping[str, int] = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
"""Name of a dtype in a header -> bytes of one element."""

OUTSIDE_KEY = "weights_outside_directory"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_LENGTH_BYTES = 8
_START = 512
_LONGEST_HEADER = 100_000_000
_MOST_DIMS = 16
_AGAIN = "fix: download or save the file again"


@dataclass(frozen=True)
class TensorHeader:
    """Describe one tensor of a file without reading it.

    Attributes:
        file: the file that holds it.
        dtype: a name in `DTYPE_BYTES`.
        shape: the shape as stored.
        begin: offset of its first byte in the file.
        end: offset of the byte after its last one.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Return the bytes that elements of this shape and dtype take."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def read_headers(directory: Path, *, outside: bool = False) -> dict[str, TensorHeader]:
    """Read the headers of all tensors of a model directory, by name.

    `model.safetensors` is read where there is one, as transformers does; else the files that
    `model.safetensors.index.json` names; without either, every file that ends in `.safetensors`.

    Args:
        directory: the directory of the model.
        outside: whether the index may name files outside of the directory.

    Raises:
        UserError: there are no such files, or one is incomplete or contradicts itself or the index.
    """
    index = directory / INDEX
    if (directory / SINGLE).exists():
        return read_file(_inside(directory, SINGLE, SINGLE))
    if index.exists():
        return _read_indexed(directory, index, outside)
    names = sorted(path.name for path in directory.glob("*.safetensors"))
    if not names:
        raise _no_files(directory)
    return _merged(directory, {name: name for name in names})


def read_file(path: Path) -> dict[str, TensorHeader]:
    """Read the headers of all tensors of one file, by name.

    Raises:
        UserError: the file cannot be read, or its header does not fit its size.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            refuse_foreign_file(path, file.read(_START))
            file.seek(0)
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            start = _LENGTH_BYTES + length
            if start > size or length > _LONGEST_HEADER:
                raise UserError(
                    f"{path}: a header of {length:,} bytes in a file of {size:,} "
                    f"(at most {_LONGEST_HEADER:,} are read)\n{_AGAIN}"
                )
            text = file.read(length)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}\nfix: a file that can be read") from error
    try:
        header = parse_json(text)
    except UserError as error:
        raise UserError(f"{path}: the header: {error}\n{_AGAIN}") from error
    if not isinstance(header, dict):
        raise UserError(f"{path}: the header is not a JSON object\n{_AGAIN}")
    header.pop("__metadata__", None)  # a writer's notes
    tensors = {name: _entry(path, start, name, entry) for name, entry in header.items()}
    _check_cover(path, tensors, start, size)
    return tensors


def _entry(path: Path, start: int, name: str, entry: Any) -> TensorHeader:
    """Read one tensor's entry, with offsets counted from the start of the file."""

    def wrong(what: str) -> UserError:
        return UserError(f"{path}: tensor {shown(name)}: {what}\n{_AGAIN}")

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise wrong("its entry does not consist of dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise wrong(f"dtype {shown(dtype)} is not one of {', '.join(DTYPE_BYTES)}")
    if not _are_sizes(shape) or len(shape) > _MOST_DIMS:
        raise wrong(f"shape {shown(shape)} is not a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise wrong(f"data_offsets {shown(offsets)} are not two numbers")
    begin, end = offsets
    if end - begin != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise wrong(
            f"data_offsets {shown(offsets)} are not the size of {dtype} in shape {shown(shape)}"
        )
    return TensorHeader(path, dtype, tuple(shape), start + begin, start + end)


def _are_sizes(value: Any) -> bool:
    if not isinstance(value, list) or not {*map(type, value)} <= {int}:
        return False
    return not value or (min(value) >= 0 and max(value) < 2**63)


def _check_cover(path: Path, tensors: Mapping[str, TensorHeader], start: int, size: int) -> None:
    """Check that each byte after the header belongs to exactly one tensor."""
    at, before = start, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != at:
            how = "overlaps" if tensor.begin < at else "leaves a hole after"
            raise UserError(f"{path}: tensor {shown(name)} {how} {shown(before)}\n{_AGAIN}")
        at, before = tensor.end, name
    if at != size:
        what = "is cut off" if at > size else "has bytes after its last tensor"
        raise UserError(f"{path}: {what}: {size:,} bytes, {at:,} by its header\n{_AGAIN}")


def _read_indexed(directory: Path, index: Path, outside: bool) -> dict[str, TensorHeader]:
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(f"{index}: no weight_map\nfix: the index that came with the files")
    for name, file in places.items():
        if not isinstance(file, str):
            raise UserError(
                f"{index}: the file of {shown(name)} is {shown(file)}, not a name\n"
                "fix: the index that came with the files"
            )
    tensors = _merged(directory, dict.fromkeys(places.values(), INDEX), outside)
    for name, file in places.items():
        if name not in tensors or tensors[name].file != directory / file:
            raise UserError(
                f"{index}: tensor {shown(name)} is not in {shown(file)}, where it should be\n"
                "fix: download the file and the index again"
            )
    return tensors


def _merged(
    directory: Path, files: Mapping[str, str], outside: bool = False
) -> dict[str, TensorHeader]:
    """Merge the tensors of several files.

    Args:
        directory: the directory of the model.
        files: name of a file -> the file or index that names it.
        outside: whether a name may lead out of the directory.
    """
    tensors: dict[str, TensorHeader] = {}
    for name, named_by in files.items():
        found = read_file(_inside(directory, name, named_by, outside))
        twice = next((tensor for tensor in found if tensor in tensors), None)
        if twice is not None:
            raise UserError(
                f"{directory}: tensor {shown(twice)} is in {tensors[twice].file.name} and in "
                f"{name}\nfix: keep the files of one model, or the index that lists them"
            )
        tensors |= found
    return tensors


def _inside(directory: Path, name: str, named_by: str, outside: bool = False) -> Path:
    """Return the path of a file in the directory; it may be a link to wherever weights are kept.

    Args:
        directory: the directory of the model.
        name: the file's name or path.
        named_by: the file or index that names it.
        outside: whether the path may lead out of the directory.
    """
    path = PurePath(name)
    leaves = path.is_absolute() or ".." in path.parts
    if not path.name or not name.isprintable() or (leaves and not outside):
        where = f", and leads out of it\nfix: {OUTSIDE_KEY}=true if its weights lie there, or "
        raise UserError(
            f"{directory / named_by}: {shown(name)} is not the name of a file beside it"
            f"{where if leaves else chr(10) + 'fix: '}the index that came with the files"
        )
    path = directory / name
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):  # a missing file, or links in a circle
        raise UserError(f"{path}: missing\nfix: download the model again") from None
    if not target.is_file():
        raise UserError(f"{path}: not a file\nfix: download the model again")
    return path


def _no_files(directory: Path) -> UserError:
    pickled = sorted(path.name for path in directory.glob("*.bin"))
    if pickled:
        return UserError(
            f"{directory}: only pickled weights ({pickled[0]}), which run code when they are read\n"
            "fix: save_pretrained of transformers 5 writes them as safetensors"
        )
    return UserError(
        f"{directory}: no safetensors file\nfix: a directory with {SINGLE} or {INDEX}; or "
        f"{directory / 'config.json'}, for the model without its weights"
    )
