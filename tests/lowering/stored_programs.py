"""Read the text of every program that is stored with the tests."""

from __future__ import annotations

import gzip
from pathlib import Path

HERE = Path(__file__).parent


def program_files() -> list[Path]:
    """Those of this package's own tests and those of other hands."""
    return sorted([*HERE.glob("fixtures/*.txt"), *HERE.glob("programs/**/*.txt*")])


def compiled_files() -> list[Path]:
    """Those of them that a compiler has worked on."""
    return [path for path in program_files() if "before" not in path.name]


def program_name(path: Path) -> str:
    """The name of a program in a test's id."""
    return path.name.partition(".txt")[0]


def program_text(path: Path) -> str:
    """Its text, unpacked."""
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
