"""Put whole conversations into sequences: a random-access source, as `PackedText` is of text."""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort

import numpy as np
from jaxtyping import Bool, Int32, Int64

from moe_shard.config.schema import DataConfig
from moe_shard.data.chat_tokenizer import ChatTokenizer, is_trained, plain_ids
from moe_shard.data.corpus import Say, TokenCorpus
from moe_shard.data.spans import Documents, scattered
from moe_shard.data.tokenizer import Tokenizer
from moe_shard.errors import UserError
from moe_shard.layers.cache import PADDING
from moe_shard.layers.loss import IGNORED

_READ_TOKENS = 1 << 22


class ChatText:
    """Put conversations into sequences of S tokens, none of them over two.

    A conversation begins at position 0 of a segment of its own, and the target of each token is the
    next one where that is trained on, otherwise `IGNORED`. One longer than S is cut at its end, as
    TRL does. Conversations go into sequences by best fit, the longest first, or with
    `packing=false` each into one of its own; what remains of a sequence is padding: tokens 0 in the
    segment `PADDING`, without targets, which no expert gets.

    Args:
        config: template, and what is trained on.
        documents: conversations, from `find_text`.
        tokenizer: the model's.
        seq_len: S, tokens in a sequence.
        seed: seed of the order, in [0, 2**32).
        say: receives lines about the conversations, and about tokenizing, if any was done.

    Raises:
        UserError: a conversation has no tokens (see `ChatTokenizer`), or none has any to train on.
    """

    def __init__(
        self,
        config: DataConfig,
        documents: Documents,
        tokenizer: Tokenizer,
        *,
        seq_len: int,
        seed: int,
        say: Say,
    ) -> None:
        self.seq_len = seq_len
        self.bytes_per_token = 0.0
        with ChatTokenizer(config, tokenizer) as chat:
            say(chat.line)
            self._corpus = TokenCorpus(documents, chat, say=say)
            first = f"; the first: {chat.first_refused}" if chat.first_refused else ""
            self._digest = chat.digest
        lengths = self._corpus.lengths
        self._kept = np.minimum(lengths, seq_len)
        trained = self._count_trained(self._kept)
        refused, idle = lengths == 0, (lengths > 0) & (trained == 0)
        if refused.any():
            say(f"chat: {refused.sum():,} conversations that cannot be read passed over{first}")
        if idle.any():
            say(f"chat: {idle.sum():,} conversations with nothing to train on left out")
        long = (lengths > seq_len) & ~idle
        if long.any():
            lost = int((lengths - self._kept)[long].sum())
            say(
                f"chat: {long.sum():,} conversations longer than max_target_length={seq_len} are "
                f"cut at their end: {lost:,} tokens are not read"
            )
        order = scattered(len(documents), seed)
        order = order[trained[order] > 0]
        if not len(order):
            raise UserError(
                f"no conversation of {len(documents):,} has a token to train on within its first "
                f"max_target_length={seq_len}\nfix: a larger max_target_length, or conversations "
                "in which the assistant speaks"
            )
        alone = np.arange(len(order))
        sequence = best_fit(self._kept[order], seq_len) if config.packing else alone
        by_sequence = np.argsort(sequence, kind="stable")
        self._members = order[by_sequence]
        counts = np.bincount(sequence)
        self._first = np.concatenate([[0], np.cumsum(counts)])
        of_sequence = np.bincount(sequence, weights=trained[order]).astype(np.int64)
        self._targets = np.concatenate([[0], np.cumsum(of_sequence)])
        self._tokens = int(self._kept[order].sum())

    def _count_trained(
        self, kept: Int64[np.ndarray, "documents"]
    ) -> Int64[np.ndarray, "documents"]:
        """Count the targets among the first tokens of each conversation; its first is none."""
        lengths = self._corpus.lengths
        ends = np.cumsum(lengths)
        starts = ends - lengths
        counts = np.zeros(len(lengths), np.int64)
        first = 0
        while first < len(lengths):
            at = int(starts[first])
            last = max(first + 1, int(np.searchsorted(ends, at + _READ_TOKENS, side="right")))
            tokens = self._corpus.read(first, 0, int(ends[last - 1]) - at)
            before = np.concatenate([[0], np.cumsum(is_trained(tokens))])
            begins = starts[first:last] - at
            some = kept[first:last] > 0
            counts[first:last] = before[begins + kept[first:last]] - before[begins + some]
            first = last
        return counts

    def __len__(self) -> int:
        return len(self._first) - 1

    def __getitem__(self, row: int) -> dict[str, Int32[np.ndarray, "S"]]:
        """Read one sequence.

        Returns:
            `inputs` and `targets`, one ahead, or `IGNORED`. `positions`, counted from the start of
            the conversation. `segment_ids`: 1 for the first conversation, one more for each later
            one; `PADDING` for the padding.

        Raises:
            UserError: the cache was removed or has changed.
        """
        inputs = np.zeros(self.seq_len, np.int32)
        targets = np.full(self.seq_len, IGNORED, np.int32)
        begins: Bool[np.ndarray, "S"] = np.zeros(self.seq_len, bool)
        at = 0
        for document in self._members[self._first[row] : self._first[row + 1]]:
            size = int(self._kept[document])
            tokens = self._corpus.read(int(document), 0, size)
            inputs[at : at + size] = plain_ids(tokens)
            targets[at : at + size - 1] = np.where(is_trained(tokens[1:]), tokens[1:], IGNORED)
            begins[at] = True
            at += size
        begins[at : at + 1] = True
        place = np.arange(self.seq_len, dtype=np.int32)
        segments = np.cumsum(begins, dtype=np.int32)
        segments[at:] = PADDING
        return {
            "inputs": inputs,
            "targets": targets,
            "positions": place - np.maximum.accumulate(np.where(begins, place, 0)),
            "segment_ids": segments,
        }

    def targets(self, first: int, end: int) -> int:
        """Count the tokens that sequences are trained on.

        Args:
            first: the first sequence.
            end: the one after the last.
        """
        return int(self._targets[end] - self._targets[first])

    def summary(self, sequences: int) -> str:
        """Say how much is read, and how much of it is trained on.

        Args:
            sequences: sequences of an update.
        """
        padding = 1 - self._tokens / (len(self) * self.seq_len)
        return (
            f"chat: {len(self._members):,} conversations, {int(self._targets[-1]):,} tokens "
            f"trained on of {self._tokens:,} read, in {len(self):,} sequences of {self.seq_len} "
            f"({padding:.1%} padding), which {max(1, round(len(self) / sequences)):,} updates read "
            "once"
        )

    def fingerprint(self) -> Int32[np.ndarray, "4"]:
        """Hash template, tokenizer and lengths in order; equal hashes mean equal sequences."""
        content = self._digest + self._members.tobytes() + self._kept.tobytes()
        return np.frombuffer(hashlib.blake2b(content, digest_size=16).digest(), np.int32)


def best_fit(sizes: Int64[np.ndarray, "n"], room: int) -> Int64[np.ndarray, "n"]:
    """Put items into as few bins as best fit finds, the largest first.

    Args:
        sizes: size of each item, at most `room`.
        room: size of a bin.

    Returns:
        The bin of each item.
    """
    bins = np.zeros(len(sizes), np.int64)
    open_bins: dict[int, list[int]] = {}  # room left -> bins
    rooms: list[int] = []  # the keys, sorted
    count = 0
    for item in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[item])
        at = bisect_left(rooms, size)
        if at == len(rooms):
            chosen, left = count, room
            count += 1
        else:
            left = rooms[at]
            chosen = open_bins[left].pop()
            if not open_bins[left]:
                del open_bins[left]
                rooms.pop(at)
        bins[item] = chosen
        left -= size
        if left:
            if left not in open_bins:
                open_bins[left] = []
                insort(rooms, left)
            open_bins[left].append(chosen)
    return bins
