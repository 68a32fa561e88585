"""Turn text into tokens and back: by bytes, or by a tokenizer of a Hugging Face directory."""

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
from moe_shard.files import expanded

DOCUMENT = 256
"""Mark of the byte tokenizer: it begins a document and, as a target, ends the one before."""

_LARGEST_FILE = 2**29
_ANOTHER = 'fix: another tokenizer_path; tokenizer_path="" reads bytes'


class Tokenizer(Protocol):
    """Define what training and generation need of a tokenizer.

    Attributes:
        name: name for messages.
        before: tokens that begin a document, before its text.
        after: tokens that end a document; empty if `before` of the next document does.
        ends: tokens at which generation stops.
        vocab_size: one more than the largest id.
        digest: hash; equal only for tokenizers that give all texts the same tokens.
    """

    name: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    ends: frozenset[int]
    vocab_size: int
    digest: bytes

    def encode_texts(self, texts: Sequence[bytes]) -> list[Int32[np.ndarray, "T"]]:
        """Encode texts for training; nothing in them is read as a mark."""

    def encode_prompt(self, prompt: str) -> list[int]:
        """Encode the beginning of a document, with its marks; the result is never empty."""

    def decode(self, ids: Sequence[int]) -> str:
        """Decode tokens, without marks; an incomplete character becomes U+FFFD."""


class ByteTokenizer:
    """Use one token per byte, and `DOCUMENT`."""

    name = "bytes (256 of them and the document mark)"
    before: tuple[int, ...] = (DOCUMENT,)
    after: tuple[int, ...] = ()
    ends = frozenset({DOCUMENT})
    vocab_size = DOCUMENT + 1
    digest = b"bytes"

    def encode_texts(self, texts: Sequence[bytes]) -> list[Int32[np.ndarray, "T"]]:
        """Return the bytes."""
        return [np.frombuffer(text, np.uint8).astype(np.int32) for text in texts]

    def encode_prompt(self, prompt: str) -> list[int]:
        """Return the document mark and the bytes in UTF-8."""
        # Python escapes the bytes of command-line arguments that are not UTF-8.
        return [DOCUMENT, *prompt.encode("utf-8", "surrogateescape")]

    def decode(self, ids: Sequence[int]) -> str:
        """Decode the bytes as UTF-8."""
        return bytes(token for token in ids if token < DOCUMENT).decode("utf-8", "replace")


class FileTokenizer:
    """Use a `tokenizer.json`; read the end-of-document token from the files next to it.

    A document consists of what the tokenizer puts before a text (Llama's `<s>`), the text, and the
    end token. If the tokenizer puts nothing before a text, the end token goes before each document
    instead, as in GPT-2's training, so that every document begins with a mark and every end is a
    target.

    Args:
        path: a Hugging Face model directory, or a tokenizer.json in one.

    Raises:
        UserError: the file is missing or cannot be read, or no file names the end token.
    """

    def __init__(self, path: Path) -> None:
        file = path / "tokenizer.json" if path.is_dir() else path
        content = _read(file)
        self.name = f"tokenizer_path={path}"
        with _refused(f"{file} is no tokenizer"):
            self._rust = tokenizers.Tokenizer.from_buffer(content)
            # The file may hold truncation and padding lengths of its original training.
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
        """Encode texts in UTF-8, on all cores; bytes that are not UTF-8 become U+FFFD."""
        self._rust.encode_special_tokens = True  # "</s>" in a text is four characters
        read = [text.decode("utf-8", "replace") for text in texts]
        with _refused(f"{self.name} fails on the text"):
            encoded = self._rust.encode_batch_fast(read, add_special_tokens=False)
        return [np.array(each.ids, np.int32) for each in encoded]

    def encode_prompt(self, prompt: str) -> list[int]:
        """Encode as the model's own tokenizer does: marks written out in the prompt are marks."""
        self._rust.encode_special_tokens = False
        with _refused(f"{self.name} fails on the prompt"):
            encoded = self._rust.encode(prompt.encode("utf-8", "replace").decode())
        return encoded.ids or [*self.before]

    def decode(self, ids: Sequence[int]) -> str:
        """Decode the ids; those beyond the vocabulary have no text."""
        return self._rust.decode(list(ids), skip_special_tokens=True)


def find_tokenizer(tokenizer_path: str) -> Tokenizer:
    """Load the tokenizer that the key `tokenizer_path` names, bytes if it is empty.

    Raises:
        UserError: see `FileTokenizer`.
    """
    return FileTokenizer(expanded(tokenizer_path)) if tokenizer_path else ByteTokenizer()


def require_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuse a model whose vocabulary is smaller than the tokenizer's.

    Args:
        tokenizer: tokenizer of the text.
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
    """Turn whatever the library raises within the block into a `UserError`."""
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
    """Read the end-of-document ids from the first file beside `file` that names them."""
    beside = ("generation_config.json", "config.json", "tokenizer_config.json")
    for name in beside:
        settings = _read_settings(file.with_name(name))
        ids = settings.get("eos_token_id")
        if ids is None and (token := settings.get("eos_token")) is not None:
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
            # The library refuses numbers that do not fit 32 bits with an overflow.
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
    """Read a JSON object; a missing file is an empty one."""
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
