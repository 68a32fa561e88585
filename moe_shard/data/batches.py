"""Make batches of sequences: shuffle them by seed, prefetch with Grain, place them on devices.

The batch of a step is a function of its number.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Int32

from moe_shard.config.schema import DataConfig
from moe_shard.data.corpus import Say
from moe_shard.data.mixture import cut_parts, mean_bytes_per_token, stream_of
from moe_shard.data.sequences import TextSequences, cut_text, require_same_text
from moe_shard.data.split import split_documents
from moe_shard.data.synthetic import HostBatch, SyntheticSteps
from moe_shard.data.tokenizer import (
    find_tokenizer,
    require_chosen,
    require_vocabulary,
    tokenizer_line,
)
from moe_shard.errors import UserError

READ_AHEAD_STEPS = 4
READ_THREADS = 4

DeviceBatch = dict[str, Int32[jax.Array, "A R S"]]


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
