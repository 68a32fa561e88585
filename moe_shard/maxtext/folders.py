"""Find a MaxText checkpoint in a folder."""

from __future__ import annotations

from pathlib import Path

ITEMS = "items"
"""MaxText's name for the state in a checkpoint."""


def find_items(folder: Path) -> Path | None:
    """Find a MaxText checkpoint's arrays; return None if the folder has none.

    Args:
        folder: a run, its `checkpoints/`, one checkpoint in it, or the `items/` of one. The newest
            checkpoint is found if there are several.
    """
    if folder.name == ITEMS and (folder / "_METADATA").is_file():
        return folder
    for inner in (folder, folder / "checkpoints"):
        if (inner / ITEMS).is_dir():
            return inner / ITEMS
        if inner.is_dir():
            names = [each.name for each in inner.iterdir() if each.name.isdecimal()]
            for step in sorted(names, key=int, reverse=True):
                if (inner / step / ITEMS).is_dir():
                    return inner / step / ITEMS
    return None
