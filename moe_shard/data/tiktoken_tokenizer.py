"""Use a file of tiktoken's: a token in base64 and its rank, line by line."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from moe_shard.data.formats import needed
from moe_shard.data.placed_tokens import PlacedTokens, by_characters
from moe_shard.data.tokenizer_files import (
    end_tokens,
    marks_in_words,
    read_tokenizer,
    refused_by_library,
    settings_beside,
    special_tokens,
)
from moe_shard.errors import UserError

# What files of ranks do not say: how text is cut before its bytes are merged. This is the pattern
# of cl100k_base, which Llama 3 and transformers' own reader of such files have.
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\s*")


def has_ranks(content: bytes) -> bool:
    """Return whether the bytes are a file of tiktoken's."""
    lines = content[:4096].split(b"\n")[:3]
    return all(_LINE.fullmatch(line) for line in lines if line) and any(lines)


class TiktokenTokenizer:
    """Use ranks of tiktoken's; read special tokens from the files next to them.

    Their names and ids are those of `added_tokens_decoder` in tokenizer_config.json. A document is
    the token of `bos_token`, where `add_bos_token` says so, the text, and the end token.

    Args:
        file: the ranks, in their Hugging Face directory.
        split_special_tokens: in training, read special tokens that a text has as its letters.

    Raises:
        UserError: the file holds something else, no file names the end token, or the library is
            not installed.
    """

    def __init__(self, file: Path, *, split_special_tokens: bool) -> None:
        library = needed("tiktoken", str(file))
        content = read_tokenizer(file)
        self.name = f"tokenizer_path={file} (text is cut as by cl100k_base)"
        self._split = split_special_tokens
        settings = settings_beside(file.with_name("tokenizer_config.json"))
        self._special = special_tokens(file, lambda _: None)
        with refused_by_library(f"{file} is no file of tiktoken's"):
            ranks = {
                base64.b64decode(token, validate=True): int(rank)
                for token, rank in (line.split() for line in content.splitlines() if line)
            }
            self._encoding = library.Encoding(
                file.name, pat_str=_PATTERN, mergeable_ranks=ranks, special_tokens=self._special
            )
        self._size = max(ranks.values(), default=-1) + 1
        self.special = frozenset(self._special.values())
        self.vocab_size = max([self._size - 1, *self.special]) + 1
        if len(ranks) != self._size or self.special & set(ranks.values()):
            raise UserError(
                f"{file}: its ranks leave out numbers, or are those of special tokens\n"
                "fix: the two files of one model"
            )
        # Where no names are known, a number may still be a special token beyond the ranks.
        ends = end_tokens(file, self._special.get, lambda _: True)
        self.ends = frozenset(ends)
        self.vocab_size = max(self.vocab_size, *(token + 1 for token in ends))
        named = settings.get("bos_token")
        named = named.get("content") if isinstance(named, dict) else named
        bos = self._special.get(named) if isinstance(named, str) else None
        self._first = (bos,) if settings.get("add_bos_token") is True and bos is not None else ()
        self.before = self._first or ends[:1]
        self.after = ends[:1] if self._first else ()
        names = {number: name for name, number in self._special.items()}
        self.marks = marks_in_words(self.before, self.after, names.get)
        facts = (self.before, self.after, split_special_tokens, self._special)
        self.digest = hashlib.blake2b(content + repr(facts).encode(), digest_size=16).digest()

    def encode_texts(self, texts: Sequence[bytes]) -> list[Int32[np.ndarray, "T"]]:
        """Encode texts in UTF-8, on all cores; bytes that are not UTF-8 become U+FFFD."""
        read = [text.decode("utf-8", "replace") for text in texts]
        with refused_by_library(f"{self.name} fails on the text"):
            encoded = self._encoding.encode_batch(
                read,
                num_threads=os.cpu_count() or 1,
                allowed_special=set() if self._split else "all",
                disallowed_special=(),
            )
        return [np.array(ids, np.int32) for ids in encoded]

    def encode_placed(self, texts: Sequence[str]) -> list[PlacedTokens]:
        """Encode texts in which special tokens are tokens; say where each token stands."""
        with refused_by_library(f"{self.name} fails on the text"):
            encoded = self._encoding.encode_batch(
                [*texts],
                num_threads=os.cpu_count() or 1,
                allowed_special="all",
                disallowed_special=(),
            )
        found = []
        for text, ids in zip(texts, encoded, strict=True):
            sizes = [len(self._encoding.decode_single_token_bytes(token)) for token in ids]
            ends = np.cumsum(np.array(sizes, np.int64))
            starts = ends - np.array(sizes, np.int64)
            found.append(by_characters(text, np.array(ids, np.int32), starts, ends))
        return found

    def encode_prompt(self, prompt: str) -> list[int]:
        """Encode as the model's own tokenizer does: marks written out in the prompt are marks."""
        text = prompt.encode("utf-8", "replace").decode()
        with refused_by_library(f"{self.name} fails on the prompt"):
            ids = self._encoding.encode(text, allowed_special="all", disallowed_special=())
        return [*self._first, *ids] or [*self.before]

    def decode(self, ids: Sequence[int]) -> str:
        """Decode the ids, without special tokens; those beyond the vocabulary have no text."""
        kept = [int(token) for token in ids if token < self._size and token not in self.special]
        return str(self._encoding.decode(kept))
