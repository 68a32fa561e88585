"""Write large datasets whose every byte says where it is from, and check tokens against that.

A document is a function of its dataset's letter and its number alone. It consists of blocks of 64
bytes, each of which opens with the letter, the number, and its own place: `#a000000012:000003 `.
Whoever holds some tokens can therefore say which bytes of which document they should be, without
any of the package's code.
"""

from __future__ import annotations

import zlib
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt64

BLOCK = 64
MARK = 256
"""The token between two documents of bytes."""
_WORDS, _WORD_BYTES, _A_BLOCK = 512, 9, 5
_MEAN_BLOCKS = 32
_TAG_BYTES = BLOCK - _WORD_BYTES * _A_BLOCK
_NUMBER, _PLACE = slice(2, 11), slice(12, 18)
_AT_ONCE = 512


class Part(NamedTuple):
    """Say where some tokens are from.

    Attributes:
        letter: the dataset's.
        number: the document's.
        start: first byte within the document.
        end: the byte after the last.
    """

    letter: str
    number: int
    start: int
    end: int


def _hashed(numbers: UInt64[np.ndarray, "*n"]) -> UInt64[np.ndarray, "*n"]:
    """Scatter numbers over 64 bits (MurmurHash3's finaliser)."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        numbers = (numbers ^ (numbers >> np.uint64(33))) * np.uint64(factor)
    return numbers ^ (numbers >> np.uint64(33))


def _vocabulary() -> Int[np.ndarray, "words bytes"]:
    """Make words of equal length in bytes, some of them with two bytes for a character."""
    letters = _hashed(np.arange(_WORDS * 8, dtype=np.uint64)).reshape(_WORDS, 8) % np.uint64(26)
    words = np.full((_WORDS, _WORD_BYTES), ord(" "), np.uint8)
    words[:, :8] = letters + ord("a")
    words[::7, 3:5] = np.frombuffer("\u00e9".encode(), np.uint8)
    words[::11, 7] = ord('"')
    return words


_TABLE = _vocabulary()


def _blocks(letter: str, first: int, count: int) -> Int[np.ndarray, "documents"]:
    numbers = np.arange(first, first + count, dtype=np.uint64) + np.uint64(ord(letter) << 40)
    drawn = (_hashed(numbers) >> np.uint64(11)).astype(np.float64) / 2.0**53
    return (1 - _MEAN_BLOCKS * np.log1p(-drawn)).astype(np.int64)


def documents(letter: str, first: int, count: int) -> list[bytes]:
    """Make documents of about 2 KiB.

    Args:
        letter: the dataset's.
        first: number of the first document.
        count: how many.
    """
    sizes = _blocks(letter, first, count)
    ends = np.cumsum(sizes)
    number = np.repeat(np.arange(first, first + count), sizes)
    place = np.arange(ends[-1]) - np.repeat(ends - sizes, sizes)
    text = np.full((len(number), BLOCK), ord(" "), np.uint8)
    text[:, 0], text[:, 1], text[:, 11] = ord("#"), ord(letter), ord(":")
    for values, cut in ((number, _NUMBER), (place, _PLACE)):
        for at in range(cut.start, cut.stop):
            text[:, at] = values // 10 ** (cut.stop - 1 - at) % 10 + ord("0")
    seeds = (number.astype(np.uint64) << np.uint64(24)) + place.astype(np.uint64)
    drawn = _hashed(seeds * np.uint64(_A_BLOCK) + np.uint64(ord(letter)))
    shifts = np.arange(_A_BLOCK, dtype=np.uint64) * np.uint64(12)
    words = _TABLE[(drawn[:, None] >> shifts) % np.uint64(_WORDS)]
    text[:, _TAG_BYTES:] = words.reshape(len(number), -1)
    text[:, -1] = ord("\n")
    content = text.tobytes()
    starts = (ends - sizes) * BLOCK
    return [
        content[start:end]
        for start, end in zip(starts.tolist(), (ends * BLOCK).tolist(), strict=True)
    ]


def _lines(letter: str, first: int) -> bytes:
    texts = [
        text.replace(b'"', rb"\"").replace(b"\n", rb"\n")
        for text in documents(letter, first, _AT_ONCE)
    ]
    return b"".join(
        b'{"id": %d, "text": "%b"}\n' % (number, text) for number, text in enumerate(texts, first)
    )


def write_json_lines(path: Path, letter: str, size: int) -> int:
    """Write a .jsonl.gz of at least some bytes; return how many documents it holds."""
    count = written = 0
    with path.open("wb") as file:
        # Huffman codes alone: the size on the disk matters here, and not what it costs to search.
        packer = zlib.compressobj(1, wbits=31, strategy=zlib.Z_HUFFMAN_ONLY)
        while written < size:
            written += file.write(packer.compress(_lines(letter, count)))
            count += _AT_ONCE
        file.write(packer.flush())
    return count


def write_parquet(folder: Path, letter: str, files: int, rows: int) -> int:
    """Write a folder of Parquet files; return how many documents it holds."""
    import pyarrow as pa
    import pyarrow.parquet

    folder.mkdir()
    for number in range(files):
        texts = [each.decode() for each in documents(letter, number * rows, rows)]
        table = pa.table({"text": texts, "id": np.arange(rows)})
        pa.parquet.write_table(table, folder / f"part-{number:05d}.parquet")
    return files * rows


def find_parts(tokens: Int[np.ndarray, "n"]) -> list[Part]:
    """Say where each part of a sequence is from, by its tags; between parts stands `MARK`.

    A part without a whole tag, and without the start of a document, is left out.

    Raises:
        ValueError: the tokens are not those of the document that they name.
    """
    marks = np.flatnonzero(tokens == MARK)
    starts, ends = np.append(0, marks + 1), np.append(marks, len(tokens))
    found = []
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        content = tokens[start:end].astype(np.uint8).tobytes()
        at = content.find(b"#")
        if at < 0 or len(content) < at + _TAG_BYTES:
            continue
        tag = content[at : at + _TAG_BYTES]
        letter, number = chr(tag[1]), int(tag[_NUMBER])
        first = int(tag[_PLACE]) * BLOCK - at
        text = documents(letter, number, 1)[0]
        after_mark, before_mark = start > 0, end < len(tokens)
        if (
            content != text[first : first + len(content)]
            or first < 0
            or (after_mark and first != 0)
            or (before_mark and first + len(content) != len(text))
        ):
            raise ValueError(f"{content[:80]!r} is not what document {letter}{number} holds")
        found.append(Part(letter, number, first, first + len(content)))
    return found


def overlaps(parts: list[Part]) -> int:
    """Count the parts that share bytes with another one."""
    return sum(a[:2] == b[:2] and b.start < a.end for a, b in pairwise(sorted(parts)))
