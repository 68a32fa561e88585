"""Text to batches: tokens of files, packed into rows, shuffled by seed, read ahead by Grain.

The documents, in an order that the seed decides, form one stream of tokens: a mark, then the
document's own. Row i of the stream is fixed arithmetic on their lengths, so nothing is read before
it is needed, a corpus may be larger than memory, and a step's batch follows from its number alone.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jaxtyping import Int32, Int64

from moe_shard.config.schema import DataConfig
from moe_shard.data.corpus import ByteCorpus, Corpus, Say, TokenCorpus
from moe_shard.data.documents import find_documents
from moe_shard.data.synthetic import HostBatch, SyntheticSteps
from moe_shard.data.tokenizer import (
    ByteTokenizer,
    Tokenizer,
    find_tokenizer,
    require_vocabulary,
)
from moe_shard.errors import UserError

READ_AHEAD_STEPS = 4
READ_THREADS = 4

PackedSequence = dict[str, Int32[np.ndarray, "S"]]


class PackedText:
    """Documents as one token stream, cut into rows: a random-access source for Grain.

    Row i holds the tokens [i*S, (i+1)*S] of the stream: neighbours share one token, so that every
    token after the first is a target exactly once. The stream's last tokens, fewer than a row,
    are left out. Rows are read from the files when asked for; safe from many threads.

    Attributes:
        paths: the documents, shuffled by seed.
        starts: stream position of each document's first mark; last, the length of the stream.
        seq_len: S.
        bytes_per_token: of the text, marks counted as tokens.
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
            documents: files, from `find_documents`.
            seq_len: S, tokens in a row.
            seed: of the order of the documents, in [0, 2**32).
            tokenizer: of their text; None: bytes.
            say: told of the work of tokenizing, where there was any.

        Raises:
            UserError: there is less than one row of text, or more rows than can be shuffled.
        """
        # Grain's shuffle and not NumPy's, whose random streams may change with its version.
        shuffled = grain.MapDataset.range(len(documents)).shuffle(seed)
        self._order = tuple(int(shuffled[i]) for i in range(len(shuffled)))
        self.paths: tuple[str, ...] = tuple(os.fspath(documents[i]) for i in self._order)
        self._corpus: Corpus
        if tokenizer is None:
            tokenizer, self._corpus = ByteTokenizer(), ByteCorpus(documents)
        else:
            self._corpus = TokenCorpus(documents, tokenizer, say=say)
        self._before = np.array(tokenizer.before, np.int32)
        self._after = np.array(tokenizer.after, np.int32)
        self._digest = tokenizer.digest
        lengths = self._corpus.lengths[list(self._order)]
        self.starts: Int64[np.ndarray, "documents+1"] = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths + len(self._before) + len(self._after), out=self.starts[1:])
        self.seq_len = seq_len
        tokens = int(self.starts[-1])
        self.bytes_per_token = self._corpus.num_bytes / max(tokens, 1)
        if tokens < seq_len + 1:
            raise UserError(
                f"dataset_path holds {tokens} tokens in {len(self.paths)} files; one row takes "
                f"max_target_length + 1 = {seq_len + 1}\n"
                f"fix: more text, or max_target_length={max(1, tokens - 1)} or less"
            )
        if len(self) >= 2**32:  # Grain's shuffle would drop the upper bits silently
            raise UserError(
                f"max_target_length={seq_len} cuts dataset_path into {len(self)} rows; "
                f"at most 2**32 - 1 can be shuffled\nfix: max_target_length={tokens >> 31} or more"
            )

    def __len__(self) -> int:
        return (int(self.starts[-1]) - 1) // self.seq_len

    def __getitem__(self, row: int) -> PackedSequence:
        """One row.

        Returns:
            `inputs` and `targets`: tokens, targets one ahead. `positions`: since the row's start
            or the document's, whichever is later. `segment_ids`: 1 for the document that the row
            begins in, one more at each later one.

        Raises:
            UserError: a file has gone or changed its size.
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

    def _parts(self, document: int, offset: int, size: int, whole: int) -> list[np.ndarray]:
        """Tokens of a document with its marks, in order; the text is read where it is needed."""
        text_start, text_end = len(self._before), whole - len(self._after)
        end = offset + size
        parts = [
            self._before[offset:end],
            self._after[max(offset - text_end, 0) : max(end - text_end, 0)],
        ]
        first, last = max(offset, text_start), min(end, text_end)
        if first < last:
            text = self._corpus.read(self._order[document], first - text_start, last - first)
            parts.insert(1, text)
        return parts

    def fingerprint(self) -> Int32[np.ndarray, "4"]:
        """A hash of tokenizer and lengths in order: equal where all rows begin and end alike."""
        content = self._digest + self.starts.tobytes()
        return np.frombuffer(hashlib.blake2b(content, digest_size=16).digest(), np.int32)


