"""What a Hugging Face directory was, without its weights: enough to write it again, byte for byte.

The folder `hf/` of an imported model, or of a run that began with one, holds the small files of the
directory (configuration, tokenizer, chat templates), the tensors that no parameter takes, and
`manifest.json`: the header of each of its safetensors files. A folder may come from a stranger:
what its manifest says is checked before a file is made.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_shard.autoep.headers import TensorEntry
from moe_shard.autoep.tensors import DTYPES, view, write
from moe_shard.errors import UserError, first_line

MANIFEST = "manifest.json"
CARRIED = "carried.safetensors"
FAMILY = "family.yml"
INDEX = "model.safetensors.index.json"
_VERSION = 1
_SMALL = frozenset({".json", ".jinja", ".txt", ".model", ".tiktoken"})
"""Endings of the files that are kept; code is not, nor weights in other formats."""
_LARGEST_HEADER = 100_000_000  # bytes, as in safetensors itself


@dataclass(frozen=True)
class FileLayout:
    """One safetensors file, but for its tensors' bytes.

    Attributes:
        header_bytes: length of the header, the spaces that fill it up included.
        header: as it is in the file: each tensor's dtype, shape and data_offsets, `__metadata__`.
    """

    header_bytes: int
    header: Mapping[str, Any]

    def entries(self, file: Path) -> dict[str, TensorEntry]:
        """Where each tensor lies in a file with this header.

        Args:
            file: its path.

        Raises:
            UserError: the header is none, or its tensors overlap or leave a gap.
        """
        start = 8 + self.header_bytes
        try:
            found = {
                name: _entry(file, start, tensor)
                for name, tensor in self.header.items()
                if name != "__metadata__"
            }
            metadata = self.header.get("__metadata__") or {}
            if not all(isinstance(value, str) for value in metadata.values()):
                raise ValueError("__metadata__ is not text")
            end = start
            for entry in sorted(found.values(), key=lambda entry: (entry.begin, entry.end)):
                if entry.begin != end:
                    raise ValueError(f"tensors overlap or leave a gap at byte {end - start}")
                end = entry.end
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{file}: its header is not safetensors': {first_line(error)}\n"
                "fix: take the file from where it came once more"
            ) from error
        return found

    def make(self, file: Path) -> dict[str, TensorEntry]:
        """Make the file at its full length, the tensors' bytes zero, and say where they lie."""
        entries = self.entries(file)
        header = _to_bytes(self.header, self.header_bytes)
        size = max((entry.end for entry in entries.values()), default=8 + len(header))
        with file.open("xb") as out:
            out.write(struct.pack("<Q", len(header)) + header)
            out.truncate(size)
        return entries


