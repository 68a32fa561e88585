"""Attend round a ring of devices: queries stay, keys and values visit one device after another.

Each device holds a part of every sequence (Ring Attention, arXiv 2310.01889). It attends from its
queries to the part of keys and values that is with it, passes that part on, and merges the results
by their logsumexps. Backward, each part travels with its gradient and comes home with the sum. No
device holds the keys and values of whole sequences, as it does where they are gathered.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_shard.layers.kernels.block_pairs import SKIP, BlockTokens, pair_needs
from moe_shard.layers.kernels.blockwise import (
    LOWEST,
    Attended,
    BlockPlan,
    Blocks,
    Residual,
    attend_backward,
    attend_forward,
    cotangents,
    joined_heads,
    plan_blocks,
    start_scores,
    weighted_means,
)
from moe_shard.layers.kernels.rule import (
    AttentionRule,
    Tokens,
    named_context,
)
from moe_shard.sharding.varying import vary_alike, vary_over, zeros


@dataclass(frozen=True)
class _Ring:
    """Hold what is known of a call when it is traced.

    Attributes:
        plan: of the queries of a device and one part of the keys.
        axes: mesh axes of the ring.
        size: devices of the ring.
    """

    plan: BlockPlan
    axes: tuple[str, ...]
    size: int


class _Part(NamedTuple):
    """Hold what travels: keys, values and their tokens."""

    key: Float[Array, "U B J K D"]
    value: Float[Array, "U B J K Dv"]
    keys: BlockTokens


def ring_attend(
    query: Float[Array, "B S N D"],
    key: Float[Array, "B S J D"],
    value: Float[Array, "B S J Dv"],
    queries: Tokens,
    keys: Tokens,
    *,
    rule: AttentionRule,
    sink: Float[Array, "N"] | None,
    axes: tuple[str, ...],
    size: int,
    largest_block: int,
) -> Float[Array, "B S N Dv"]:
    """Attend from this device's tokens to those of all devices of a ring, inside `jax.shard_map`.

    Args:
        query: this device's.
        key: this device's.
        value: this device's.
        queries: the tokens of this device.
        keys: the same tokens.
        rule: mask and scores.
        sink: see `blockwise.attend`.
        axes: the mesh axes over which the tokens of a sequence are split.
        size: devices along these axes.
        largest_block: see `blockwise.attend`.
    """
    plan, blocks = plan_blocks(
        query, key, value, queries, keys, rule=rule, largest_block=largest_block
    )
    leaves, structure = jax.tree.flatten(blocks)
    blocks = jax.tree.unflatten(structure, [vary_over(leaf, axes) for leaf in leaves])
    out = _attend(_Ring(plan, axes, size), blocks, start_scores(plan, blocks, sink))
    return joined_heads(out, plan, query.shape[1])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    ring: _Ring, blocks: Blocks, start: Float[Array, "J R"] | None
) -> Float[Array, "I B J R Dv"]:
    return _forward(ring, blocks, start)[0]


def _forward(
    ring: _Ring, blocks: Blocks, start: Float[Array, "J R"] | None
) -> tuple[Float[Array, "I B J R Dv"], Residual]:
    def visit(before: Attended, part: _Part) -> Attended:
        def attend() -> Attended:
            held = blocks._replace(**part._asdict())
            return _merged(before, attend_forward(ring.plan, held, None, jnp.float32))

        return _unless_idle(ring, blocks, part, attend, before)

    def step(carry: tuple[Attended, _Part], _: None) -> tuple[tuple[Attended, _Part], None]:
        before, part = carry
        return (visit(before, part), _passed_on(ring, part)), None

    carry = _nothing(blocks, start), _Part(blocks.key, blocks.value, blocks.keys)
    (attended, part), _ = jax.lax.scan(step, carry, length=ring.size - 1)
    attended = visit(attended, part)
    attended = named_context(attended._replace(out=attended.out.astype(blocks.value.dtype)))
    return attended.out, (blocks, start, attended)


def _backward(
    ring: _Ring, residual: Residual, d_out: Float[Array, "I B J R Dv"]
) -> tuple[Blocks, Float[Array, "J R"] | None]:
    blocks, _, attended = residual
    means = weighted_means(attended.out, d_out)

    def visit(
        d_query: Float[Array, "I B J R D"], part: _Part, d_part: tuple[Float[Array, "..."], ...]
    ) -> Any:
        def attend() -> Any:
            held = blocks._replace(**part._asdict())
            found = attend_backward(ring.plan, held, attended.log_sum, means, d_out)
            return jax.tree.map(jnp.add, (d_query, d_part), (found[0], found[1:]))

        return _unless_idle(ring, blocks, part, attend, (d_query, d_part))

    def step(carry: Any, _: None) -> tuple[Any, None]:
        d_query, part, d_part = carry
        d_query, d_part = visit(d_query, part, d_part)
        return (d_query, *_passed_on(ring, (part, d_part))), None

    part = _Part(blocks.key, blocks.value, blocks.keys)
    none = [zeros(x.shape, jnp.float32, x) for x in (blocks.query, *part[:2])]
    carry, _ = jax.lax.scan(step, (none[0], part, tuple(none[1:])), length=ring.size - 1)
    d_query, part, d_part = carry
    d_query, d_part = visit(d_query, part, d_part)
    d_key, d_value = _passed_on(ring, d_part)  # home
    return cotangents(residual, means, (d_query, d_key, d_value))


_attend.defvjp(_forward, _backward)


def _passed_on(ring: _Ring, arrays: Any) -> Any:
    """Give arrays to the next device of the ring, and take those of the one before."""
    to_next = [(device, (device + 1) % ring.size) for device in range(ring.size)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, ring.axes, to_next), arrays)


def _unless_idle(ring: _Ring, blocks: Blocks, part: _Part, attend: Any, before: Any) -> Any:
    """Return `attend()`, or what was before where no query sees any key of this part."""
    needs = pair_needs(ring.plan.pairs, blocks.queries, part.keys, rule=ring.plan.rule)
    return jax.lax.cond(jnp.any(needs != SKIP), attend, lambda: before)


def _nothing(blocks: Blocks, start: Float[Array, "J R"] | None) -> Attended:
    """Return the result of attending to no key yet, only to the sink."""
    query, value = blocks.query, blocks.value
    out = zeros((*query.shape[:-1], value.shape[-1]), jnp.float32, query)
    if start is None:
        return Attended(out, zeros(query.shape[:-1], jnp.float32, query) + LOWEST)
    return Attended(out, vary_alike(jnp.broadcast_to(start, query.shape[:-1]), query)[0])


def _merged(first: Attended, second: Attended) -> Attended:
    """Merge attention to two sets of keys, each weighted by its sum of exponentials."""
    log_sum = jnp.logaddexp(first.log_sum, second.log_sum)
    of_first, of_second = (
        each.out * jnp.exp(each.log_sum - log_sum)[..., None] for each in (first, second)
    )
    return Attended(of_first + of_second, log_sum)
