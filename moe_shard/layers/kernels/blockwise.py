"""Attend block by block in plain JAX: a softmax that is corrected as larger scores turn up.

No array of S x T elements exists: each block of queries meets the blocks of keys one after another
(Rabe and Staats, arXiv 2112.05682; FlashAttention-2, 2307.08691), and the backward pass computes
the scores of a block again, from the logsumexp of its rows. Pairs of blocks in which no token sees
another are not computed: those that the order of tokens or the window rules out are not in the
program where that is known at tracing, and skipped where it is not, as are different documents.

Dims, beside those of this package:

    I, C  blocks of queries, and queries of one     U, K  blocks of keys, and keys of one
    R     rows of the products of a pair: the G heads of each of C queries
    X, Y  R and K, or K and R
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from moe_shard.layers.kernels.block_pairs import (
    NO_KEY,
    NO_QUERY,
    PART,
    SKIP,
    WHOLE,
    BlockPairs,
    BlockTokens,
    block_size,
    joined_blocks,
    list_pairs,
    pair_needs,
    split_blocks,
    split_tokens,
)
from moe_shard.layers.kernels.rule import (
    AttentionCase,
    AttentionRule,
    Tokens,
    named_context,
    seen_tokens,
)
from moe_shard.sharding.varying import vary_alike, vary_over, varying_axes, zeros

CPU_BLOCK, OTHER_BLOCK = 256, 512
"""Largest number of tokens of a block. On CPU blocks of 128 and 512 take 1.1 to 1.4 times as long,
at S 1024 to 4096 with heads of 64 and 128."""

_SMALLEST = 128
"""Tokens that are one block, because two would cost more than the half pair that they save."""

LOWEST = -1e30
"""A score below all others, finite so that the difference of two is a number."""


@dataclass(frozen=True)
class BlockPlan:
    """Hold what is known of a call when it is traced.

    Attributes:
        rule: mask and scores.
        pairs: the pairs of blocks that may have to be computed.
        group: G, query heads of each key head.
    """

    rule: AttentionRule
    pairs: BlockPairs
    group: int


class Blocks(NamedTuple):
    """Hold the arrays of a call, split into blocks.

    Attributes:
        query: the G heads of a key head are rows of one matrix.
        key: keys.
        value: values.
        queries: the tokens that attend.
        keys: the tokens attended to.
    """

    query: Float[Array, "I B J R D"]
    key: Float[Array, "U B J K D"]
    value: Float[Array, "U B J K Dv"]
    queries: BlockTokens
    keys: BlockTokens


class Attended(NamedTuple):
    """Hold attention's output in blocks, and what its backward pass needs of the scores.

    Attributes:
        out: weighted values; 0 where a query sees no key.
        log_sum: logarithm of the sum of the exponentials of a query's scores, sink included.
    """

    out: Float[Array, "I B J R Dv"]
    log_sum: Float[Array, "I B J R"]


def unsupported(_case: AttentionCase) -> str | None:
    """Return why this cannot compute a case: it always can."""
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
    largest_block: int = CPU_BLOCK,
) -> Float[Array, "B S N Dv"]:
    """Weight values by the softmax of the scores of the tokens that are seen, block by block.

    Args:
        query: N / J consecutive heads for each key head, rotated by their positions.
        key: rotated by their positions.
        value: values of the same tokens.
        queries: the tokens that attend.
        keys: the tokens attended to.
        rule: mask and scores.
        sink: for each head, the score of a token without a value (GPT-OSS, arXiv 2508.10925).
        largest_block: tokens of a block, at most.
    """
    plan, blocks = plan_blocks(
        query, key, value, queries, keys, rule=rule, largest_block=largest_block
    )
    out = _attend(plan, blocks, start_scores(plan, blocks, sink))
    return joined_heads(out, plan, query.shape[1])


def plan_blocks(
    query: Float[Array, "B S N D"],
    key: Float[Array, "B T J D"],
    value: Float[Array, "B T J Dv"],
    queries: Tokens,
    keys: Tokens,
    *,
    rule: AttentionRule,
    largest_block: int,
) -> tuple[BlockPlan, Blocks]:
    """Split the arrays of a call into blocks, and list the pairs; see `attend`."""
    size, key_size = (
        block_size(x.shape[1], min(largest_block, max(_SMALLEST, x.shape[1] // 2)))
        for x in (query, key)
    )
    sizes = size, key_size
    if not isinstance(queries.order, np.ndarray) and isinstance(keys.order, np.ndarray):
        keys = keys._replace(order=jnp.asarray(keys.order))  # compared when the program runs
    group = query.shape[2] // key.shape[2]
    plan = BlockPlan(rule, list_pairs(queries, keys, sizes, rule=rule), group)
    arrays = Blocks(
        split_heads(query, sizes[0], group),
        split_heads(key, sizes[1], 1),
        split_heads(value, sizes[1], 1),
        split_tokens(queries, sizes[0], NO_QUERY),
        split_tokens(keys, sizes[1], NO_KEY),
    )
    leaves, structure = jax.tree.flatten(arrays)
    blocks: Blocks = jax.tree.unflatten(structure, vary_alike(*leaves))
    return plan, blocks


def split_heads(x: Float[Array, "B S N D"], size: int, group: int) -> Float[Array, "I B J R D"]:
    """Split tokens into blocks, with the heads of a group as rows of one matrix."""
    x = split_blocks(x, size)
    blocks, rows, _, heads, dim = x.shape
    x = x.reshape(blocks, rows, size, heads // group, group, dim).transpose(0, 1, 3, 4, 2, 5)
    return x.reshape(blocks, rows, heads // group, group * size, dim)


def joined_heads(
    x: Float[Array, "I B J R D"], plan: BlockPlan, tokens: int
) -> Float[Array, "B S N D"]:
    """Undo `split_heads`."""
    blocks, rows, kv_heads, _, dim = x.shape
    x = x.reshape(blocks, rows, kv_heads, plan.group, -1, dim).transpose(0, 1, 4, 2, 3, 5)
    return joined_blocks(x.reshape(*x.shape[:3], -1, dim), tokens)


def start_scores(
    plan: BlockPlan, blocks: Blocks, sink: Float[Array, "N"] | None
) -> Float[Array, "J R"] | None:
    """Return the sink of each row of a pair's products; None for no sink."""
    if sink is None:
        return None
    kv_heads, rows = blocks.query.shape[2:4]
    by_row = jnp.repeat(sink.astype(jnp.float32), rows // plan.group).reshape(kv_heads, rows)
    return vary_over(by_row, varying_axes(blocks.query))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    plan: BlockPlan, blocks: Blocks, start: Float[Array, "J R"] | None
) -> Float[Array, "I B J R Dv"]:
    return attend_forward(plan, blocks, start, blocks.value.dtype).out


