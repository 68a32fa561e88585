"""What every table of docs/results.md has: cells, and where its numbers are from."""

from __future__ import annotations

import datetime
import shlex
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from moe_shard.errors import UserError
from moe_shard.files import write_text

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


def replace_section(file: Path, name: str, text: str) -> None:
    """Put a text between the marks `<!-- NAME -->` and `<!-- /NAME -->` of a file.

    Raises:
        UserError: the file cannot be read, or does not have both marks, once.
    """
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    try:
        page = file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    if page.count(start) != 1 or page.count(end) != 1 or page.index(start) > page.index(end):
        raise UserError(f"{file} has no section {name}\nfix: two lines, {start.strip()} and {end}")
    before, _, rest = page.partition(start)
    write_text(file, f"{before}{start}{text.strip()}\n{end}{rest.partition(end)[2]}")
