"""Make batches from text: pack tokens into sequences, shuffle by seed, prefetch with Grain.

The documents, in an order that the seed decides, form one stream of tokens: a mark, then the
document's own tokens. Where sequence i begins follows from the documents' lengths, so nothing is
read before it is needed, a corpus may be larger than memory, and the batch of a step is a function
of its number.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import grain
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jaxtyping import Int32, Int64

from moe_shard.config.schema import DataConfig
from moe_shard.data.chat_text import ChatText
from moe_shard.data.corpus import ByteCorpus, Corpus, Say, TokenCorpus
from moe_shard.data.mixture import cut_parts, mean_bytes_per_token, stream_of
from moe_shard.data.spans import Documents, scattered
from moe_shard.data.split import split_documents
from moe_shard.data.synthetic import HostBatch, SyntheticSteps
from moe_shard.data.tokenizer import (
    ByteTokenizer,
    Tokenizer,
    find_tokenizer,
    is_bytes,
    require_chosen,
    require_vocabulary,
    tokenizer_line,
)
from moe_shard.errors import UserError

READ_AHEAD_STEPS = 4
READ_THREADS = 4

PackedSequence = dict[str, Int32[np.ndarray, "S"]]
DeviceBatch = dict[str, Int32[jax.Array, "A R S"]]


def _shuffled(documents: Documents, seed: int) -> Int64[np.ndarray, "documents"]:
    """Order the documents by the seed, in a way that no library's version changes."""
    if not documents.whole:
        return scattered(len(documents), seed)
    # Grain's shuffle and not NumPy's, whose random streams may change with its version.
    shuffled = grain.MapDataset.range(len(documents)).shuffle(seed)
    return np.array([shuffled[i] for i in range(len(shuffled))], np.int64)


class TextSequences(Protocol):
    """Define what batches are made of: sequences of tokens, read in any order.

    Attributes:
        seq_len: S, tokens in a sequence.
        bytes_per_token: bytes of text per token; 0 where there is no such number.
    """

    seq_len: int
    bytes_per_token: float

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> PackedSequence:
        """Read one sequence; see `PackedText`."""

    def targets(self, first: int, end: int) -> int:
        """Count the tokens that sequences are trained on, or judged by."""

    def summary(self, sequences: int) -> str:
        """Say how much text there is; see `PackedText.summary`."""

    def fingerprint(self) -> Int32[np.ndarray, "4"]:
        """Hash the text; equal hashes mean equal sequences."""


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

    def __getitem__(self, row: int) -> PackedSequence:
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


def held_rows(sharding: NamedSharding, shape: tuple[int, int, int]) -> tuple[list[int], list[int]]:
    """List the microbatches, and sequences of a microbatch, that this process's devices hold.

    Args:
        sharding: sharding of an array [A, R, S].
        shape: (A, R, S).
    """
    a: set[int] = set()
    r: set[int] = set()
    for cuts in sharding.addressable_devices_indices_map(shape).values():
        assert cuts is not None
        a.update(range(*cuts[0].indices(shape[0])))
        r.update(range(*cuts[1].indices(shape[1])))
    return sorted(a), sorted(r)


class Batches(Iterator[DeviceBatch]):
    """Iterate over the batches of successive steps, without end. Close it to stop prefetching."""

    def __init__(
        self,
        steps: Any,
        sharding: NamedSharding,
        shape: tuple[int, int, int],
        *,
        bytes_per_token: float,
    ):
        """Wrap what `batches` has built.

        Args:
            steps: Grain's iterator, one `HostBatch` a step.
            sharding: sharding of an array [A, R, S].
            shape: (A, R, S).
            bytes_per_token: bytes of text per token; 0 if there is no text.
        """
        self.bytes_per_token = bytes_per_token
        self._steps = steps
        self._sharding = sharding
        self._shape = shape
        self._held = held_rows(sharding, shape)

    def __next__(self) -> DeviceBatch:
        try:
            step: HostBatch = next(self._steps)
        except BaseException:
            self.close()  # Grain would continue with the step after the failed one
            raise
        return {name: self._place(rows) for name, rows in step.items()}

    def _place(self, rows: Int32[np.ndarray, "a r S"]) -> Int32[jax.Array, "A R S"]:
        def part(cuts: tuple[slice, ...] | None) -> Int32[np.ndarray, "..."]:
            assert cuts is not None
            here = list(cuts)  # slices of the global array, to become slices of `rows`
            for dim, held in enumerate(self._held):
                start, stop, _ = cuts[dim].indices(self._shape[dim])
                first = held.index(start)
                here[dim] = slice(first, first + stop - start)
            return rows[tuple(here)]

        return jax.make_array_from_callback(self._shape, self._sharding, part)

    def close(self) -> None:
        """Stop prefetching; the iterator cannot be used any more."""
        self._steps.close()


