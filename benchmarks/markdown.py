"""What every table of docs/results.md has: cells, and where its numbers are from."""

from __future__ import annotations

import datetime
import shlex
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda12-pjrt", "jax-rocm7-pjrt")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table, its first line `head`."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def origin(kind: str, hardware: str, command: Sequence[str]) -> str:
    """Return the paragraph above a table: kind, hardware, versions, date and command.

    Args:
        kind: "measured", or "compiled, not run".
        hardware: what the programs were run on or compiled for.
        command: the arguments that made the table, from `python` on.
    """
    today = datetime.datetime.now(tz=datetime.UTC).date()
    return (
        f"**{kind[0].upper()}{kind[1:]}**; {hardware}; {versions()}; {today}.\n\n"
        f"    {shlex.join(command)}"
    )


def versions() -> str:
    """Return name and version of jax and of the compilers that are installed."""
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)
