"""Tell which files of a dataset's folder are not of its text: its description, other splits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from moe_shard.data.formats import FileFormat

_DESCRIPTION = re.compile(
    r"(readme|licen[cs]e|notice|citation|copying)([._-].*)?"
    r"|(dataset_infos?|dataset_dict|state|dataset_info)\.json|sha256sums?(\.txt)?"
)
_SETTINGS = frozenset({".yml", ".yaml", ".toml", ".ini", ".cfg"})
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Split -> the words of names that stand for it, as Hugging Face's `datasets` has them."""


def left_out(files: Mapping[Path, FileFormat], folder: Path, split: str) -> dict[Path, str]:
    """Return the files of a folder that are not read, with the reason.

    Beside records, or above them, text of the dataset's own description is none of its documents.
    Where the names of some records have the word of the split that is asked for, those of other
    splits are left out; one whose name has no such word is of "train".

    Args:
        files: what was found below the folder.
        folder: the folder that is named.
        split: the split to read.
    """
    records = [path for path, form in files.items() if form.kind not in ("text", "json")]
    direct = {path.parent for path in records}
    above = {parent for path in records for parent in path.parents}
    out: dict[Path, str] = {}
    for path, form in files.items():
        if form.kind not in ("text", "json"):
            continue
        if path.parent in above and _DESCRIPTION.fullmatch(path.name.lower()):
            out[path] = "describes the data beside it"
        elif path.parent in direct and path.suffix.lower() in _SETTINGS:
            out[path] = "holds settings, beside records"
    splits = {path: split_of(path.relative_to(folder)) for path in _of_splits(files)}
    if split in splits.values():
        for path, found in splits.items():
            if (found or "train") != split:
                out[path] = f"is of another split than {split}"
    return out


def _of_splits(files: Mapping[Path, FileFormat]) -> list[Path]:
    return [path for path, form in files.items() if form.kind != "text" or form.compression]


def split_of(path: Path) -> str:
    """Return the split that a path names; empty if it names none or several.

    Args:
        path: a path within the dataset.
    """
    words = set(re.split(r"[^a-z]+", str(path).lower()))
    found = [split for split, names in _SPLITS.items() if words & set(names)]
    return found[0] if len(found) == 1 else ""