def _entry(file: Path, start: int, tensor: Mapping[str, Any]) -> TensorEntry:
    shape, (begin, end) = tuple(tensor["shape"]), tensor["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError("a shape or an offset is not a number")
    if end - begin != math.prod(shape) * DTYPES[tensor["dtype"]].itemsize:
        raise ValueError(f"data_offsets {begin} to {end} are not of shape {shape}")
    return TensorEntry(file, tensor["dtype"], shape, start + begin, start + end)


def _to_bytes(header: Mapping[str, Any], length: int) -> bytes:
    """As safetensors writes it: compact, and filled up with spaces."""
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    if len(text) > length:
        raise UserError(
            f"a header of {len(text)} bytes has no room in {length}\n"
            "fix: take manifest.json from where it came once more"
        )
    return text.ljust(length)


def read_layout(file: Path) -> FileLayout:
    """The header of a safetensors file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with file.open("rb") as data:
            (length,) = struct.unpack("<Q", data.read(8))
            if length > _LARGEST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(data.read(length))
        return FileLayout(length, header)
    except (OSError, ValueError, struct.error) as error:
        raise UserError(
            f"{file} is not a safetensors file: {first_line(error)}\n"
            "fix: take the file from where it came once more"
        ) from error


@dataclass(frozen=True)
class Manifest:
    """The weights' files of a Hugging Face directory.

    Attributes:
        family: that it is of.
        files: each file's layout, by name.
    """

    family: str
    files: Mapping[str, FileLayout]

    @classmethod
    def of(cls, family: str, files: Collection[Path]) -> Manifest:
        """The manifest of files that are there."""
        return cls(family, {file.name: read_layout(file) for file in sorted(files)})

    def save(self, folder: Path) -> None:
        """Write `manifest.json`."""
        files = {name: vars(layout) for name, layout in self.files.items()}
        kept = {"version": _VERSION, "family": self.family, "files": files}
        (folder / MANIFEST).write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read `manifest.json` of a folder that may be a stranger's.

        Raises:
            UserError: it is missing or is none, or names a file outside of the folder.
        """
        path = folder / MANIFEST
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["version"] != _VERSION:
                raise ValueError(f"version {kept['version']} is not {_VERSION}")
            files = {}
            for name, layout in kept["files"].items():
                if Path(name).name != name or not name.endswith(".safetensors"):
                    raise ValueError(f"{name!r} is not the name of a safetensors file")
                if not 0 <= int(layout["header_bytes"]) <= _LARGEST_HEADER:
                    raise ValueError(f"{name}: a header of {layout['header_bytes']} bytes")
                files[name] = FileLayout(int(layout["header_bytes"]), dict(layout["header"]))
            return cls(str(kept["family"]), files)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}: {first_line(error)}\nfix: import the Hugging Face directory again"
            ) from error

    def make(self, folder: Path) -> dict[str, TensorEntry]:
        """Make all files at their full lengths, and say where the tensors lie in them.

        Raises:
            UserError: a header is none, or two files have the same tensor.
        """
        entries: dict[str, TensorEntry] = {}
        for name, layout in self.files.items():
            found = layout.make(folder / name)
            if twice := entries.keys() & found.keys():
                raise UserError(
                    f"{MANIFEST}: tensor {min(twice)} is in {name} and in "
                    f"{entries[min(twice)].file.name}\nfix: import the directory again"
                )
            entries |= found
        return entries


def copy_small_files(source: Path, folder: Path) -> None:
    """Copy a Hugging Face directory's small files: configuration, tokenizer, templates.

    Args:
        source: the directory.
        folder: where to; it exists.

    Raises:
        UserError: a file is a link to somewhere else.
    """
    for file in sorted(source.iterdir()):
        if file.suffix in _SMALL and file.name != MANIFEST and file.is_file():
            copy_file(file, folder)


def copy_file(file: Path, folder: Path) -> None:
    """Copy one file, which may be a link within its directory or into the hub's cache around it.

    Raises:
        UserError: it is a link to somewhere else.
    """
    directory, real = file.parent.resolve(), file.resolve()
    allowed = [directory]
    if directory.parent.name == "snapshots":
        allowed.append(directory.parents[1] / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise UserError(
            f"{file} is a link out of its directory, to {real}\n"
            "fix: put the file itself there, if it belongs there"
        )
    shutil.copyfile(real, folder / file.name)


def save_carried(entries: Mapping[str, TensorEntry], names: Collection[str], folder: Path) -> None:
    """Copy tensors into one file, one after the other.

    Args:
        entries: where the tensors are.
        names: of those to copy; if there are none there is no file.
        folder: gets `carried.safetensors`.
    """
    if not names:
        return
    header: dict[str, Any] = {}
    end = 0
    for name in sorted(names, key=lambda name: (entries[name].file, entries[name].begin)):
        entry = entries[name]
        begin, end = end, end + entry.end - entry.begin
        header[name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [begin, end],
        }
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    places = FileLayout(length + -length % 8, header).make(folder / CARRIED)
    for name, place in places.items():
        write(place, view(entries[name]))


def carried_in(folder: Path) -> dict[str, TensorEntry]:
    """Where the carried tensors lie.

    Args:
        folder: with or without `carried.safetensors`.

    Raises:
        UserError: the file is not a safetensors file.
    """
    file = folder / CARRIED
    return read_layout(file).entries(file) if file.is_file() else {}
