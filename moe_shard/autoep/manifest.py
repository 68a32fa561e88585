"""Keep enough of a Hugging Face directory to write it again byte for byte, without its weights.

The folder `hf/` of an imported model, or of a run that began with one, holds the small files of the
directory (configuration, tokenizer, chat templates), the tensors that fill no parameter, and
`manifest.json`: the header of each of its safetensors files. A folder is untrusted:
what its manifest lists is checked before a file is made.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_shard.autoep.dequantize import read
from moe_shard.autoep.headers import TensorHeader, read_file
from moe_shard.autoep.tensors import write
from moe_shard.errors import UserError, first_line
from moe_shard.files import read_small

MANIFEST = "manifest.json"
CARRIED = "carried.safetensors"
FAMILY = "family.yml"
_AGAIN = "fix: import the Hugging Face directory again"
_VERSION = 1
_LARGEST = 100_000_000  # bytes
_SMALL = frozenset({".json", ".jinja", ".txt", ".model", ".tiktoken"})
"""Endings of the files that are kept; code is not, nor weights in other formats."""
_LENGTH_BYTES = 8


def header_text(file: Path) -> str:
    """Return the header of a safetensors file, unchanged, once it has been checked."""
    with file.open("rb") as data:
        return data.read(int.from_bytes(data.read(_LENGTH_BYTES), "little")).decode()


def new_header(tensors: Mapping[str, TensorHeader], metadata: Mapping[str, str] = {}) -> str:
    """Return the header of a file with these tensors, one after the other.

    Args:
        tensors: tensors whose dtypes and shapes are used.
        metadata: notes of the file's writer.
    """
    entries: dict[str, Any] = {"__metadata__": {**metadata}} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        entries[name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":"))
    return text + " " * (-len(text) % 8)


def make_file(file: Path, header: str) -> None:
    """Make a safetensors file at its full length, with zeros for the tensors.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, IndexError: the header is malformed. The
            reader of headers finds whatever else is wrong with it.
    """
    tensors = json.loads(header)
    tensors.pop("__metadata__", None)
    size = max((int(tensor["data_offsets"][1]) for tensor in tensors.values()), default=0)
    text = header.encode()
    with file.open("xb") as out:
        out.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        out.truncate(_LENGTH_BYTES + len(text) + size)


@dataclass(frozen=True)
class Manifest:
    """Describe the weight files of a Hugging Face directory.

    Attributes:
        family: the family's name.
        files: name of each file -> its header, including the spaces that pad it.
    """

    family: str
    files: Mapping[str, str]

    @classmethod
    def of(cls, family: str, files: Collection[Path]) -> Manifest:
        """Make the manifest of existing files."""
        return cls(family, {file.name: header_text(file) for file in sorted(files)})

    def save(self, folder: Path) -> None:
        """Write `manifest.json`."""
        kept = {"version": _VERSION, "family": self.family, "files": {**self.files}}
        (folder / MANIFEST).write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read `manifest.json` of an untrusted folder.

        Raises:
            UserError: it is missing or malformed, or names a file outside of the folder.
        """
        path = folder / MANIFEST
        try:
            kept = json.loads(read_small(path, _LARGEST))
            if kept["version"] != _VERSION:
                raise ValueError(f"version {kept['version']} is not {_VERSION}")
            for name in kept["files"]:
                if Path(name).name != name or not name.endswith(".safetensors"):
                    raise ValueError(f"{name!r} is not the name of a safetensors file")
            return cls(str(kept["family"]), kept["files"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: {first_line(error)}\n{_AGAIN}") from error

    def make(self, folder: Path) -> None:
        """Make all files at their full lengths; a reader of their headers checks the rest.

        Raises:
            UserError: a header is malformed.
        """
        try:
            for name, header in self.files.items():
                make_file(folder / name, header)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise UserError(f"{MANIFEST}: {first_line(error)}\n{_AGAIN}") from error


def copy_small_files(source: Path, folder: Path) -> None:
    """Copy a Hugging Face directory's small files: configuration, tokenizer, templates.

    Args:
        source: the directory.
        folder: an existing folder to copy them to.

    Raises:
        UserError: a file is a link that leads elsewhere.
    """
    for file in sorted(source.iterdir()):
        if file.suffix in _SMALL and file.name != MANIFEST and file.is_file():
            copy_file(file, folder)


def copy_file(file: Path, folder: Path) -> None:
    """Copy one file, which may be a link to shared storage or into the hub's cache.

    An exported directory is often published. What a link leads to therefore has to be a file of
    that name, or one of the hub's cache, where files are called by their hashes.

    Raises:
        UserError: it is a link to something else.
    """
    real, within = file.resolve(), file.parent.resolve()
    of_hub = real.parent.name == "blobs" and real.parents[1].name.startswith("models--")
    if not (of_hub or real.name == file.name or real.is_relative_to(within)):
        raise UserError(
            f"{file} is a link out of its directory, to {real}\n"
            "fix: put the file itself there, if it belongs there"
        )
    shutil.copyfile(real, folder / file.name)


def save_carried(headers: Mapping[str, TensorHeader], names: Collection[str], folder: Path) -> None:
    """Copy tensors into one file, one after the other.

    Args:
        headers: where the tensors are.
        names: names of those to copy; without any, no file is written.
        folder: the folder that gets `carried.safetensors`.
    """
    if not names:
        return
    order = sorted(names, key=lambda name: (headers[name].file, headers[name].begin))
    file = folder / CARRIED
    make_file(file, new_header({name: headers[name] for name in order}))
    for name, place in read_file(file).items():
        write(place, read(headers[name]))


def carried_in(folder: Path) -> dict[str, TensorHeader]:
    """Return the headers of the carried tensors.

    Args:
        folder: a folder with or without `carried.safetensors`.

    Raises:
        UserError: the file is not a safetensors file.
    """
    file = folder / CARRIED
    return read_file(file) if file.is_file() else {}