Residual = tuple[Blocks, Float[Array, "J R"] | None, Attended]


def _forward(
    plan: BlockPlan, blocks: Blocks, start: Float[Array, "J R"] | None
) -> tuple[Float[Array, "I B J R Dv"], Residual]:
    attended = named_context(attend_forward(plan, blocks, start, blocks.value.dtype))
    return attended.out, (blocks, start, attended)


def _backward(
    plan: BlockPlan, residual: Residual, d_out: Float[Array, "I B J R Dv"]
) -> tuple[Blocks, Float[Array, "J R"] | None]:
    blocks, _, attended = residual
    means = weighted_means(attended.out, d_out)
    gradients = attend_backward(plan, blocks, attended.log_sum, means, d_out)
    return cotangents(residual, means, gradients)


_attend.defvjp(_forward, _backward)


def cotangents(
    residual: Residual, means: Float[Array, "I B J R"], gradients: tuple[Float[Array, "..."], ...]
) -> tuple[Blocks, Float[Array, "J R"] | None]:
    """Return the cotangents of blocks and start scores, as `jax.custom_vjp` wants them.

    Args:
        residual: what the forward pass left.
        means: result of `weighted_means`.
        gradients: of queries, keys and values, in float32.
    """
    blocks, start, attended = residual
    d_start = None
    if start is not None:
        # A sink's weight moves weight away from the values, and brings none.
        d_start = -jnp.sum(jnp.exp(start - attended.log_sum) * means, axis=(0, 1))
    given = zip(gradients, blocks[:3], strict=True)
    arrays: list[Any] = [gradient.astype(x.dtype) for gradient, x in given]
    arrays += jax.tree.map(lambda _: None, (blocks.queries, blocks.keys))
    return Blocks(*arrays), d_start


