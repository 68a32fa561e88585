"""Cut text into sequences: a random-access source, whose sequences need not be read in order.

The documents, in an order that the seed decides, form one stream of tokens: a mark, then the
document's own tokens. Where sequence i begins follows from the documents' lengths, so nothing is
read before it is needed, and a corpus may be larger than memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import grain
import numpy as np
from jaxtyping import Int32, Int64

from moe_shard.data.corpus import ByteCorpus, Corpus, Say, TokenCorpus
from moe_shard.data.spans import Documents, scattered
from moe_shard.data.tokenizer import ByteTokenizer, Tokenizer
from moe_shard.errors import UserError


def _shuffled(documents: Documents, seed: int) -> Int64[np.ndarray, "documents"]:
    """Order the documents by the seed, in a way that no library's version changes."""
    if not documents.whole:
        return scattered(len(documents), seed)
    # Grain's shuffle and not NumPy's, whose random streams may change with its version.
    shuffled = grain.MapDataset.range(len(documents)).shuffle(seed)
    return np.array([shuffled[i] for i in range(len(shuffled))], np.int64)


class PackedText:
    """Cut documents, as one token stream, into sequences: a random-access source for Grain.

    Sequence i holds the tokens [i*S, (i+1)*S] of the stream: consecutive ones overlap by one token,
    so that every token after the first is a target exactly once. The last tokens of the stream,
    fewer than a sequence, are left out. Sequences are read from the files on demand; many threads
    may read.

    Attributes:
        starts: stream position of each document's first mark, then the length of the stream.
        seq_len: S, tokens in a sequence.
        bytes_per_token: bytes of text per token, marks counted as tokens.
    """

    def __init__(
        self,
        documents: Sequence[Path],
        *,
        seq_len: int,
        seed: int,
        tokenizer: Tokenizer | None = None,
        say: Say = lambda _: None,
    ):
        """Index the documents by their lengths.

        Args:
            documents: `Documents`, or files that are one each.
            seq_len: S, tokens in a sequence.
            seed: seed of the documents' order, in [0, 2**32).
            tokenizer: tokenizer of the text; None for bytes.
            say: receives a line about tokenizing, if any was done.

        Raises:
            UserError: there is less than one sequence of text, or more sequences than can be
                shuffled.
        """
        documents = Documents.of_files(documents)
        self._documents = documents
        self._order = _shuffled(documents, seed)
        self._corpus: Corpus
        if tokenizer is None:
            tokenizer, self._corpus = ByteTokenizer(), ByteCorpus(documents)
        else:
            self._corpus = TokenCorpus(documents, tokenizer, say=say)
        self._before = np.array(tokenizer.before, np.int32)
        self._after = np.array(tokenizer.after, np.int32)
        self._digest = tokenizer.digest
        lengths = self._corpus.lengths[self._order]
        self.starts: Int64[np.ndarray, "documents+1"] = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths + len(self._before) + len(self._after), out=self.starts[1:])
        self.seq_len = seq_len
        tokens = int(self.starts[-1])
        self.bytes_per_token = self._corpus.num_bytes / max(tokens, 1)
        if tokens < seq_len + 1:
            raise UserError(
                f"dataset_path holds {tokens} tokens in {len(documents)} documents; one sequence "
                f"takes max_target_length + 1 = {seq_len + 1}\n"
                f"fix: more text, or max_target_length={max(1, tokens - 1)} or less"
            )
        if len(self) >= 2**32:  # Grain's shuffle would drop the upper bits silently
            raise UserError(
                f"max_target_length={seq_len} cuts dataset_path into {len(self)} sequences; "
                f"at most 2**32 - 1 can be shuffled\nfix: max_target_length={tokens >> 31} or more"
            )

    @property
    def paths(self) -> tuple[str, ...]:
        """Return the file of each document, in the shuffled order."""
        origins = self._documents.origins
        return tuple(origins[number] for number in self._documents.file[self._order])

    def __len__(self) -> int:
        return (int(self.starts[-1]) - 1) // self.seq_len

    def __getitem__(self, row: int) -> dict[str, Int32[np.ndarray, "S"]]:
        """Read one sequence.

        Returns:
            `inputs` and `targets`: tokens, targets one ahead. `positions`: counted from the start
            of the sequence or of the document, whichever is later. `segment_ids`: 1 for the
            document that the sequence begins in, one more for each later document.

        Raises:
            UserError: a file was removed or has another size than before.
        """
        start = row * self.seq_len
        tokens = self._tokens(start, self.seq_len + 1)
        first, last = np.searchsorted(self.starts, [start, start + self.seq_len])
        begins = np.zeros(self.seq_len, bool)
        begins[self.starts[first:last] - start] = True
        begins[0] = True
        place = np.arange(self.seq_len, dtype=np.int32)
        return {
            "inputs": tokens[:-1],
            "targets": tokens[1:],
            "positions": place - np.maximum.accumulate(np.where(begins, place, 0)),
            "segment_ids": np.cumsum(begins, dtype=np.int32),
        }

    def _tokens(self, start: int, count: int) -> Int32[np.ndarray, "count"]:
        document = int(np.searchsorted(self.starts, start, side="right")) - 1
        parts = []
        while count > 0:
            first, end = (int(at) for at in self.starts[document : document + 2])
            size = min(end - start, count)
            parts += self._parts(document, start - first, size, end - first)
            start, count, document = start + size, count - size, document + 1
        return np.concatenate(parts)

    def _parts(
        self, document: int, offset: int, size: int, whole: int
    ) -> list[Int32[np.ndarray, "_"]]:
        """Return tokens of a document and its marks, in order, reading only the text needed."""
        text_start, text_end = len(self._before), whole - len(self._after)
        end = offset + size
        parts = [
            self._before[offset:end],
            self._after[max(offset - text_end, 0) : max(end - text_end, 0)],
        ]
        first, last = max(offset, text_start), min(end, text_end)
        if first < last:
            text = self._corpus.read(int(self._order[document]), first - text_start, last - first)
            parts.insert(1, text)
        return parts

    def targets(self, first: int, end: int) -> int:
        """Count the targets of sequences: all of their tokens."""
        return (end - first) * self.seq_len

    def summary(self, sequences: int) -> str:
        """Say how much text there is.

        Args:
            sequences: sequences of an update.
        """
        return (
            f"text: {int(self.starts[-1]):,} tokens in {len(self):,} sequences of {self.seq_len}, "
            f"which {max(1, round(len(self) / sequences)):,} updates read once"
        )

    def fingerprint(self) -> Int32[np.ndarray, "4"]:
        """Hash the tokenizer and the lengths in order; equal hashes mean equal sequences."""
        content = self._digest + self.starts.tobytes()
        return np.frombuffer(hashlib.blake2b(content, digest_size=16).digest(), np.int32)