def batches(
    config: DataConfig,
    *,
    vocab_size: int,
    seq_len: int,
    rows: int,
    microbatches: int,
    sharding: NamedSharding,
    first_step: int = 0,
    say: Say = lambda _: None,
) -> Batches:
    """Iterate over the batches from a step on; prefetching has begun when this returns.

    The batch of step n depends on the text, the seed, the sizes and n alone: not on the mesh, nor
    on where a run was resumed. Sequence r of microbatch a is number (n*A + a)*R + r of the
    concatenated epochs, each of which is shuffled anew. Synthetic batches are all the same.

    Args:
        config: path of the text, its tokenizer, and the seed.
        vocab_size: V of the model.
        seq_len: S, `max_target_length`.
        rows: R, sequences of one microbatch over all devices.
        microbatches: A, `gradient_accumulation_steps`.
        sharding: sharding of an array [A, R, S]; a process reads only its own devices' sequences.
        first_step: number of the first batch.
        say: receives a line about work that takes long.

    Returns:
        An iterator over `inputs`, `targets`, `positions` and `segment_ids` (see `PackedText`), each
        int32 [A, R, S], placed by `sharding`.

    Raises:
        UserError: the vocabulary is too small, the batch does not divide over the devices, the
            text is missing or too short, or it differs between processes.
    """
    shape = (microbatches, rows, seq_len)
    try:
        sharding.shard_shape(shape)
    except ValueError as error:
        raise UserError(
            f"batch [{microbatches}, {rows}, {seq_len}] (microbatches, sequences, tokens) does not "
            f"divide over {sharding.spec} of mesh {dict(sharding.mesh.shape)}\n"
            "fix: per_device_batch_size (sequences) or max_target_length (tokens)"
        ) from error
    held_a, held_r = held_rows(sharding, shape)
    if config.dataset_type == "synthetic":
        same = SyntheticSteps(
            held_a, held_r, rows=rows, seq_len=seq_len, vocab_size=vocab_size, seed=config.seed
        )
        return Batches(same, sharding, shape, bytes_per_token=0.0)
    require_chosen(config, vocab_size)
    tokenizer = find_tokenizer(
        config.tokenizer_path, split_special_tokens=config.split_special_tokens
    )
    require_vocabulary(tokenizer, vocab_size)
    say_tokenizer = tokenizer_line(config, tokenizer)

    def cut(part: DataConfig, say: Say) -> TextSequences:
        split = split_documents(part, say=say)
        for line in (*split.lines, say_tokenizer):
            say(line)
        text = cut_text(part, split.training, tokenizer, seq_len=seq_len, seed=part.seed, say=say)
        require_same_text(text)
        say(text.summary(microbatches * rows))
        return text

    texts = cut_parts(config, cut, say)
    stream = stream_of(config, texts)

    def read(step: int) -> HostBatch:
        first = step * microbatches
        block = [stream[(first + a) * rows + r] for a in held_a for r in held_r]
        size = (len(held_a), len(held_r), seq_len)
        return {name: np.stack([row[name] for row in block]).reshape(size) for name in block[0]}

    # Prefetch whole steps, so that the training loop has nothing to assemble.
    steps = iter(
        grain.MapDataset.range(first_step, sys.maxsize)
        .map(read)
        .to_iter_dataset(grain.ReadOptions(READ_THREADS, READ_AHEAD_STEPS))
    )
    steps.start_prefetch()
    mean = mean_bytes_per_token(config, texts)
    return Batches(steps, sharding, shape, bytes_per_token=mean)


def cut_text(
    config: DataConfig,
    documents: Documents,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    seed: int,
    say: Say,
) -> TextSequences:
    """Cut documents into sequences, or put conversations into them.

    Args:
        config: `use_sft`, and how conversations are read.
        documents: from `find_text`.
        tokenizer: from `find_tokenizer`.
        seq_len: S, tokens in a sequence.
        seed: seed of the documents' order, in [0, 2**32).
        say: receives lines about the conversations, and about tokenizing, if any was done.

    Raises:
        UserError: see `PackedText` and `ChatText`.
    """
    if config.use_sft:
        return ChatText(config, documents, tokenizer, seq_len=seq_len, seed=seed, say=say)
    return PackedText(
        documents,
        seq_len=seq_len,
        seed=seed,
        tokenizer=None if is_bytes(config) else tokenizer,
        say=say,
    )


def require_same_text(text: TextSequences) -> None:
    """Refuse a text that differs between processes.

    Raises:
        UserError: it does.
    """
    if jax.process_count() == 1:
        return
    mine = text.fingerprint()
    if (multihost_utils.process_allgather(mine) != mine).any():
        raise UserError(
            "dataset_path holds files of other names or sizes, or tokenizer_path another "
            "tokenizer, on some processes than on others\n"
            "fix: the same text (and for the standard library, the same Python) on every host"
        )
