"""Use a `tokenizer.model` of SentencePiece through its library."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
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

_PREFIX_ONCE = ("Llama", "CodeLlama", "Mistral")
"""Classes that put a space before a text, and not after a special token unless "legacy"."""


class SentencePieceTokenizer:
    """Use a SentencePiece model; read its special tokens from the files next to it.

    Tokens are those of transformers for the same directory: special tokens are cut out of a text,
    the pieces between them are encoded by the library, and the space that the model may put before
    a text is not put before one that has it. A document is `<s>`, where the model's tokenizer
    begins texts with it (`add_bos_token`), the text, and the end token.

    Args:
        file: the model, in its Hugging Face directory.
        split_special_tokens: in training, read special tokens that a text has as its letters.

    Raises:
        UserError: the file is no such model, or the library is not installed.
    """

    def __init__(self, file: Path, *, split_special_tokens: bool) -> None:
        library = needed("sentencepiece", str(file))
        proto = needed("sentencepiece.sentencepiece_model_pb2", str(file))
        content = read_tokenizer(file)
        self.name = f"tokenizer_path={file}"
        self._split = split_special_tokens
        with refused_by_library(f"{file} is no model of SentencePiece"):
            self._model = library.SentencePieceProcessor(model_proto=content)
            parts = proto.ModelProto.FromString(content)
            normalizer = parts.normalizer_spec
            self._prefixed = bool(normalizer.add_dummy_prefix)
            # A model that removes spaces puts one before every piece; else this one puts none.
            self._strips = bool(normalizer.remove_extra_whitespaces)
            normalizer.add_dummy_prefix = self._prefixed and self._strips
            self._bare = library.SentencePieceProcessor(model_proto=parts.SerializeToString())
        size = self._model.get_piece_size()
        settings = settings_beside(file.with_name("tokenizer_config.json"))
        kind = settings.get("tokenizer_class")
        kind = kind if isinstance(kind, str) else "Llama"
        self._prefix_once = kind.startswith(_PREFIX_ONCE) and settings.get("legacy") is not True

        def id_of(token: str) -> int | None:
            number = int(self._model.piece_to_id(token))
            return (
                None if number == self._model.unk_id() and token != self._name(number) else number
            )

        controls = [number for number in range(size) if self._model.is_control(number)]
        self._special = {self._name(number): number for number in (*controls, self._model.unk_id())}
        self._special |= special_tokens(file, id_of)
        self._names = {number: name for name, number in self._special.items()}
        self.special = frozenset(self._special.values()) - {self._model.unk_id()}
        self.vocab_size = max([size - 1, *self._special.values()]) + 1
        self._cut = re.compile(
            "|".join(sorted(map(re.escape, self._special), key=len, reverse=True))
        )
        try:
            ends = end_tokens(
                file,
                lambda token: self._special.get(token, id_of(token)),
                lambda token: token < self.vocab_size,
            )
        except UserError:
            if self._model.eos_id() < 0 or _says_an_end(file):
                raise
            ends = (int(self._model.eos_id()),)  # no file beside it names another
        self.ends = frozenset(ends)
        begins = settings.get("add_bos_token") is True  # transformers' default is false
        named = settings.get("bos_token")
        named = named.get("content") if isinstance(named, dict) else named
        bos = self._special.get(named) if isinstance(named, str) else self._model.bos_id()
        first = (int(bos),) if begins and bos is not None and bos >= 0 else ()
        self.before = first or ends[:1]
        self.after = ends[:1] if first else ()
        self._first = first
        self.marks = marks_in_words(self.before, self.after, self._name)
        facts = (self.before, self.after, split_special_tokens, self._special, self._prefix_once)
        self.digest = hashlib.blake2b(content + repr(facts).encode(), digest_size=16).digest()

    def _name(self, token: int) -> str:
        known = self.__dict__.get("_names", {}).get(token)
        return known or str(self._model.id_to_piece(token))

    def encode_texts(self, texts: Sequence[bytes]) -> list[Int32[np.ndarray, "T"]]:
        """Encode texts in UTF-8, on all cores; bytes that are not UTF-8 become U+FFFD."""
        read = [text.decode("utf-8", "replace") for text in texts]
        with refused_by_library(f"{self.name} fails on the text"):
            return [np.array(ids, np.int32) for ids in self._encode(read, special=not self._split)]

    def encode_placed(self, texts: Sequence[str]) -> list[PlacedTokens]:
        """Encode texts in which special tokens are tokens; say where each token stands."""
        with refused_by_library(f"{self.name} fails on the text"):
            return [self._placed(text) for text in texts]

    def _placed(self, text: str) -> PlacedTokens:
        ids: list[int] = []
        places: list[tuple[int, int]] = []
        at = 0  # bytes of the text before the next part
        for number, part in enumerate(self._pieces(text)):
            if isinstance(part, int):
                size = len(self._name(part).encode())
                ids.append(part)
                places.append((at, at + size))
                at += size
                continue
            written = self._with_prefix(part, first=number == 0)
            more = len(written.encode()) - len(part.encode())
            [proto] = self._bare.encode([written], out_type="proto")
            end = 0
            found: list[tuple[int, int]] = []
            for piece in reversed(proto.pieces):
                # Of the bytes of a character, the library says for the last one alone where it is.
                end = piece.end if piece.end > piece.begin or end <= piece.begin else end
                found.append((piece.begin, end))
            ids += [piece.id for piece in proto.pieces]
            places += [(at + max(a - more, 0), at + max(b - more, 0)) for a, b in reversed(found)]
            at += len(part.encode())
        pairs = np.array(places, np.int64).reshape(-1, 2)
        return by_characters(text, np.array(ids, np.int32), pairs[:, 0], pairs[:, 1])

    def encode_prompt(self, prompt: str) -> list[int]:
        """Encode as the model's own tokenizer does: marks written out in the prompt are marks."""
        text = prompt.encode("utf-8", "replace").decode()
        with refused_by_library(f"{self.name} fails on the prompt"):
            [ids] = self._encode([text], special=True)
        return [*self._first, *ids] or [*self.before]

    def _encode(self, texts: Sequence[str], *, special: bool) -> Iterator[list[int]]:
        """Encode the pieces of all texts in one call, and join those of each text."""
        cut = [list(self._pieces(text)) if special else [text] for text in texts]
        pieces = [
            self._with_prefix(piece, first=number == 0)
            for parts in cut
            for number, piece in enumerate(parts)
            if isinstance(piece, str)
        ]
        encoded = iter(self._bare.encode(pieces, num_threads=os.cpu_count() or 1))
        for parts in cut:
            ids: list[int] = []
            for piece in parts:
                ids += next(encoded) if isinstance(piece, str) else [piece]
            yield ids

    def _pieces(self, text: str) -> Iterator[str | int]:
        """Yield the text between special tokens, and their ids; the first item is text."""
        at = 0
        for found in self._cut.finditer(text):
            if found.start() > at or at == 0:
                yield text[at : found.start()]
            yield self._special[found.group()]
            at = found.end()
        if at < len(text) or at == 0:
            yield text[at:]

    def _with_prefix(self, piece: str, *, first: bool) -> str:
        wanted = self._prefixed and not self._strips and (first or not self._prefix_once)
        return f" {piece}" if wanted and piece and not piece.startswith((" ", "▁")) else piece

    def decode(self, ids: Sequence[int]) -> str:
        """Decode the ids, without special tokens; those beyond the vocabulary have no text."""
        size = self._model.get_piece_size()
        kept = [int(token) for token in ids if token < size and token not in self.special]
        return str(self._model.decode(kept))


def _says_an_end(file: Path) -> bool:
    """Return whether a file beside a model names an end token, though a wrong one."""
    beside = ("generation_config.json", "config.json", "tokenizer_config.json")
    said = [settings_beside(file.with_name(name)) for name in beside]
    return any(
        each.get(key) not in (None, []) for each in said for key in ("eos_token_id", "eos_token")
    )
