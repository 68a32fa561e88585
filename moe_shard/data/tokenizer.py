"""From text to tokens and back: bytes, or the tokenizer of a Hugging Face model directory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers
from jaxtyping import Int32

from moe_shard.config.keys import shown
from moe_shard.errors import UserError, first_line

DOCUMENT = 256
"""The byte tokenizer's mark: it begins a document and so, as a target, ends the one before."""

_LARGEST_FILE = 2**29
_ANOTHER = 'fix: another tokenizer_path; tokenizer_path="" reads bytes'


class Tokenizer(Protocol):
    """What training and generation ask of a tokenizer.

    Attributes:
        name: for messages.
        before: tokens that a document begins with, before its text.
        after: tokens that end it; empty where those of `before` of the next one do.
        ends: tokens at which generation stops.
        vocab_size: one more than the largest id.
        digest: equal only where all texts have the same tokens.
    """

    name: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    ends: frozenset[int]
    vocab_size: int
    digest: bytes

    def encode_texts(self, texts: Sequence[bytes]) -> list[Int32[np.ndarray, "T"]]:
        """Tokens of texts that are read for training; nothing in them counts as a mark."""

    def encode_prompt(self, prompt: str) -> list[int]:
        """Tokens of the beginning of a document, with the marks that belong there; never empty."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, without marks; what is no whole character yet is U+FFFD."""


class ByteTokenizer:
    """A token a byte, and `DOCUMENT`."""

    name = "bytes (256 of them and the document mark)"
    before: tuple[int, ...] = (DOCUMENT,)
    after: tuple[int, ...] = ()
    ends = frozenset({DOCUMENT})
    vocab_size = DOCUMENT + 1
    digest = b"bytes"

    def encode_texts(self, texts: Sequence[bytes]) -> list[Int32[np.ndarray, "T"]]:
        """The bytes."""
        return [np.frombuffer(text, np.uint8).astype(np.int32) for text in texts]

    def encode_prompt(self, prompt: str) -> list[int]:
        """The document mark and the bytes in UTF-8."""
        # Arguments that are not UTF-8 come from the system with their bytes escaped.
        return [DOCUMENT, *prompt.encode("utf-8", "surrogateescape")]

    def decode(self, ids: Sequence[int]) -> str:
        """The bytes read as UTF-8."""
        return bytes(token for token in ids if token < DOCUMENT).decode("utf-8", "replace")


class FileTokenizer:
    """A `tokenizer.json`, with the end of a document from the files beside it.

    A document is what the tokenizer itself puts before a text (Llama's `<s>`), the text, and the
    end. A tokenizer that puts nothing there has the end stand before each document instead, as
    GPT-2's was trained: so every document begins with a mark and every end is a target.

    Args:
        path: a Hugging Face model directory, or a tokenizer.json in one.

    Raises:
        UserError: there is none, it cannot be read, or no file says which token ends a document.
    """

    def __init__(self, path: Path) -> None:
        file = path / "tokenizer.json" if path.is_dir() else path
        content = _read(file)
        self.name = f"tokenizer_path={path}"
        with _refused(f"{file} is no tokenizer"):
            self._rust = tokenizers.Tokenizer.from_buffer(content)
            # Files keep the lengths their first training cut and padded to.
            self._rust.no_truncation()
            self._rust.no_padding()
            beginning = self._rust.encode("a")
            ids = self._rust.get_vocab().values()
        self.vocab_size = max(ids, default=0) + 1
        ends = _ends(file, self._rust)
        self.ends = frozenset(ends)
        marks = zip(beginning.ids, beginning.special_tokens_mask, strict=True)
        begins = tuple(token for token, _ in takewhile(lambda each: each[1], marks))
        self.before = begins or ends[:1]
        self.after = ends[:1] if begins else ()
        marked = repr((self.before, self.after)).encode()
        self.digest = hashlib.blake2b(content + marked, digest_size=16).digest()

    def encode_texts(self, texts: Sequence[bytes]) -> list[Int32[np.ndarray, "T"]]:
        """Tokens of texts in UTF-8, on all cores; bytes that are not UTF-8 are U+FFFD."""
        self._rust.encode_special_tokens = True  # "</s>" in a text is four characters
        read = [text.decode("utf-8", "replace") for text in texts]
        with _refused(f"{self.name} fails on the text"):
            encoded = self._rust.encode_batch_fast(read, add_special_tokens=False)
        return [np.array(each.ids, np.int32) for each in encoded]

    def encode_prompt(self, prompt: str) -> list[int]:
        """As the model's own tokenizer reads it; marks that are written out are marks."""
        self._rust.encode_special_tokens = False
        with _refused(f"{self.name} fails on the prompt"):
            encoded = self._rust.encode(prompt.encode("utf-8", "replace").decode())
        return encoded.ids or [*self.before]

    def decode(self, ids: Sequence[int]) -> str:
        """The text; ids beyond the vocabulary have none."""
        return self._rust.decode(list(ids), skip_special_tokens=True)


