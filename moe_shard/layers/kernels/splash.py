"""Attend by jax's own kernel for TPU, splash attention.

The kernel masks by place in the sequence, as it computes a block, and by segment ids. Which blocks
of keys a block of queries needs it reads from a table, which jax's own helper makes from a mask of
S x T elements on the host; here the table follows from the places of the first and last query of
each block, so that it costs nothing at any length, and queries may be a shard of the sequence whose
place only the device knows.

Block sizes are MaxText's (512): there was no TPU to time others on, and the compiler says nothing
about a kernel's cycles.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask_info,
)
from jaxtyping import Array, Bool, Float, Int

from moe_shard.layers.kernels.reach import in_sequence, rising
from moe_shard.layers.kernels.rule import (
    CONTEXT,
    AttentionCase,
    AttentionRule,
    Tokens,
)

LARGEST_BLOCK = 512
_LANES = 128  # the least block, and what every block is a multiple of
_NO_KEY = -(2**30)
"""Segment id of the keys that fill the last block, which no query has."""

_Order = Int[Array, "S"] | Int[np.ndarray, "S"]
_Places = Int[Array, "..."]
_Seen = Bool[Array, "..."]
_Padded = Int[Array, "S2"] | Int[np.ndarray, "S2"]


def unsupported(case: AttentionCase) -> str | None:
    """Return why the kernel cannot compute a case, or None."""
    if case.platform not in ("tpu", "cpu"):
        return f"splash attention is a kernel for TPU, not for {case.platform}"
    if jnp.dtype(case.dtype).name not in ("bfloat16", "float32"):
        return f"splash attention takes bfloat16 and float32, not {jnp.dtype(case.dtype).name}"
    return None


def attend(
    query: Float[Array, "B S N D"],
    key: Float[Array, "B T J D"],
    value: Float[Array, "B T J Dv"],
    queries: Tokens,
    keys: Tokens,
    *,
    rule: AttentionRule,
    sink: Float[Array, "N"] | None,
    interpret: bool = False,
) -> Float[Array, "B S N Dv"]:
    """Attend on one device; inside `jax.shard_map`, with `check_vma=False`.

    Scores are products of scaled queries, rounded to their dtype as they are scaled.

    Args:
        query: N / J consecutive heads for each key head.
        key: a whole sequence, each document in one piece.
        value: values of the same tokens.
        queries: with the place of each in the sequence, rising.
        keys: the tokens of `key`, with the place of each.
        rule: the layer's span, scale and soft cap.
        sink: for each head, the score of a token without a value; None for no sink.
        interpret: whether to run in Pallas's interpreter, on a CPU.
    """
    tokens, places = query.shape[1], key.shape[1]
    window = None if rule.span == "global" else rule.window
    rows, columns = _block(tokens), _block(places, window)
    order = rising(queries)
    key, value, keys = in_sequence(key, value, keys)
    kernel = _kernel(
        _padded_order(order, -tokens % rows),
        -(-places // columns),
        (rows, columns),
        reach=window,
        mqa=key.shape[2] == 1,
        soft_cap=rule.soft_cap or None,
        interpret=interpret,
    )
    mine, theirs = _segments(queries, rule, places), _segments(keys, rule, places)
    # Queries that fill a block repeat the last one's tokens, so that they see something: the
    # gradient of a row that sees nothing is not a number, and what they give is cut off again.
    mine = jnp.pad(mine, ((0, 0), (0, -tokens % rows)), mode="edge")
    theirs = jnp.pad(theirs, ((0, 0), (0, -places % columns)), constant_values=_NO_KEY)
    scaled = (query.astype(jnp.float32) * rule.scale).astype(query.dtype)
    q = _by_head(scaled, -tokens % rows)
    k, v = (_by_head(x, -places % columns) for x in (key, value))
    if key.shape[2] == 1:
        k, v = k[:, 0], v[:, 0]

    def of_row(
        q: Float[Array, "N S D"],
        k: Float[Array, "*J T D"],
        v: Float[Array, "*J T Dv"],
        mine: Int[Array, "S"],
        theirs: Int[Array, "T"],
    ) -> Float[Array, "N S Dv"]:
        ids = splash_attention_kernel.SegmentIds(mine, theirs)
        attended = kernel(q, k, v, ids, sinks=sink)
        assert isinstance(attended, jax.Array)  # a tuple where residuals are asked for
        return attended

    return jax.vmap(of_row)(q, k, v, mine, theirs)[:, :, :tokens].swapaxes(1, 2)


def _segments(tokens: Tokens, rule: AttentionRule, places: int) -> Int[Array, "B S"]:
    """Return the segment ids; with chunks, each chunk of a document is a segment of its own."""
    ids = tokens.segment_ids.astype(jnp.int32)
    if rule.span != "chunked":
        return ids
    chunks = places // rule.window + 1
    return ids * chunks + (tokens.positions // rule.window).astype(jnp.int32)


def _by_head(x: Float[Array, "B S N D"], short: int) -> Float[Array, "B N S2 D"]:
    return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, short), (0, 0)))


def _block(tokens: int, window: int | None = None) -> int:
    """Return a block that pads the tokens by less than 128, and is not far larger than a window."""
    whole = -(-tokens // _LANES) * _LANES
    block = LARGEST_BLOCK
    while whole % block or (window is not None and block >= 2 * max(window, _LANES)):
        block //= 2
    return block


def _padded_order(order: _Order, short: int) -> _Padded:
    library: Any = np if isinstance(order, np.ndarray) else jnp
    padded: _Padded = library.pad(order, (0, short), mode="edge").astype(np.int32)
    return padded


def _kernel(
    order: _Order,
    key_blocks: int,
    block: tuple[int, int],
    *,
    reach: int | None,
    mqa: bool,
    soft_cap: float | None,
    interpret: bool,
) -> splash_attention_kernel.SplashAttentionKernel:
    """Return the kernel for one row, with the blocks that it needs.

    Args:
        order: place of each query in the sequence.
        key_blocks: blocks of keys.
        block: queries and keys of one block.
        reach: how many places back a query sees, its own included; None for all.
        mqa: whether one head of keys serves all.
        soft_cap: None for none.
        interpret: whether to run in Pallas's interpreter.
    """
    rows, columns = block
    needed = _needed(order, key_blocks, block, reach)
    info, info_dkv = _table(needed, order), _table(needed.T, order, transposed=True)
    return splash_attention_kernel.SplashAttentionKernel(
        info,
        info,
        info_dkv,
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=rows,
            block_kv=columns,
            block_q_dkv=rows,
            block_kv_dkv=columns,
            block_q_dq=rows,
            block_kv_dq=columns,
        ),
        is_mqa=mqa,
        save_residuals=False,
        mask_value=splash_attention_kernel.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=soft_cap,
        residual_checkpoint_name=CONTEXT,
        mask_function=_mask(reach),
        interpret=interpret,
    )


def _needed(
    order: _Order, key_blocks: int, block: tuple[int, int], reach: int | None
) -> Bool[Array, "I U"] | Bool[np.ndarray, "I U"]:
    """Return which block of queries sees something of which block of keys, documents aside."""
    rows, columns = block
    by_block = order.reshape(-1, rows)
    first, last = by_block.min(axis=1)[:, None], by_block.max(axis=1)[:, None]
    start = np.arange(key_blocks, dtype=np.int32)[None] * columns
    needed = start <= last
    if reach is not None:
        needed &= first - (start + columns - 1) < reach
    return needed


def _table(
    needed: Bool[Array, "I U"] | Bool[np.ndarray, "I U"], order: _Order, *, transposed: bool = False
) -> splash_attention_mask_info.MaskInfo:
    """Return the kernel's table: for each block the others that it meets, one after another.

    The grid is as wide as the longest list, where that is known; shorter lists repeat their last
    block, which is then neither fetched again nor computed.

    Args:
        needed: for each block, which others it needs: a range.
        order: place of each query.
        transposed: whether the lists are columns of the table, as the kernel of dk and dv reads it.
    """
    library: Any = np if isinstance(needed, np.ndarray) else jnp
    count = needed.sum(axis=1)
    width = int(count.max()) if isinstance(needed, np.ndarray) else needed.shape[1]
    step = np.arange(width, dtype=np.int32)[None]
    first = needed.argmax(axis=1)[:, None]
    meets = first + library.minimum(step, library.maximum(count - 1, 0)[:, None])
    runs = step < count[:, None]
    if transposed:
        meets, runs = meets.T, runs.T
    # They lie in scalar memory, of which there is little.
    narrow = np.int8 if max(needed.shape) < 2**7 else np.int16
    return splash_attention_mask_info.MaskInfo(
        data_next=meets[None].astype(narrow),
        mask_next=None,
        block_mask=runs[None].astype(np.int8),
        partial_mask_blocks=None,
        q_sequence=order,  # type: ignore[arg-type]  # it may be traced, as all the others
    )


@cache  # the kernel is compiled again for another function, were it equal
def _mask(reach: int | None) -> Callable[[_Places, _Places], _Seen]:
    """Return the mask of places, which the kernel computes for a block at a time."""

    def causal(at: _Places, of: _Places) -> _Seen:
        return at >= of

    if reach is None:
        return causal

    def near(at: _Places, of: _Places) -> _Seen:
        return (at >= of) & (at - of < reach)

    return near
