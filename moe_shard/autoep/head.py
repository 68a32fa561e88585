"""Decide by its tensors whether the head of a checkpoint is its embedding.

`tie_word_embeddings` is often wrong: files have a head of their own where it is true, or a copy of
the embedding where it is false. As in transformers, a head that differs is a parameter of its own
whatever is configured, and one of two that is missing is the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np

from moe_shard.autoep.dequantize import read
from moe_shard.autoep.headers import TensorHeader
from moe_shard.autoep.tensor_names import Names
from moe_shard.config.keys import shown
from moe_shard.errors import UserError

EMBEDDING_ROLE, HEAD_ROLE = "embedding.table", "embedding.kernel"
TIE_KEY = "tie_word_embeddings"
_BLOCK = 2**20
"""Elements that are compared at once."""


@dataclass(frozen=True)
class Head:
    """Describe the head.

    Attributes:
        tied: whether it is the embedding.
        copy: the tensor that repeats the embedding and is written with it; empty: there is none.
        note: a line where that is not what is configured; empty: it is.
    """

    tied: bool
    copy: str = ""
    note: str = ""


class Equal(Enum):
    """Say whether two tensors are equal."""

    NO = "they differ"
    YES = "they are equal"
    UNTOLD = "both begin with one number again and again, as weights that were never made do"


def read_head(
    names: Names,
    headers: Mapping[str, TensorHeader],
    *,
    configured: bool,
    asked: bool | None,
    where: Path,
) -> Head:
    """Decide whether the head is the embedding; where only one of them is stored, it is both.

    Args:
        names: the tensors by role; a head without an embedding becomes the embedding.
        headers: the tensors' headers; the values are read only if both are stored.
        configured: whether `config.json` says that they are one.
        asked: whether the parameters that are read or written are one; None: the tensors decide.
        where: the directory, for messages.

    Raises:
        UserError: they are asked to be one and differ.
    """
    table, kernel = (names.roles.get(role, {}).get(()) for role in (EMBEDDING_ROLE, HEAD_ROLE))
    if table is None and kernel is not None and (configured if asked is None else asked):
        names.roles[EMBEDDING_ROLE] = names.roles.pop(HEAD_ROLE)
        return Head(tied=True)
    if table is None or kernel is None:
        return Head(tied=configured if asked is None else asked)
    if asked is not None:
        if asked and compare_heads(headers[table], headers[kernel]) is Equal.NO:
            raise UserError(
                f"{where}: {shown(kernel)} is not {shown(table)}, and logits_via_embedding=true\n"
                "fix: logits_via_embedding=false"
            )
        return Head(tied=asked, copy=kernel if asked else "")
    equal = compare_heads(headers[table], headers[kernel])
    tied = configured if equal is Equal.UNTOLD else equal is Equal.YES
    note = ""
    if tied != configured:
        what = "equals" if tied else "differs from"
        note = (
            f"head: {kernel} {what} {table}, so they are {'one' if tied else 'two'} "
            f"({TIE_KEY}={shown(configured)} by config.json or its family)"
        )
    return Head(tied, kernel if tied else "", note)


def compare_heads(table: TensorHeader, kernel: TensorHeader) -> Equal:
    """Compare two tensors, bit for bit if they have one dtype, block by block.

    Args:
        table: the header of one.
        kernel: the header of the other.
    """
    if table.shape != kernel.shape:
        return Equal.NO
    here, there = (read(entry).reshape(-1) for entry in (table, kernel))
    same = here.dtype == there.dtype
    as_bits = np.dtype(f"u{here.itemsize}")
    for at in range(0, here.size, _BLOCK):
        a, b = (x[at : at + _BLOCK] for x in (here, there))
        a, b = (x.view(as_bits) if same else x.astype(np.float32) for x in (a, b))
        if not np.array_equal(a, b):
            return Equal.NO
        if at == 0 and np.all(a == a[0]):
            return Equal.UNTOLD  # at once: a file that was never filled may have any size
    return Equal.YES
