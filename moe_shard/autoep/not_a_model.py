"""Name what a path holds where a Hugging Face model is wanted, and the command to run next."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

from moe_shard.config.keys import shown
from moe_shard.errors import UserError
from moe_shard.files import read_small

_HUB = re.compile(r"(?:hf:/{1,2}|https?:/{1,2}(?:www\.)?huggingface\.co/)?([\w.-]+/[\w.-]+)/?")
_PLAIN_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES = (".yml", ".yaml", ".json", ".safetensors", ".gguf")

_OF_FILES: tuple[tuple[Callable[[bytes], bool], str, str], ...] = (
    (
        lambda head: head.startswith(b"version https://git-lfs.github.com/"),
        "a Git LFS pointer, which names the weights and does not hold them",
        "`git lfs pull` in its directory, or `hf download ID --local-dir DIR`",
    ),
    (
        lambda head: head.lstrip().lower().startswith((b"<!doctype", b"<html")),
        "a web page, as a download without a login gives",
        "download it again with a token: `hf auth login`, `hf download ID --local-dir DIR`",
    ),
    (
        lambda head: head.startswith(b"GGUF"),
        "a GGUF file, of llama.cpp, whose weights are quantized for its kernels",
        "the model's own Hugging Face directory, from which the GGUF was made",
    ),
    (
        lambda head: head.startswith((b"PK\x03\x04", b"\x80\x02")),
        "pickled weights, which run code when they are read",
        "save_pretrained of transformers 5 writes them as safetensors",
    ),
)
"""What the first bytes of a file show, what it is, and the fix."""

_START = 512


def refuse_foreign_file(path: Path, head: bytes) -> None:
    """Refuse a file whose first bytes are those of something else that people have.

    Args:
        path: the file, for messages.
        head: its first bytes, a few hundred.

    Raises:
        UserError: it is one, by name.
    """
    if head[8:9] == b"{":  # safetensors: eight bytes of a length, then JSON
        return
    for fits, what, fix in _OF_FILES:
        if fits(head):
            raise UserError(f"{path}: {what}\nfix: {fix}")


def refuse_foreign(given: str) -> None:
    """Refuse a path, or a text in its place, that is not a model but is recognised.

    Args:
        given: a path without a `config.json`, which may not exist.

    Raises:
        UserError: it is one of: a name on the hub, a LoRA, the original form of a checkpoint, a
            GGUF, or another file that is recognised.
    """
    path = Path(given)
    if os.path.isdir(path):  # also of a name that is too long for the system
        _refuse_directory(path)
    elif os.path.isfile(path):
        if path.suffix == ".safetensors":
            raise UserError(f"{path}: one file of a model\nfix: the directory that it lies in")
        with path.open("rb") as file:
            refuse_foreign_file(path, file.read(_START))
    elif (name := hub_id(given)) is not None:
        raise UserError(
            f"{shown(given)} is not a path here; it may be a name on the Hugging Face hub\n"
            f"fix: hf download {name} --local-dir {name.partition('/')[2]}, then that directory"
        )


def hub_id(given: str) -> str | None:
    """Return the name on the hub that a text has the form of; None if it has not."""
    match = _HUB.fullmatch(given)
    if match is None or not _PLAIN_HUB.fullmatch(match[1]) or match[1].endswith(_FILES):
        return None
    return match[1]


def _refuse_directory(directory: Path) -> None:
    names = sorted(path.name for path in directory.iterdir())
    if "adapter_config.json" in names:
        base = _text_in(directory / "adapter_config.json", "base_model_name_or_path")
        raise UserError(
            f"{directory}: a LoRA adapter of {base or 'a model'}, without that model's weights\n"
            "fix: peft's merge_and_unload() and save_pretrained(DIR), then that directory"
        )
    if "params.json" in names:
        raise UserError(
            f"{directory}: params.json, the form in which a model's makers publish it\n"
            "fix: the Hugging Face directory of the same model, with a config.json"
        )
    for name in names:
        if name.endswith(".gguf"):
            refuse_foreign_file(directory / name, b"GGUF")
    inner = [name for name in names if (directory / name / "config.json").is_file()]
    if names == ["snapshots"] or {"snapshots", "refs"} <= set(names):
        inner = sorted(f"snapshots/{path.name}" for path in (directory / "snapshots").iterdir())
    if inner:
        raise UserError(
            f"{directory}: no config.json here, but in {len(inner)} of its folders\n"
            f"fix: {directory / inner[0]}"
        )


def _text_in(file: Path, key: str) -> str:
    try:
        value = json.loads(read_small(file))[key]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return shown(value) if isinstance(value, str) else ""