def held_rows(sharding: NamedSharding, shape: tuple[int, int, int]) -> tuple[list[int], list[int]]:
    """The microbatches and the rows of a microbatch that this process's devices hold parts of.

    Args:
        sharding: over (A, R, S).
        shape: (A, R, S).
    """
    a: set[int] = set()
    r: set[int] = set()
    for cuts in sharding.addressable_devices_indices_map(shape).values():
        assert cuts is not None
        a.update(range(*cuts[0].indices(shape[0])))
        r.update(range(*cuts[1].indices(shape[1])))
    return sorted(a), sorted(r)


class Batches(Iterator[dict[str, jax.Array]]):
    """The batches of successive steps, without end. Close it to stop the reading ahead."""

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
            steps: Grain's iterator over a `HostBatch` a step.
            sharding: over (A, R, S).
            shape: (A, R, S).
            bytes_per_token: of the whole text; 0: there is none.
        """
        self.bytes_per_token = bytes_per_token
        self._steps = steps
        self._sharding = sharding
        self._shape = shape
        self._held = held_rows(sharding, shape)

    def __next__(self) -> dict[str, jax.Array]:
        try:
            step: HostBatch = next(self._steps)
        except BaseException:
            self.close()  # Grain would go on with the step after the one that failed
            raise
        return {name: self._place(rows) for name, rows in step.items()}

    def _place(self, rows: Int32[np.ndarray, "a r S"]) -> Int32[jax.Array, "A R S"]:
        def part(cuts: tuple[slice, ...] | None) -> Int32[np.ndarray, "..."]:
            assert cuts is not None
            here = list(cuts)  # places in the global array, to be places among the rows held here
            for dim, held in enumerate(self._held):
                start, stop, _ = cuts[dim].indices(self._shape[dim])
                first = held.index(start)
                here[dim] = slice(first, first + stop - start)
            return rows[tuple(here)]

        return jax.make_array_from_callback(self._shape, self._sharding, part)

    def close(self) -> None:
        """Stop reading ahead; the iterator is spent."""
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
    """The batches from a step on, the first ones being read already when this returns.

    The batch of step n depends on the text, the seed, the sizes and n alone: not on the mesh, nor
    on where a run was resumed. Row r of microbatch a is row (n*A + a)*R + r of the epochs laid end
    to end, each in an order of its own. Synthetic batches are all the same.

    Args:
        config: where the text is, its tokenizer, and the seed.
        vocab_size: V of the model.
        seq_len: S, `max_target_length`.
        rows: R, sequences of one microbatch over all devices.
        microbatches: A, `gradient_accumulation_steps`.
        sharding: of an array [A, R, S]; a process reads only the rows of its own devices.
        first_step: number of the first batch.
        say: told of what takes long.

    Returns:
        An iterator over `inputs`, `targets`, `positions` and `segment_ids` (see `PackedText`), each
        int32 [A, R, S], placed as `sharding` says.

    Raises:
        UserError: the vocabulary is too small, the batch does not divide over the devices, the
            text is missing or too short, or it differs between processes.
    """
    shape = (microbatches, rows, seq_len)
    try:
        sharding.shard_shape(shape)
    except ValueError as error:
        raise UserError(
            f"batch [{microbatches}, {rows}, {seq_len}] (microbatches, rows, tokens) does not "
            f"divide over {sharding.spec} of mesh {dict(sharding.mesh.shape)}\n"
            "fix: per_device_batch_size (rows) or max_target_length (tokens)"
        ) from error
    held_a, held_r = held_rows(sharding, shape)
    if config.dataset_type == "synthetic":
        same = SyntheticSteps(
            held_a, held_r, rows=rows, seq_len=seq_len, vocab_size=vocab_size, seed=config.seed
        )
        return Batches(same, sharding, shape, bytes_per_token=0.0)
    tokenizer = find_tokenizer(config.tokenizer_path)
    require_vocabulary(tokenizer, vocab_size)
    text = PackedText(
        find_documents(config.dataset_path),
        seq_len=seq_len,
        seed=config.seed,
        tokenizer=tokenizer if config.tokenizer_path else None,
        say=say,
    )
    _require_same_text(text)
    stream = grain.MapDataset.source(text).shuffle(config.seed).repeat()

    def read(step: int) -> HostBatch:
        first = step * microbatches
        block = [stream[(first + a) * rows + r] for a in held_a for r in held_r]
        size = (len(held_a), len(held_r), seq_len)
        return {name: np.stack([row[name] for row in block]).reshape(size) for name in block[0]}

    # A whole step is one unit of reading ahead, so that the training loop has none to assemble.
    steps = iter(
        grain.MapDataset.range(first_step, sys.maxsize)
        .map(read)
        .to_iter_dataset(grain.ReadOptions(READ_THREADS, READ_AHEAD_STEPS))
    )
    steps.start_prefetch()
    return Batches(steps, sharding, shape, bytes_per_token=text.bytes_per_token)


def _require_same_text(text: PackedText) -> None:
    if jax.process_count() == 1:
        return
    mine = text.fingerprint()
    if (multihost_utils.process_allgather(mine) != mine).any():
        raise UserError(
            "dataset_path holds files of other names or sizes, or tokenizer_path another "
            "tokenizer, on some processes than on others\n"
            "fix: the same text (and for the standard library, the same Python) on every host"
        )
