"""Read held-out text: the same batches, in the same order, at every evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jax.sharding import NamedSharding

from moe_shard.config.schema import DataConfig
from moe_shard.data.batches import Batches, held_rows
from moe_shard.data.corpus import Say
from moe_shard.data.found_text import find_text
from moe_shard.data.sequences import TextSequences, cut_text, require_same_text
from moe_shard.data.spans import Documents
from moe_shard.data.split import split_documents
from moe_shard.data.synthetic import HostBatch
from moe_shard.data.tokenizer import find_tokenizer, require_vocabulary
from moe_shard.errors import UserError

HELD_OUT = "held_out"
"""Name of the part of `dataset_path` that `eval_holdout_fraction` keeps from training."""


class HeldOutText:
    """Cut one dataset into whole batches; what is left at the end makes none.

    Attributes:
        name: name of the dataset.
        num_batches: batches that are read.
        tokens: targets in them.
        weights: targets of each batch, over their mean.
        bytes_per_token: bytes of text per token, marks counted as tokens; 0: of conversations.
        left_out: sequences of the text that are not read.
    """

    def __init__(
        self,
        name: str,
        text: TextSequences,
        *,
        rows: int,
        most: int,
        sharding: NamedSharding,
    ) -> None:
        """Count the batches.

        Args:
            name: name of the dataset.
            text: its sequences.
            rows: R, sequences of a batch over all devices.
            most: batches to read; -1: all.
            sharding: sharding of an array [1, R, S].

        Raises:
            UserError: the text is less than one batch.
        """
        whole = len(text) // rows
        if not whole:
            raise UserError(
                f"eval_dataset_path: {name} holds {len(text)} sequences of {text.seq_len} tokens; "
                f"a batch takes {rows}\nfix: more text, or a smaller per_device_batch_size"
            )
        self.name, self._text, self._rows, self._sharding = name, text, rows, sharding
        self.num_batches = whole if most == -1 else min(most, whole)
        counts = [text.targets(n * rows, (n + 1) * rows) for n in range(self.num_batches)]
        self.tokens = sum(counts)
        self.weights = [count * len(counts) / max(self.tokens, 1) for count in counts]
        self.bytes_per_token = text.bytes_per_token
        self.left_out = len(text) - self.num_batches * rows

    def batches(self) -> Batches:
        """Iterate over the batches, each field [1, R, S]; a process reads its own sequences."""
        shape = (1, self._rows, self._text.seq_len)
        steps = _Steps(self._text, held_rows(self._sharding, shape)[1], self._rows)
        return Batches(steps, self._sharding, shape, bytes_per_token=self.bytes_per_token)


class _Steps:
    def __init__(self, text: TextSequences, held: Sequence[int], rows: int) -> None:
        self._text, self._held, self._rows, self._next = text, held, rows, 0

    def __next__(self) -> HostBatch:
        first = self._next * self._rows
        self._next += 1
        block = [self._text[first + row] for row in self._held]
        return {name: np.stack([row[name] for row in block])[None] for name in block[0]}

    def close(self) -> None:
        """Do nothing: nothing is read ahead."""


def held_out_texts(
    config: DataConfig,
    *,
    vocab_size: int,
    seq_len: int,
    rows: int,
    most: int,
    sharding: NamedSharding,
    say: Say = lambda _: None,
) -> tuple[HeldOutText, ...]:
    """Find the datasets that a run is evaluated on.

    Args:
        config: paths of the text, and its tokenizer.
        vocab_size: V of the model.
        seq_len: S, `max_target_length`.
        rows: R, sequences of a batch over all devices.
        most: batches of each dataset; -1: all.
        sharding: sharding of an array [1, R, S].
        say: receives a line on what is left out.

    Raises:
        UserError: a text is missing or too short, or two have one name.
    """
    tokenizer = find_tokenizer(
        config.tokenizer_path, split_special_tokens=config.split_special_tokens
    )
    require_vocabulary(tokenizer, vocab_size)
    named: dict[str, Documents] = {}
    for entry in config.eval_dataset_path:
        name, path = _named(entry)
        if name in named:
            raise UserError(
                f"eval_dataset_path names two datasets {name}\nfix: NAME=PATH for each of them"
            )
        named[name], lines = find_text(
            config,
            (path,),
            key="eval_dataset_path",
            columns=config.eval_data_columns,
            split=config.eval_split,
            say=say,
        )
        for line in lines:
            say(f"evaluation on {name}: {line}")
    if config.eval_holdout_fraction:
        named[HELD_OUT] = split_documents(config).held_out
    found = []
    for name, documents in named.items():
        # Another seed of the run must not change what it is judged by.
        text = cut_text(config, documents, tokenizer, seq_len=seq_len, seed=0, say=say)
        require_same_text(text)
        one = HeldOutText(name, text, rows=rows, most=most, sharding=sharding)
        left = f", {one.left_out:,} sequences left out" if one.left_out else ""
        say(f"evaluation on {name}: {one.tokens:,} tokens in {one.num_batches:,} batches{left}")
        found.append(one)
    return tuple(found)


def _named(entry: str) -> tuple[str, str]:
    """Split NAME=PATH; without a name it is the path's last part without its ending."""
    name, equals, path = entry.partition("=")
    if equals and name and "/" not in name:
        return name, path
    return Path(entry).stem or entry, entry
