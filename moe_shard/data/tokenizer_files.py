"""Read the files of a tokenizer and those beside it that say what its special tokens are."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe_shard.config.keys import shown
from moe_shard.errors import UserError, first_line

_LARGEST_FILE = 2**29
ANOTHER = "fix: another tokenizer_path; tokenizer_path=bytes reads bytes"
_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "sep_token",
    "cls_token",
    "mask_token",
)
_LISTS = ("additional_special_tokens", "extra_special_tokens")


@contextmanager
def refused_by_library(what: str) -> Iterator[None]:
    """Turn whatever the library raises within the block into a `UserError`."""
    try:
        yield
    except BaseException as error:  # Rust's panics are no Exceptions
        if isinstance(error, KeyboardInterrupt):
            raise
        raise UserError(f"{what}: {shown(first_line(error))}\n{ANOTHER}") from error


def read_tokenizer(file: Path) -> bytes:
    """Read a file of a tokenizer.

    Raises:
        UserError: it is missing, no regular file, or larger than any tokenizer.
    """
    try:
        if file.stat().st_size > _LARGEST_FILE:
            raise UserError(f"{file} is larger than any tokenizer: over 512 MiB\n{ANOTHER}")
        if not file.is_file():  # opening a pipe would wait for its writer
            raise UserError(f"{file} is not a regular file\n{ANOTHER}")
        return file.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(
            f"tokenizer_path: {file}: {reason}\n"
            "fix: a Hugging Face model directory or a tokenizer.json; tokenizer_path=bytes reads "
            "bytes"
        ) from error


def end_tokens(
    file: Path, id_of: Callable[[str], int | None], known: Callable[[int], bool]
) -> tuple[int, ...]:
    """Read the end-of-document ids from the first file beside `file` that names them.

    Args:
        file: the tokenizer's own file.
        id_of: returns the id of a token, or None.
        known: returns whether an id is the tokenizer's.

    Raises:
        UserError: no file names them, or one names what is not there.
    """
    beside = ("generation_config.json", "config.json", "tokenizer_config.json")
    for name in beside:
        settings = settings_beside(file.with_name(name))
        ids = settings.get("eos_token_id")
        if ids is None and (token := settings.get("eos_token")) is not None:
            token = token.get("content") if isinstance(token, dict) else token
            ids = id_of(token) if isinstance(token, str) else token
            if ids is None:
                raise UserError(
                    f"{file.with_name(name)}: eos_token {shown(token)} is not in {file.name}\n"
                    "fix: the two files of one model"
                )
        if ids is None or ids == []:
            continue
        ids = ids if isinstance(ids, list) else [ids]
        for token in ids:
            # The library refuses numbers that do not fit 32 bits with an overflow.
            if type(token) is not int or not 0 <= token < 2**32 or not known(token):
                raise UserError(
                    f"{file.with_name(name)}: eos_token_id {shown(token)} is no token of "
                    f"{file.name}\nfix: the two files of one model"
                )
        return tuple(ids)
    raise UserError(
        f"{file.parent} does not say which token ends a document: no eos_token_id in "
        f"{', '.join(beside)}\n"
        'fix: a generation_config.json with {"eos_token_id": N} beside tokenizer.json'
    )


def settings_beside(file: Path) -> dict[str, Any]:
    """Read a JSON object; a missing file is an empty one.

    Raises:
        UserError: it is something else.
    """
    if not file.exists():
        return {}
    try:
        content = json.loads(read_tokenizer(file))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} is not JSON: {shown(first_line(error))}\n{ANOTHER}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a JSON object\n{ANOTHER}")
    return content


def special_tokens(file: Path, id_of: Callable[[str], int | None]) -> dict[str, int]:
    """Return the special tokens that the files beside a tokenizer name, with their ids.

    Args:
        file: the tokenizer's own file.
        id_of: returns the id of a token, or None; names that have none are left out.

    Raises:
        UserError: a file is not JSON.
    """
    found: dict[str, int] = {}
    settings = settings_beside(file.with_name("tokenizer_config.json"))
    added = settings_beside(file.with_name("added_tokens.json"))
    found |= {name: number for name, number in added.items() if type(number) is int}
    decoder = settings.get("added_tokens_decoder")
    for number, token in (decoder if isinstance(decoder, dict) else {}).items():
        if isinstance(token, dict) and isinstance(token.get("content"), str) and number.isdecimal():
            found[token["content"]] = int(number)
    named: list[Any] = [settings.get(name) for name in _NAMES]
    for key in _LISTS:
        listed = settings.get(key)
        named += listed if isinstance(listed, list) else []
    for token in named:
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str) and content and content not in found:
            number = id_of(content)
            if number is not None:
                found[content] = number
    return found


def marks_in_words(
    before: Sequence[int], after: Sequence[int], name_of: Callable[[int], str | None]
) -> str:
    """Write a document with its marks, such as `<s> TEXT </s>`.

    Args:
        before: tokens before a text.
        after: tokens after it.
        name_of: returns a token as text, or None.
    """
    names = [[name_of(token) or f"[{token}]" for token in tokens] for tokens in (before, after)]
    return " ".join([*names[0], "TEXT", *names[1]])
