"""Write the page of `--html FILE`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moe_shard.errors import UserError
from moe_shard.files import write_text
from moe_shard.lowering.page import Panel, render_page


def page_path(given: str) -> Path:
    """Check the file of `--html FILE`, before minutes of compiling.

    Raises:
        UserError: there is no such folder, or the file is a folder.
    """
    path = Path(given)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UserError(f"--html {path} cannot be written\nfix: a file in a folder that is there")
    return path


def write_page(path: Path, title: str, panels: Sequence[Panel]) -> None:
    """Write the page, whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        write_text(path, render_page(title, panels))
    except OSError as error:
        raise UserError(
            f"--html {path}: {error.strerror}\nfix: a file in a folder that is there"
        ) from error
