"""Turn text into tokens and back: by bytes, or by the tokenizer that `tokenizer_path` names."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers
from jaxtyping import Int32

from moe_shard.config.keys import shown
from moe_shard.config.schema import DataConfig
from moe_shard.data.placed_tokens import PlacedTokens, by_characters
from moe_shard.data.sentencepiece_tokenizer import SentencePieceTokenizer
from moe_shard.data.tiktoken_tokenizer import TiktokenTokenizer, has_ranks
from moe_shard.data.tokenizer_files import (
    end_tokens,
    marks_in_words,
    read_tokenizer,
    refused_by_library,
)
from moe_shard.errors import UserError
from moe_shard.files import expanded

DOCUMENT = 256
"""Mark of the byte tokenizer: it begins a document and, as a target, ends the one before."""


BYTES = "bytes"
"""Value of `tokenizer_path` that asks for bytes."""
_MOST_BYTE_VOCABULARY = 1024
_FILES = ("tokenizer.json", "tokenizer.model", "tiktoken.model")


class Tokenizer(Protocol):
    """Define what training and generation need of a tokenizer.

    Attributes:
        name: name for messages.
        marks: what a document looks like, in words.
        special: tokens that stand for no text.
        before: tokens that begin a document, before its text.
        after: tokens that end a document; empty if `before` of the next document does.
        ends: tokens at which generation stops.
        vocab_size: one more than the largest id.
        digest: hash; equal only for tokenizers that give all texts the same tokens.
    """

    name: str
    marks: str
    special: frozenset[int]
    before: tuple[int, ...]
    after: tuple[int, ...]
    ends: frozenset[int]
    vocab_size: int
    digest: bytes

    def encode_texts(self, texts: Sequence[bytes]) -> list[Int32[np.ndarray, "T"]]:
        """Encode texts for training, without marks."""

    def encode_placed(self, texts: Sequence[str]) -> list[PlacedTokens]:
        """Encode texts in which special tokens are tokens; say where each token stands."""

    def encode_prompt(self, prompt: str) -> list[int]:
        """Encode the beginning of a document, with its marks; the result is never empty."""

    def decode(self, ids: Sequence[int]) -> str:
        """Decode tokens, without marks; an incomplete character becomes U+FFFD."""


class ByteTokenizer:
    """Use one token per byte, and `DOCUMENT`."""

    name = "bytes (256 of them and the document mark)"
    marks = f"[{DOCUMENT}] TEXT"
    special = frozenset({DOCUMENT})
    before: tuple[int, ...] = (DOCUMENT,)
    after: tuple[int, ...] = ()
    ends = frozenset({DOCUMENT})
    vocab_size = DOCUMENT + 1
    digest = b"bytes"

    def encode_texts(self, texts: Sequence[bytes]) -> list[Int32[np.ndarray, "T"]]:
        """Return the bytes."""
        return [np.frombuffer(text, np.uint8).astype(np.int32) for text in texts]

    def encode_placed(self, texts: Sequence[str]) -> list[PlacedTokens]:
        """Return the bytes, and the character that each is of."""
        found = []
        for text in texts:
            content = text.encode()
            place = np.arange(len(content))
            ids = np.frombuffer(content, np.uint8).astype(np.int32)
            found.append(by_characters(text, ids, place, place + 1))
        return found

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
        split_special_tokens: in training, read special tokens that a text has as its letters.

    Raises:
        UserError: the file is missing or cannot be read, or no file names the end token.
    """

    def __init__(self, path: Path, *, split_special_tokens: bool = True) -> None:
        file = path / "tokenizer.json" if path.is_dir() else path
        content = read_tokenizer(file)
        self.name = f"tokenizer_path={path}"
        self._split = split_special_tokens
        with refused_by_library(f"{file} is no tokenizer"):
            self._rust = tokenizers.Tokenizer.from_buffer(content)
            # The file may hold truncation and padding lengths of its original training.
            self._rust.no_truncation()
            self._rust.no_padding()
            beginning = self._rust.encode("a")
            ids = self._rust.get_vocab().values()
            added = self._rust.get_added_tokens_decoder()
        self.vocab_size = max(ids, default=0) + 1
        self.special = frozenset(number for number, token in added.items() if token.special)
        rust = self._rust
        ends = end_tokens(file, rust.token_to_id, lambda token: rust.id_to_token(token) is not None)
        self.ends = frozenset(ends)
        marks = zip(beginning.ids, beginning.special_tokens_mask, strict=True)
        begins = tuple(token for token, _ in takewhile(lambda each: each[1], marks))
        self.before = begins or ends[:1]
        self.after = ends[:1] if begins else ()
        self.marks = marks_in_words(self.before, self.after, self._rust.id_to_token)
        marked = repr((self.before, self.after, split_special_tokens)).encode()
        self.digest = hashlib.blake2b(content + marked, digest_size=16).digest()

    def encode_texts(self, texts: Sequence[bytes]) -> list[Int32[np.ndarray, "T"]]:
        """Encode texts in UTF-8, on all cores; bytes that are not UTF-8 become U+FFFD."""
        self._rust.encode_special_tokens = self._split
        read = [text.decode("utf-8", "replace") for text in texts]
        with refused_by_library(f"{self.name} fails on the text"):
            encoded = self._rust.encode_batch_fast(read, add_special_tokens=False)
        return [np.array(each.ids, np.int32) for each in encoded]

    def encode_placed(self, texts: Sequence[str]) -> list[PlacedTokens]:
        """Encode texts in which special tokens are tokens; say where each token stands."""
        self._rust.encode_special_tokens = False
        with refused_by_library(f"{self.name} fails on the text"):
            encoded = self._rust.encode_batch([*texts], add_special_tokens=False)
        found = []
        for each in encoded:
            places = np.array(each.offsets, np.int64).reshape(-1, 2)
            ids = np.array(each.ids, np.int32)
            found.append(PlacedTokens(ids, places[:, 0], places[:, 1]))
        return found

    def encode_prompt(self, prompt: str) -> list[int]:
        """Encode as the model's own tokenizer does: marks written out in the prompt are marks."""
        self._rust.encode_special_tokens = False
        with refused_by_library(f"{self.name} fails on the prompt"):
            encoded = self._rust.encode(prompt.encode("utf-8", "replace").decode())
        return encoded.ids or [*self.before]

    def decode(self, ids: Sequence[int]) -> str:
        """Decode the ids; those beyond the vocabulary have no text."""
        return self._rust.decode(list(ids), skip_special_tokens=True)


