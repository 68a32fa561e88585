"""Complete an exchange whose first round does not hold every token copy, with its gradient.

The first round is plain: JAX differentiates it. Further rounds, which a balanced router never
needs, run in a loop of as many iterations as it takes. JAX cannot differentiate such a loop, so its
derivative is written here: backward, another loop repeats each round and adds up its gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from moe_shard.moe.exchange.ragged_plan import RoundSizes
from moe_shard.moe.exchange.segments import Counts, clip_to_round
from moe_shard.moe.placement import EXCHANGED
from moe_shard.moe.slot_gathers import slots_to_tokens
from moe_shard.moe.slots import Slots
from moe_shard.moe.weights import ExpertWeights
from moe_shard.scopes import FURTHER_ROUNDS
from moe_shard.sharding.varying import vary_alike


class ChunkRouting(NamedTuple):
    """Describe where the choices of a chunk of tokens go.

    Attributes:
        sent_slots: what is sent and its places in the order by expert, each pointing at the other.
        output_slots: choices and their expert outputs, each pointing at the other.
        counts: how much every device of the group sends to every expert.
    """

    sent_slots: Slots
    output_slots: Slots
    counts: Counts


Chunks = tuple[Float[Array, "..."], ...]
"""An array for each chunk of tokens: [T M] before, [N M] after the experts."""
ChunkChoices = tuple[Int[Array, "T K"], ...]
"""The experts that each chunk's tokens chose."""
ChunkRoutings = tuple[ChunkRouting, ...]


class OneRound(Protocol):
    """Dispatch, apply the experts and combine, for one round of one chunk."""

    def __call__(
        self,
        sizes: RoundSizes,
        tokens: Float[Array, "T M"],
        weights: ExpertWeights,
        routing: ChunkRouting,
        size: Counts,
        sent_before: Counts,
    ) -> Float[Array, "N M"]:
        """Return the expert outputs of the copies that this round sends, zero for all others."""
        ...


@dataclass(frozen=True, eq=False)
class Rounds:
    """Describe in which rounds the token copies of a chunk reach their experts.

    Attributes:
        first: sizes of the first round.
        further: sizes of each further round.
        one_round: makes a round.
    """

    first: RoundSizes
    further: RoundSizes
    one_round: OneRound

    def further_round(
        self,
        tokens: Float[Array, "T M"],
        weights: ExpertWeights,
        routing: ChunkRouting,
        size: Counts,
        sent_before: Counts,
    ) -> Float[Array, "N M"]:
        """Make a round of one chunk after its first."""
        # Made to look different in each round: else the compiler moves what is computed from them
        # alone, such as a transposed copy of the weights, out of the loop, where it always runs.
        tokens, weights, size = jax.lax.optimization_barrier((tokens, weights, size))
        return self.one_round(self.further, tokens, weights, routing, size, sent_before)


def combine(
    outputs: Float[Array, "N m"], combine_weights: Float[Array, "T K"], slots: Slots
) -> Float[Array, "T m"]:
    """Sum each token's expert outputs, weighted, over k in order."""
    outputs, combine_weights = vary_alike(outputs, combine_weights)
    return slots_to_tokens(outputs[None], combine_weights[None], slots)[0]


def combine_chunks(outputs: Chunks, combine_weights: Chunks, routings: ChunkRoutings) -> Chunks:
    """Combine each chunk's expert outputs."""
    with jax.named_scope("combine"):
        each = zip(outputs, combine_weights, routings, strict=True)
        return tuple(combine(out, scale, routing.output_slots) for out, scale, routing in each)


def name_exchanged(outputs: Chunks) -> Chunks:
    """Name the expert outputs once all rounds are done, so that recomputation repeats none."""
    return tuple(checkpoint_name(each, EXCHANGED) for each in outputs)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def all_rounds(
    rounds: Rounds,
    tokens: Chunks,
    weights: ExpertWeights,
    routings: ChunkRoutings,
    combine_weights: Chunks,
) -> Chunks:
    """Return each token's weighted sum of expert outputs [T M], whatever the number of rounds.

    Args:
        rounds: the rounds to make.
        tokens: the chunks, each with rounds of its own, so that one's exchange is overlapped with
            another's products.
        weights: weights of this device's experts.
        routings: the routing of each chunk.
        combine_weights: [T K], the weight of each choice in its token's sum.
    """
    outputs = []
    for chunk, routing in zip(tokens, routings, strict=True):
        size, sent_before = _first_size(rounds, routing), jnp.zeros_like(routing.counts)
        outputs.append(rounds.one_round(rounds.first, chunk, weights, routing, size, sent_before))
    completed = _add_further_rounds(rounds, tuple(outputs), tokens, weights, routings)
    return combine_chunks(completed, combine_weights, routings)


def _first_size(rounds: Rounds, routing: ChunkRouting) -> Counts:
    return clip_to_round(routing.counts, rounds.first.limit)


