"""Define what batches are made of, and make it of documents: text cut, or conversations packed."""

from __future__ import annotations

from typing import Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Int32

from moe_shard.config.schema import DataConfig
from moe_shard.data.chat_text import ChatText
from moe_shard.data.corpus import Say
from moe_shard.data.packed_text import PackedText
from moe_shard.data.spans import Documents
from moe_shard.data.tokenizer import Tokenizer, is_bytes
from moe_shard.errors import UserError


class TextSequences(Protocol):
    """Define what batches are made of: sequences of tokens, read in any order.

    Attributes:
        seq_len: S, tokens in a sequence.
        bytes_per_token: bytes of text per token; 0 where there is no such number.
    """

    seq_len: int
    bytes_per_token: float

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> dict[str, Int32[np.ndarray, "S"]]:
        """Read one sequence; see `PackedText`."""

    def targets(self, first: int, end: int) -> int:
        """Count the tokens that sequences are trained on, or judged by."""

    def summary(self, sequences: int) -> str:
        """Say how much text there is; see `PackedText.summary`."""

    def fingerprint(self) -> Int32[np.ndarray, "4"]:
        """Hash the text; equal hashes mean equal sequences."""


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
