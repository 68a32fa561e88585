"""Read and write as much of ELF (64-bit, x86-64) as it takes to replace missing libraries.

`Imports.read` lists the libraries and functions that a shared library needs from others;
`placeholder` writes a shared library that exports functions of given names, all of which fail.
Neither needs a compiler or binutils.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_shard.errors import UserError

_SYMBOL = struct.Struct("<IBBHQQ")
_X86_64 = 62
_DYNSYM, _DYNAMIC, _VERSYM, _VERNEED = 11, 6, 0x6FFFFFFF, 0x6FFFFFFE
_FUNCTION, _GLOBAL = 2, 1
_PAGE = 4096

# Returns 100, which is hipErrorNoDevice and an error to every library of the family.
_FAIL = bytes.fromhex("b864000000c3")  # mov eax, 100; ret
# Returns a text: some functions name an error, and their callers print what they get.
_NAME_ERROR = bytes.fromhex("488d0501000000c3")  # lea rax, [rip + 1]; ret
_TEXT = b"placeholder library: it compiles, it does not run\0"
_NAMES_AN_ERROR = re.compile(r"(error|status)_?(string|name)|LastError", re.IGNORECASE)


@dataclass(frozen=True)
class Function:
    """Describe a function that a library imports.

    Attributes:
        name: its mangled name.
        version: its symbol version; may be empty.
        library: the library with that version; empty where any may define it.
    """

    name: str
    version: str = ""
    library: str = ""


@dataclass(frozen=True)
class Imports:
    """Hold what a shared library needs from others: libraries by name, and functions."""

    libraries: tuple[str, ...]
    functions: tuple[Function, ...]

    @classmethod
    def read(cls, path: Path) -> Imports:
        """Read the dynamic symbol table of a library.

        Raises:
            UserError: the file is not an x86-64 library, or is damaged.
        """
        try:
            with (
                path.open("rb") as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
            ):
                return _read(data)
        except (OSError, ValueError, KeyError, struct.error) as error:
            raise UserError(f"{path} is no shared library for x86-64: {error}") from error


def _read(data: mmap.mmap) -> Imports:
    if data[:6] != b"\x7fELF\x02\x01" or struct.unpack_from("<H", data, 18)[0] != _X86_64:
        raise ValueError("no 64-bit x86 ELF header")
    (table,) = struct.unpack_from("<Q", data, 40)
    entry_size, count = struct.unpack_from("<HH", data, 58)
    sections = [struct.unpack_from("<IIQQQQII", data, table + i * entry_size) for i in range(count)]
    by_type = {section[1]: section for section in sections}
    symbols, dynamic = by_type[_DYNSYM], by_type[_DYNAMIC]
    strings = sections[symbols[6]][4]

    def text(offset: int) -> str:
        start = strings + offset
        return data[start : data.find(b"\0", start)].decode()

    entries = struct.iter_unpack("<QQ", data[dynamic[4] : dynamic[4] + dynamic[5]])
    libraries = tuple(text(value) for tag, value in entries if tag == 1)  # DT_NEEDED
    versions = _versions(data, by_type[_VERNEED], text) if _VERNEED in by_type else {}
    functions = []
    for index in range(symbols[5] // _SYMBOL.size):
        name, info, _, section, _, _ = _SYMBOL.unpack_from(data, symbols[4] + index * _SYMBOL.size)
        # Some linkers leave out the type; an untyped weak one may stay undefined.
        kind, binding = info & 15, info >> 4
        if section == 0 and (kind == _FUNCTION or (kind == 0 and binding == _GLOBAL)):
            which = 0
            if _VERSYM in by_type:
                which = struct.unpack_from("<H", data, by_type[_VERSYM][4] + 2 * index)[0] & 0x7FFF
            functions.append(Function(text(name), *versions.get(which, ("", ""))))
    return Imports(libraries, tuple(functions))


def _versions(
    data: mmap.mmap, section: tuple[int, ...], text: Callable[[int], str]
) -> dict[int, tuple[str, str]]:
    """Return {index of a symbol version: (version, library)}."""
    found = {}
    position = section[4]
    for _ in range(section[7]):
        _, count, file, first, following = struct.unpack_from("<HHIII", data, position)
        at = position + first
        for _ in range(count):
            _, _, index, name, step = struct.unpack_from("<IHHII", data, at)
            found[index] = (text(name), text(file))
            at += step
        position += following
    return found


def placeholder(library: str, functions: Sequence[Function]) -> bytes:
    """Make a shared library whose functions fail when called.

    Args:
        library: the name by which others load it, such as "librccl.so.1".
        functions: the functions that it exports, each with its version.

    Returns:
        The file: one segment to read and execute, one to write (the loader patches the table in
        it), and no sections.
    """
    strings = _Strings()
    versions = ["", library, *sorted({f.version for f in functions} - {""})]  # 0 is unused
    index_of = {version: index for index, version in enumerate(versions)} | {"": 1}
    names = [strings.add(function.name) for function in functions]
    defined = b""
    for index, version in enumerate(versions[1:], start=1):
        last = index == len(versions) - 1
        base = index == 1
        entry = (1, base, index, 1, _elf_hash(version), 20, 0 if last else 28)
        defined += struct.pack("<HHHHIII", *entry) + struct.pack("<II", strings.add(version), 0)
    soname = strings.add(library)

    parts = {  # in this order after the headers
        "hash": _hash_table(["", *(function.name for function in functions)]),
        "symbols": b"\0" * _SYMBOL.size * (1 + len(functions)),
        "strings": bytes(strings.data),
        "versions": struct.pack(
            f"<{1 + len(functions)}H", 0, *(index_of[function.version] for function in functions)
        ),
        "defined": defined,
        "code": _FAIL.ljust(16, b"\x90") + _NAME_ERROR + _TEXT,
    }
    at: dict[str, int] = {}
    body = b"\0" * (64 + 4 * 56)
    for name, part in parts.items():
        body = body.ljust(-(-len(body) // 16) * 16, b"\0")
        at[name] = len(body)
        body += part
    symbols = b"\0" * _SYMBOL.size
    for offset, function in zip(names, functions, strict=True):
        code = at["code"] + (16 if _NAMES_AN_ERROR.search(function.name) else 0)
        symbols += _SYMBOL.pack(offset, _GLOBAL << 4 | _FUNCTION, 0, 1, code, 8)
    body = body[: at["symbols"]] + symbols + body[at["symbols"] + len(symbols) :]

    table = b"".join(
        struct.pack("<QQ", tag, value)
        for tag, value in (
            (14, soname),  # DT_SONAME
            (4, at["hash"]),
            (5, at["strings"]),
            (6, at["symbols"]),
            (10, len(strings.data)),
            (11, _SYMBOL.size),
            (0x6FFFFFF0, at["versions"]),
            (0x6FFFFFFC, at["defined"]),
            (0x6FFFFFFD, len(versions) - 1),
            (0, 0),
        )
    )
    start = -(-len(body) // _PAGE) * _PAGE
    segments = (  # type, flags, offset, size, alignment
        (1, 5, 0, len(body), _PAGE),
        (1, 6, start, len(table), _PAGE),
        (2, 6, start, len(table), 8),  # PT_DYNAMIC
        (0x6474E551, 6, 0, 0, 16),  # PT_GNU_STACK: not executable
    )
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack(
        "<HHIQQQIHHHHHH", 3, _X86_64, 1, 0, 64, 0, 0, 64, 56, len(segments), 64, 0, 0
    )
    for kind, flags, offset, size, alignment in segments:
        header += struct.pack(
            "<IIQQQQQQ", kind, flags, offset, offset, offset, size, size, alignment
        )
    return (header + body[len(header) :]).ljust(start, b"\0") + table


class _Strings:
    """Build a string table."""

    def __init__(self) -> None:
        self.data = bytearray(b"\0")

    def add(self, text: str) -> int:
        """Append a string and return its offset."""
        offset = len(self.data)
        self.data += text.encode() + b"\0"
        return offset


def _hash_table(names: Sequence[str]) -> bytes:
    """Make the System V hash table of the symbols; the first is the null symbol."""
    buckets = [0] * max(len(names) // 2, 1)
    chains = [0] * len(names)
    for index, name in enumerate(names[1:], start=1):
        bucket = _elf_hash(name) % len(buckets)
        chains[index], buckets[bucket] = buckets[bucket], index
    words = [len(buckets), len(chains), *buckets, *chains]
    return struct.pack(f"<{len(words)}I", *words)


def _elf_hash(name: str) -> int:
    """Hash a name as chapter 5 of the System V ABI does."""
    value = 0
    for byte in name.encode():
        value = (value << 4) + byte
        high = value & 0xF0000000
        value = (value ^ high >> 24) & ~high
    return value