def _add_further_rounds(
    rounds: Rounds,
    outputs: Chunks,
    tokens: Chunks,
    weights: ExpertWeights,
    routings: ChunkRoutings,
) -> Chunks:
    """Complete the expert outputs of the first rounds; every choice is in exactly one round."""

    def complete(
        outputs: Float[Array, "N M"], tokens: Float[Array, "T M"], routing: ChunkRouting
    ) -> Float[Array, "N M"]:
        def add(size: Counts, sent_before: Counts, outputs: Float[Array, "N M"]) -> Array:
            return outputs + rounds.further_round(tokens, weights, routing, size, sent_before)

        return _loop(rounds, routing, add, outputs)

    return tuple(map(complete, outputs, tokens, routings))


def _loop(
    rounds: Rounds, routing: ChunkRouting, body: Callable[[Counts, Counts, Any], Any], first: Any
) -> Any:
    """Loop over the further rounds of a chunk, equally many on all devices of a group.

    Args:
        rounds: the rounds to make.
        routing: the routing of the chunk.
        body: computes the next state from what a round sends, what the rounds before it have sent,
            and a state.
        first: the state after the first round.
    """

    def step(state: tuple[Counts, Any]) -> tuple[Counts, Any]:
        sent_before, inner = state
        size = clip_to_round(routing.counts - sent_before, rounds.further.limit)
        return sent_before + size, body(size, sent_before, inner)

    def some_left(state: tuple[Counts, Any]) -> Bool[Array, ""]:
        return jnp.any(state[0] < routing.counts)

    with jax.named_scope(FURTHER_ROUNDS):
        return jax.lax.while_loop(some_left, step, (_first_size(rounds, routing), first))[1]


class _Residuals(NamedTuple):
    """Hold what the gradient needs from the forward pass."""

    pullback: Callable[[Chunks], tuple[Chunks, ExpertWeights]]
    outputs: Chunks
    tokens: Chunks
    weights: ExpertWeights
    routings: ChunkRoutings
    combine_weights: Chunks


def _all_rounds_fwd(
    rounds: Rounds,
    tokens: Chunks,
    weights: ExpertWeights,
    routings: ChunkRoutings,
    combine_weights: Chunks,
) -> tuple[Chunks, _Residuals]:
    def first_rounds(tokens: Chunks, weights: ExpertWeights) -> Chunks:
        outputs = []
        for chunk, routing in zip(tokens, routings, strict=True):
            size, sent_before = _first_size(rounds, routing), jnp.zeros_like(routing.counts)
            outputs.append(
                rounds.one_round(rounds.first, chunk, weights, routing, size, sent_before)
            )
        return tuple(outputs)

    outputs, pullback = jax.vjp(first_rounds, tokens, weights)
    outputs = name_exchanged(_add_further_rounds(rounds, outputs, tokens, weights, routings))
    residuals = _Residuals(pullback, outputs, tokens, weights, routings, combine_weights)
    return combine_chunks(outputs, combine_weights, routings), residuals


def _all_rounds_bwd(
    rounds: Rounds, saved: _Residuals, gradients: Chunks
) -> tuple[Chunks, ExpertWeights, None, Chunks]:
    _, pullback = jax.vjp(
        lambda outputs, scales: combine_chunks(outputs, scales, saved.routings),
        saved.outputs,
        saved.combine_weights,
    )
    by_outputs, by_combine_weights = pullback(gradients)
    by_tokens, by_weights = saved.pullback(by_outputs)
    sums = []
    each = zip(
        saved.tokens, saved.routings, saved.combine_weights, gradients, by_tokens, strict=True
    )
    for chunk, routing, scale, gradient, by_chunk in each:

        def add(
            size: Counts,
            sent_before: Counts,
            sums: tuple[Float[Array, "T M"], ExpertWeights],
            chunk: Float[Array, "T M"] = chunk,
            routing: ChunkRouting = routing,
            scale: Float[Array, "T K"] = scale,
            gradient: Float[Array, "T M"] = gradient,
        ) -> tuple[Float[Array, "T M"], ExpertWeights]:
            # Expand the [T, M] cotangent inside the loop, so that the [T*K, M] array is not kept
            # alive for a loop that rarely runs.
            gradient, size = jax.lax.optimization_barrier((gradient, size))

            def combined(chunk: Float[Array, "T M"], weights: ExpertWeights) -> Chunks:
                outputs = rounds.further_round(chunk, weights, routing, size, sent_before)
                return combine_chunks((outputs,), (scale,), (routing,))

            _, pullback = jax.vjp(combined, chunk, saved.weights)
            return jax.tree.map(jnp.add, sums, pullback((gradient,)))

        by_chunk, by_weights = _loop(rounds, routing, add, (by_chunk, by_weights))
        sums.append(by_chunk)
    return tuple(sums), by_weights, None, by_combine_weights


all_rounds.defvjp(_all_rounds_fwd, _all_rounds_bwd)
