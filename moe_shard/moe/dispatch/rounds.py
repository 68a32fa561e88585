"""One or more rounds of rows to their experts and back, and the gradient of that.

The first round is plain: JAX differentiates it. Further rounds, which a balanced router never
needs, run in a loop of as many iterations as it takes. Such a loop has no derivative of its own,
so it gets one here: backward, another loop repeats each round and adds up its gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from moe_shard.moe.capacity import Slots
from moe_shard.moe.dispatch.gather import tokens_to_slots
from moe_shard.moe.dispatch.plan import Bound, Counts, further_rounds, kept, plan_round, window
from moe_shard.moe.dispatch.transport import Transport, send, send_back
from moe_shard.moe.placement import EXCHANGED
from moe_shard.moe.weights import ExpertWeights

OVERFLOW = "overflow"
"""Scope of what runs only where a router exceeds the bound of the first round."""

Compute = Callable[[ExpertWeights, Float[Array, "R M"], Int[Array, "L"]], Float[Array, "R M"]]
"""The experts of this device on rows that stand by expert, in groups of the sizes given."""
Chunks = tuple[Float[Array, "..."], ...]
"""An array for each chunk of tokens: [T M] before, [N M] after the experts."""


@dataclass(frozen=True)
class Rounds:
    """How the rows of a chunk of tokens reach their experts.

    Attributes:
        bound: what a round carries.
        first: carries the first round.
        further: carries each further one; None where there is none.
        alignment: of the experts' groups.
        compute: applies the experts.
        drops: what is beyond the first round is dropped, and not the last of it but a share of
            every expert's.
    """

    bound: Bound
    first: Transport
    further: Transport | None
    alignment: int
    compute: Compute
    drops: bool

    def carry(
        self,
        tokens: Chunks,
        weights: ExpertWeights,
        slots: tuple[Slots, ...],
        counts: tuple[Counts, ...],
    ) -> Chunks:
        """The experts' answer to every choice, sorted by expert; zero for one that was dropped.

        Args:
            tokens: chunks, each of which makes its rounds, so that one can be on the wire while
                another is multiplied.
            weights: of this device's experts.
            slots: of each chunk, its choices and their places in the order by expert.
            counts: of each chunk.
        """
        if self.further is None:
            return self.first_rounds(tokens, weights, slots, counts)
        return _with_further(self, tokens, weights, slots, counts)

    def first_rounds(
        self,
        tokens: Chunks,
        weights: ExpertWeights,
        slots: tuple[Slots, ...],
        counts: tuple[Counts, ...],
    ) -> Chunks:
        """The first round of every chunk."""
        return tuple(
            self.one_round(self.first, chunk, weights, slots[i], counts[i], 0)
            for i, chunk in enumerate(tokens)
        )

    def one_round(
        self,
        transport: Transport,
        tokens: Float[Array, "T M"],
        weights: ExpertWeights,
        slots: Slots,
        counts: Counts,
        index: Int[Array, ""] | int,
    ) -> Float[Array, "N M"]:
        """Round `index` of one chunk; zero where a choice travels in another round."""
        with jax.named_scope("dispatch"):
            size, carried = (
                (kept(counts, self.bound), 0) if self.drops else window(counts, self.bound, index)
            )
            plan = plan_round(counts, size, carried, alignment=self.alignment)
            rows = tokens_to_slots(tokens[None], slots)[0]
            rows = checkpoint_name(send(transport, rows, plan), EXCHANGED)
        with jax.named_scope("experts"):
            me = jax.lax.axis_index(transport.axes)
            rows = self.compute(weights, rows, plan.group_sizes[me])
        with jax.named_scope("combine"):
            return checkpoint_name(send_back(transport, rows, plan), EXCHANGED)

    def rounds_left(self, counts: Counts) -> Int[Array, ""]:
        """Rounds of a chunk after its first."""
        return further_rounds(counts, self.bound)


Residuals = tuple[Any, Chunks, ExpertWeights, tuple[Slots, ...], tuple[Counts, ...]]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_further(
    rounds: Rounds,
    tokens: Chunks,
    weights: ExpertWeights,
    slots: tuple[Slots, ...],
    counts: tuple[Counts, ...],
) -> Chunks:
    returned = rounds.first_rounds(tokens, weights, slots, counts)
    return _further(rounds, returned, tokens, weights, slots, counts)


def _further(
    rounds: Rounds,
    returned: Chunks,
    tokens: Chunks,
    weights: ExpertWeights,
    slots: tuple[Slots, ...],
    counts: tuple[Counts, ...],
) -> Chunks:
    assert rounds.further is not None

    def chunk_of(i: int, returned: Float[Array, "N M"]) -> Float[Array, "N M"]:
        def body(index: Int[Array, ""], returned: Float[Array, "N M"]) -> Float[Array, "N M"]:
            return returned + rounds.one_round(
                rounds.further, tokens[i], weights, slots[i], counts[i], index
            )

        with jax.named_scope(OVERFLOW):
            last = rounds.rounds_left(counts[i])
            return jax.lax.fori_loop(1, last + 1, body, returned)

    return tuple(chunk_of(i, each) for i, each in enumerate(returned))


def _with_further_fwd(
    rounds: Rounds,
    tokens: Chunks,
    weights: ExpertWeights,
    slots: tuple[Slots, ...],
    counts: tuple[Counts, ...],
) -> tuple[Chunks, Residuals]:
    def first(tokens: Chunks, weights: ExpertWeights) -> Chunks:
        return rounds.first_rounds(tokens, weights, slots, counts)

    returned, pullback = jax.vjp(first, tokens, weights)
    returned = _further(rounds, returned, tokens, weights, slots, counts)
    return returned, (pullback, tokens, weights, slots, counts)


def _with_further_bwd(
    rounds: Rounds, residuals: Residuals, gradient: Chunks
) -> tuple[Chunks, ExpertWeights, None, None]:
    pullback, tokens, weights, slots, counts = residuals
    by_tokens, by_weights = pullback(gradient)
    sums = []
    for i, (chunk, by_chunk) in enumerate(zip(tokens, by_tokens, strict=True)):

        def body(
            index: Int[Array, ""],
            sums: tuple[Float[Array, "T M"], ExpertWeights],
            i: int = i,
            chunk: Float[Array, "T M"] = chunk,
        ) -> tuple[Float[Array, "T M"], ExpertWeights]:
            def again(chunk: Float[Array, "T M"], weights: ExpertWeights) -> Float[Array, "N M"]:
                assert rounds.further is not None
                return rounds.one_round(rounds.further, chunk, weights, slots[i], counts[i], index)

            _, pullback = jax.vjp(again, chunk, weights)
            return jax.tree.map(jnp.add, sums, pullback(gradient[i]))

        with jax.named_scope(OVERFLOW):
            last = rounds.rounds_left(counts[i])
            by_chunk, by_weights = jax.lax.fori_loop(1, last + 1, body, (by_chunk, by_weights))
        sums.append(by_chunk)
    return tuple(sums), by_weights, None, None


_with_further.defvjp(_with_further_fwd, _with_further_bwd)