def is_bytes(config: DataConfig) -> bool:
    """Return whether tokens are bytes, which are read without a tokenizer."""
    return config.tokenizer_path in ("", BYTES)


def find_tokenizer(tokenizer_path: str, *, split_special_tokens: bool = True) -> Tokenizer:
    """Load the tokenizer that the key `tokenizer_path` names, bytes if it is empty.

    Args:
        tokenizer_path: the key.
        split_special_tokens: the key; see `FileTokenizer`.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    if tokenizer_path in ("", BYTES):
        return ByteTokenizer()
    path = expanded(tokenizer_path)
    file = tokenizer_file(path) if path.is_dir() else path
    if file is None:
        raise UserError(
            f"tokenizer_path: {path}/tokenizer.json: No such file or directory, nor a "
            f"tokenizer.model or *.tiktoken{_beside(path)}\n"
            "fix: a Hugging Face model directory or a tokenizer.json; tokenizer_path=bytes reads "
            "bytes"
        )
    if file.suffix == ".json":
        return FileTokenizer(
            path if path.is_dir() else file, split_special_tokens=split_special_tokens
        )
    if has_ranks(read_tokenizer(file)):
        return TiktokenTokenizer(file, split_special_tokens=split_special_tokens)
    if file.suffix == ".model":
        return SentencePieceTokenizer(file, split_special_tokens=split_special_tokens)
    return FileTokenizer(file, split_special_tokens=split_special_tokens)


def tokenizer_file(folder: Path) -> Path | None:
    """Return the file of a directory that a tokenizer is read from; None if there is none."""
    names = [*_FILES, *sorted(path.name for path in folder.glob("*.tiktoken"))]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _beside(folder: Path) -> str:
    """Say what to do with files from which tokenizer.json can be made."""
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return (
            "; transformers makes a tokenizer.json of its vocab.json and merges.txt: "
            "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    return ""


def require_chosen(config: DataConfig, vocab_size: int) -> None:
    """Refuse bytes that nobody asked for, of a model whose vocabulary is no vocabulary of bytes.

    Args:
        config: configuration of the text.
        vocab_size: V of the model.

    Raises:
        UserError: there is no `tokenizer_path`, and V is larger than any model of bytes has.
    """
    if not config.tokenizer_path and vocab_size > _MOST_BYTE_VOCABULARY:
        raise UserError(
            f"no tokenizer: vocab_size={vocab_size} is no vocabulary of bytes, and tokenizer_path "
            "is not set\nfix: tokenizer_path=DIR (tokenizer.json, tokenizer.model or *.tiktoken), "
            "or tokenizer_path=bytes"
        )


def tokenizer_line(config: DataConfig, tokenizer: Tokenizer) -> str:
    """Say which tokenizer reads the text, and what it makes of a document.

    Args:
        config: configuration of the text.
        tokenizer: what `find_tokenizer` found.
    """
    if not config.tokenizer_path:
        return f"tokenizer: {tokenizer.name}, as tokenizer_path is not set"
    if is_bytes(config):
        return f"tokenizer: {tokenizer.name}"
    if config.use_sft:
        return f"tokenizer: {tokenizer.name}, {tokenizer.vocab_size:,} tokens"
    written = "as letters" if config.split_special_tokens else "as these"
    return (
        f"tokenizer: {tokenizer.name}, {tokenizer.vocab_size:,} tokens; a document is "
        f"{shown(tokenizer.marks)}; special tokens written in the text are read {written} "
        f"(split_special_tokens={str(config.split_special_tokens).lower()})"
    )


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