def weighted_means(
    out: Float[Array, "I B J R Dv"], d_out: Float[Array, "I B J R Dv"]
) -> Float[Array, "I B J R"]:
    """Return each query's mean, by attention weight, of the gradients of its weights."""
    return jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)


def attend_forward(
    plan: BlockPlan, blocks: Blocks, start: Float[Array, "J R"] | None, dtype: DTypeLike
) -> Attended:
    """Run the softmax over the blocks of keys, for one block of queries after another.

    Args:
        plan: what is to be computed.
        blocks: arrays that vary alike.
        start: result of `start_scores`.
        dtype: dtype of the output.
    """
    blocks = _tied(blocks)
    query, key, value = blocks[:3]
    of_block = query.shape[1:4]
    if start is None:
        most_before = zeros(of_block, jnp.float32, query) + LOWEST
        sum_before = zeros(of_block, jnp.float32, query)
    else:
        most_before = jnp.broadcast_to(start, of_block)
        sum_before = zeros(of_block, jnp.float32, query) + 1

    def compute(masked: bool, state: Any, i: Int[Array, ""], u: Int[Array, ""]) -> Any:
        most, total, mixed = state
        scores = _scores(plan, query[i], key[u])
        if masked:
            seen = _seen(plan, blocks, i, u)
            scores = jnp.where(seen, scores, LOWEST)
        now = jnp.maximum(most, jnp.max(scores, axis=-1))
        weights = jnp.exp(scores - now[..., None])
        if masked:  # where nothing is seen, the largest score is no score
            weights = jnp.where(seen, weights, 0.0)
        shrink = jnp.exp(most - now)
        more = jnp.einsum(
            "bjrk,bjkd->bjrd",
            weights.astype(value.dtype),
            value[u],
            preferred_element_type=jnp.float32,
        )
        return (
            now,
            total * shrink + jnp.sum(weights, axis=-1),
            mixed * shrink[..., None] + more,
        )

    def step(carry: Any, pair: Any) -> tuple[Any, None]:
        (most, total, mixed), out, log_sum = carry
        i, u, need, first = pair
        state = (
            jnp.where(first, most_before, most),
            jnp.where(first, sum_before, total),
            jnp.where(first, 0.0, mixed),
        )
        state = _where_needed(need, compute, state, i, u)
        most, total, mixed = state
        total = jnp.where(total == 0, 1.0, total)
        update = jax.lax.dynamic_update_index_in_dim
        out = update(out, (mixed / total[..., None]).astype(dtype), i, 0)
        return (state, out, update(log_sum, most + jnp.log(total), i, 0)), None

    out_shape = (*query.shape[:-1], value.shape[-1])
    state = (most_before, sum_before, zeros(out_shape[1:], jnp.float32, query))
    carry = state, zeros(out_shape, dtype, query), zeros(query.shape[:-1], jnp.float32, query)
    (_, out, log_sum), _ = jax.lax.scan(step, carry, _steps(plan, blocks))
    return Attended(out, log_sum)