def find_tokenizer(tokenizer_path: str) -> Tokenizer:
    """The tokenizer that the key `tokenizer_path` names; bytes where it is empty.

    Raises:
        UserError: see `FileTokenizer`.
    """
    return FileTokenizer(Path(tokenizer_path).expanduser()) if tokenizer_path else ByteTokenizer()


def require_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuse a model that lacks tokens; one that has more is fine.

    Args:
        tokenizer: of the text.
        vocab_size: V of the model.

    Raises:
        UserError: the tokenizer has larger ids.
    """
    if vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"vocab_size={vocab_size} is less than the {tokenizer.vocab_size} tokens of "
            f"{tokenizer.name}\nfix: vocab_size={tokenizer.vocab_size} or more"
        )


@contextmanager
def _refused(what: str) -> Iterator[None]:
    """Within the block, whatever the library raises is an error of its file."""
    try:
        yield
    except BaseException as error:  # Rust's panics are no Exceptions
        if isinstance(error, KeyboardInterrupt):
            raise
        raise UserError(f"{what}: {shown(first_line(error))}\n{_ANOTHER}") from error


def _read(file: Path) -> bytes:
    try:
        if file.stat().st_size > _LARGEST_FILE:
            raise UserError(f"{file} is larger than any tokenizer: over 512 MiB\n{_ANOTHER}")
        if not file.is_file():  # opening a pipe would wait for its writer
            raise UserError(f"{file} is not a regular file\n{_ANOTHER}")
        return file.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(
            f"tokenizer_path: {file}: {reason}\n"
            'fix: a Hugging Face model directory or a tokenizer.json; tokenizer_path="" reads bytes'
        ) from error


def _ends(file: Path, rust: tokenizers.Tokenizer) -> tuple[int, ...]:
    """The ids at which a text ends, by the first file beside it that says so."""
    beside = ("generation_config.json", "config.json", "tokenizer_config.json")
    for name in beside:
        said = _read_settings(file.with_name(name))
        ids = said.get("eos_token_id")
        if ids is None and (token := said.get("eos_token")) is not None:
            token = token.get("content") if isinstance(token, dict) else token
            ids = rust.token_to_id(token) if isinstance(token, str) else token
            if ids is None:
                raise UserError(
                    f"{file.with_name(name)}: eos_token {shown(token)} is not in {file.name}\n"
                    "fix: the two files of one model"
                )
        if ids is None or ids == []:
            continue
        ids = ids if isinstance(ids, list) else [ids]
        for token in ids:
            # A larger number does not even fit the library's integers.
            if type(token) is not int or not 0 <= token < 2**32 or rust.id_to_token(token) is None:
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


def _read_settings(file: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is no such file."""
    if not file.exists():
        return {}
    try:
        content = json.loads(_read(file))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} is not JSON: {shown(first_line(error))}\n{_ANOTHER}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a JSON object\n{_ANOTHER}")
    return content
