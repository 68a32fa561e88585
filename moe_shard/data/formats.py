"""Tell what a file is by its name and first bytes, and open what is compressed."""

from __future__ import annotations

import bz2
import codecs
import gzip
import importlib
import io
import lzma
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from moe_shard.errors import UserError

PROBE_BYTES = 4096
FileKind = Literal["text", "jsonl", "json", "csv", "parquet", "arrow", "arrayrecord"]
Compression = Literal["", "gz", "zst", "bz2", "xz"]

_MAGIC: tuple[tuple[bytes, Compression], ...] = (
    (b"\x1f\x8b", "gz"),
    (b"\x28\xb5\x2f\xfd", "zst"),
    (b"BZh", "bz2"),
    (b"\xfd7zXZ\0", "xz"),
)
_COMPRESSED: dict[str, Compression] = {
    **{".gz": "gz", ".gzip": "gz", ".zst": "zst", ".zstd": "zst"},
    **{".bz2": "bz2", ".xz": "xz"},
}
_KINDS: dict[str, FileKind] = {
    **{".jsonl": "jsonl", ".ndjson": "jsonl", ".jsonlines": "jsonl", ".json": "json"},
    **{".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".parq": "parquet", ".pq": "parquet"},
    **{".arrow": "arrow", ".feather": "arrow"},
    **{".array_record": "arrayrecord", ".arrayrecord": "arrayrecord"},
}
_ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.zst", ".tar.bz2", ".tar.xz", ".7z", ".rar")
_OTHERS = {
    ".tfrecord": "TFRecord, which is not read here",
    ".arecord": "ArrayRecord by another name: .array_record",
    ".npy": "an array of numbers",
    ".npz": "arrays of numbers",
    ".safetensors": "weights",
}
BOMS = (  # the longer of two that begin alike comes first
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
DECODING = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, OSError, ValueError)
"""What reading a damaged file raises, besides `UserError`."""


@dataclass(frozen=True)
class FileFormat:
    """Describe what is in a file.

    Attributes:
        kind: how its documents are written; a "text" file is one document.
        compression: how the file is compressed; empty: not.
        encoding: codec of its byte-order mark ("utf-8", "utf-16", "utf-32"); empty: none.
        valid: whether its first bytes are UTF-8.
    """

    kind: FileKind
    compression: Compression = ""
    encoding: str = ""
    valid: bool = True

    @property
    def plain(self) -> bool:
        """Whether its bytes are its one document, but for a byte-order mark of UTF-8."""
        return (self.kind, self.compression) == ("text", "") and self.encoding in ("", "utf-8")

    def __str__(self) -> str:
        return f"{self.kind}.{self.compression}" if self.compression else self.kind


def find_format(path: Path, head: bytes) -> FileFormat | str:
    """Return what a file is, or in words why no text can be read from it.

    Args:
        path: its path, for the name.
        head: its first `PROBE_BYTES`.
    """
    name = path.name.lower()
    if any(name.endswith(ending) for ending in _ARCHIVES):
        return "is an archive (unpack it)"
    stem = name
    compression: Compression = next((kind for magic, kind in _MAGIC if head.startswith(magic)), "")
    for ending in _COMPRESSED:
        if name.endswith(ending):
            stem = name.removesuffix(ending)
    ending = "".join(Path(stem).suffixes[-1:])
    if head.startswith(b"PAR1"):
        return FileFormat("parquet")
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")) and ending in (".arrow", ".feather"):
        return FileFormat("arrow")
    if "array_record" in name or "arrayrecord" in name:  # ....array_record-00000-of-00010
        return FileFormat("arrayrecord")
    if ".tfrecord" in name:
        return f"is {_OTHERS['.tfrecord']}"
    if ending in _OTHERS:
        return f"is {_OTHERS[ending]}"
    named = _KINDS.get(ending)
    if named in ("parquet", "arrow"):
        return f"is no {named} file, whatever its name says"
    damaged = False
    if compression:
        try:
            with open_bytes(path, compression) as file:
                head = file.read(PROBE_BYTES)
        except UserError:
            raise
        except DECODING:
            head, damaged = b"", True  # whoever reads all of it will say so
        if not head and not damaged:
            return "is empty"
    encoding = next((codec for mark, codec in BOMS if head.startswith(mark)), "")
    valid = True
    if encoding in ("", "utf-8"):
        if b"\0" in head:
            return f"is binary: a zero byte in its first {PROBE_BYTES}"
        try:
            whole = len(head) < PROBE_BYTES
            codecs.getincrementaldecoder("utf-8")().decode(head, final=whole)
        except UnicodeDecodeError:
            valid = False
    # What has no ending of its own is looked at: shards such as part-00000.gz.
    kind = named or ("jsonl" if not ending and _is_record(head) else "text")
    return FileFormat(kind, compression, encoding, valid)


def _is_record(head: bytes) -> bool:
    """Return whether text begins as a line of JSON Lines does."""
    line = head.lstrip(codecs.BOM_UTF8).split(b"\n", 1)[0].strip()
    return line.startswith(b'{"') and (line.endswith(b"}") or len(head) >= PROBE_BYTES)


def open_bytes(path: Path, compression: Compression) -> IO[bytes]:
    """Open a file to read its decompressed bytes, in order.

    Args:
        path: the file.
        compression: how it is compressed.

    Raises:
        UserError: the library that decompresses it is not installed.
        OSError: it cannot be opened.
    """
    if compression == "gz":
        return io.BufferedReader(gzip.open(path, "rb"), 1 << 20)
    if compression == "bz2":
        return bz2.open(path, "rb")
    if compression == "xz":
        return lzma.open(path, "rb")
    if compression == "zst":
        library = needed("zstandard", str(path))
        return io.BufferedReader(_ZstdReader(path.open("rb"), library), 1 << 20)
    return path.open("rb")


class _ZstdReader(io.RawIOBase):
    """Decompress frame after frame; the library's own reader ends a cut file in silence."""

    def __init__(self, file: IO[bytes], library: Any) -> None:
        self._file, self._error = file, library.ZstdError
        self._begin = library.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            if self._frame is not None and self._frame.eof:
                compressed = self._frame.unused_data
                self._frame = None
            else:
                compressed = b""
            compressed = compressed or self._file.read(1 << 14)
            if not compressed:
                if self._frame is not None:
                    raise EOFError("the file ends within compressed data")
                return 0
            self._frame = self._frame or self._begin()
            try:
                self._left = self._frame.decompress(compressed)
            except self._error as error:
                raise OSError(str(error)) from error
        part, self._left = self._left[: len(buffer)], self._left[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)

    def close(self) -> None:
        self._file.close()
        super().close()


def needed(module: str, what: str) -> Any:
    """Import a library of the extra `data`.

    Args:
        module: its module.
        what: file or key that it is needed for.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{what} is read by {module.partition('.')[0]}, which is not installed\n"
            "fix: pip install 'moe_shard[data]'"
        ) from error