def attend_backward(
    plan: BlockPlan,
    blocks: Blocks,
    log_sum: Float[Array, "I B J R"],
    means: Float[Array, "I B J R"],
    d_out: Float[Array, "I B J R Dv"],
) -> tuple[Float[Array, "I B J R D"], Float[Array, "U B J K D"], Float[Array, "U B J K Dv"]]:
    """Return the gradients of queries, keys and values in float32, summed block by block.

    Args:
        plan: what was computed.
        blocks: arrays that vary alike.
        log_sum: see `Attended`; of all keys, not only these.
        means: result of `weighted_means`.
        d_out: the gradient of the output.
    """
    blocks = _tied(blocks)
    query, key, value = blocks[:3]

    def compute(masked: bool, state: Any, i: Int[Array, ""], u: Int[Array, ""]) -> Any:
        d_query, d_key, d_value = state
        # Keys are the rows of these matrices, so that two of the three sums need no transposed one.
        product = partial(jnp.einsum, preferred_element_type=jnp.float32)
        scores = _scores(plan, key[u], query[i])
        weights = jnp.exp(scores - log_sum[i][..., None, :])
        if masked:
            weights = jnp.where(_seen(plan, blocks, i, u).swapaxes(-1, -2), weights, 0.0)
        d_value += product("bjkr,bjrd->bjkd", weights.astype(value.dtype), d_out[i])
        d_weights = product("bjkd,bjrd->bjkr", value[u], d_out[i])
        d_scores = weights * (d_weights - means[i][..., None, :]) * plan.rule.scale
        if plan.rule.soft_cap != 0:
            d_scores *= 1 - jnp.square(scores / plan.rule.soft_cap)
        d_scores = d_scores.astype(query.dtype)
        d_query += product("bjkr,bjkd->bjrd", d_scores, key[u])
        d_key += product("bjkr,bjrd->bjkd", d_scores, query[i])
        return d_query, d_key, d_value

    def step(sums: Any, pair: Any) -> tuple[Any, None]:
        i, u, need, _ = pair
        places = i, u, u
        before = tuple(each[at] for each, at in zip(sums, places, strict=True))
        after = _where_needed(need, compute, before, i, u)
        update = jax.lax.dynamic_update_index_in_dim
        return tuple(
            update(each, new, at, 0) for each, new, at in zip(sums, after, places, strict=True)
        ), None

    sums = tuple(zeros(each.shape, jnp.float32, query) for each in (query, key, value))
    # They depend on nothing: made early, they would live while the layer's experts are computed.
    sums = jax.lax.optimization_barrier((*sums, d_out))[:-1]
    (d_query, d_key, d_value), _ = jax.lax.scan(step, sums, _steps(plan, blocks))
    return d_query, d_key, d_value


def _steps(plan: BlockPlan, blocks: Blocks) -> tuple[Any, ...]:
    """Return for each pair its blocks, what it needs, and whether its queries are new."""
    i, u = np.asarray(plan.pairs, np.int32).T
    first = np.append(True, i[1:] != i[:-1])
    return i, u, pair_needs(plan.pairs, blocks.queries, blocks.keys, rule=plan.rule), first


def _tied(blocks: Blocks) -> Blocks:
    """Make the tokens depend on the queries.

    In a scan over layers, what depends on tokens alone is the same in every layer. JAX would move
    it out of that scan: the masks of all pairs of blocks, an array of S x T elements and more.
    """
    query = blocks.query
    *tokens, _ = jax.lax.optimization_barrier(
        (blocks.queries, blocks.keys, query[(0,) * query.ndim])
    )
    return blocks._replace(queries=tokens[0], keys=tokens[1])


def _where_needed(
    need: Int[Array, ""], compute: Any, state: Any, i: Int[Array, ""], u: Int[Array, ""]
) -> Any:
    """Return the state after a pair of blocks, unchanged where the pair needs nothing."""

    def skip(state: Any, _i: Int[Array, ""], _u: Int[Array, ""]) -> Any:
        return state

    branches: dict[int, Callable[..., Any]] = {
        SKIP: skip,
        WHOLE: partial(compute, False),
        PART: partial(compute, True),
    }
    return jax.lax.switch(need, [branches[each] for each in range(3)], state, i, u)


def _seen(
    plan: BlockPlan, blocks: Blocks, i: Int[Array, ""], u: Int[Array, ""]
) -> Bool[Array, "B 1 R K"]:
    """Mask the scores of a pair of blocks."""
    queries, keys = (
        Tokens(tokens.positions[at], tokens.segment_ids[at])
        for tokens, at in ((blocks.queries, i), (blocks.keys, u))
    )
    seen = seen_tokens(queries, keys, rule=plan.rule)
    rows, tokens, others = seen.shape
    by_head = jnp.broadcast_to(seen[:, None, None], (rows, 1, plan.group, tokens, others))
    return by_head.reshape(rows, 1, -1, others)


def _scores(
    plan: BlockPlan, rows: Float[Array, "B J X D"], columns: Float[Array, "B J Y D"]
) -> Float[Array, "B J X Y"]:
    """Return the scores of queries and keys, with either of them as rows."""
    scores = plan.rule.scale * jnp.einsum(
        "bjxd,bjyd->bjxy", rows, columns, preferred_element_type=jnp.float32
    )
    cap = plan.rule.soft_cap
    return scores if cap == 0 else cap * jnp.tanh(scores / cap)
