"""One or more rounds of rows to their experts and back, and the gradient of that.

The first round is plain: JAX differentiates it. Further rounds, which a balanced router never
needs, run in a loop of as many iterations as it takes. Such a loop has no derivative of its own,
so it gets one here: backward, another loop repeats each round and adds up its gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from moe_shard.moe.capacity import Slots
from moe_shard.moe.dispatch.gather import slots_to_tokens, tokens_to_slots
from moe_shard.moe.dispatch.plan import Counts, kept, plan_round, take
from moe_shard.moe.dispatch.transport import Transport, send, send_back
from moe_shard.moe.placement import EXCHANGED
from moe_shard.moe.weights import ExpertWeights
from moe_shard.scopes import FURTHER_ROUNDS
from moe_shard.sharding.varying import vary_alike

Compute = Callable[[ExpertWeights, Float[Array, "R M"], Int[Array, "L"]], Float[Array, "R M"]]
"""The experts of this device on rows that stand by expert, in groups of the sizes given."""


class Routes(NamedTuple):
    """Where the choices of a chunk go.

    Attributes:
        slots: what is sent and its rows in the order by expert, each pointing at the other.
        answers: the same of choices and the rows that answer them.
        counts: what every device of the group sends to every expert.
    """

    slots: Slots
    answers: Slots
    counts: Counts


def nothing(routes: Routes) -> Counts:
    """What was carried before the first round."""
    return jnp.zeros_like(routes.counts)


Chunks = tuple[Float[Array, "..."], ...]
"""An array for each chunk of tokens: [T M] before, [N M] after the experts."""
ChunkChoices = tuple[Int[Array, "T K"], ...]
"""Each chunk's tokens' experts."""
ChunkRoutes = tuple[Routes, ...]


@dataclass(frozen=True)
class Rounds:
    """How the rows of a chunk of tokens reach their experts.

    Attributes:
        first: carries the first round.
        further: carries each further one; None where there is none.
        alignment: of the experts' groups.
        compute: applies the experts.
        drops: what is beyond the first round is dropped, and not the last of it but a share of
            every expert's.
    """

    first: Transport
    further: Transport | None
    alignment: int
    compute: Compute
    drops: bool

    def carry(
        self, tokens: Chunks, weights: ExpertWeights, routes: ChunkRoutes, shares: Chunks
    ) -> Chunks:
        """The weighted sum of the experts' answers to each token's choices [T M].

        A choice that is dropped adds nothing.

        Args:
            tokens: chunks, each of which makes its rounds, so that one can be on the wire while
                another is multiplied.
            weights: of this device's experts.
            routes: of each chunk.
            shares: [T K] of each choice in its token's sum.
        """
        if self.further is not None:
            return _all_rounds(self, tokens, weights, routes, shares)
        answers = self.first_rounds(tokens, weights, routes)
        return _sums(_named(answers), shares, routes)

    def first_rounds(self, tokens: Chunks, weights: ExpertWeights, routes: ChunkRoutes) -> Chunks:
        """The first round of every chunk."""
        return tuple(
            self._round(self.first, chunk, weights, way, self.first_take(way), nothing(way))
            for chunk, way in zip(tokens, routes, strict=True)
        )

    def first_take(self, routes: Routes) -> Counts:
        """What the first round of a chunk carries."""
        choose = kept if self.drops else take
        return choose(routes.counts, self.first.bound)

    def further_round(
        self,
        tokens: Float[Array, "T M"],
        weights: ExpertWeights,
        routes: Routes,
        size: Counts,
        carried: Counts,
    ) -> Float[Array, "N M"]:
        """A round of one chunk after its first."""
        assert self.further is not None
        # As if they changed from round to round: else a compiler takes what it makes of them alone,
        # such as a transposed copy of the weights, out of the loop, where it is made every time.
        tokens, weights, size = jax.lax.optimization_barrier((tokens, weights, size))
        return self._round(self.further, tokens, weights, routes, size, carried)

    def _round(
        self,
        transport: Transport,
        tokens: Float[Array, "T M"],
        weights: ExpertWeights,
        routes: Routes,
        size: Counts,
        carried: Counts,
    ) -> Float[Array, "N M"]:
        """The answers of one round; zero where a choice travels in another."""
        with jax.named_scope("dispatch"):
            plan = plan_round(routes.counts, size, carried, alignment=self.alignment)
            rows = tokens_to_slots(tokens[None], routes.slots)[0]
            rows = checkpoint_name(send(transport, rows, plan), EXCHANGED)
        with jax.named_scope("experts"):
            me = jax.lax.axis_index(transport.axes)
            rows = self.compute(weights, rows, plan.group_sizes[me])
        with jax.named_scope("combine"):
            return send_back(transport, rows, plan)


def combined(
    rows: Float[Array, "N m"], shares: Float[Array, "T K"], slots: Slots
) -> Float[Array, "T m"]:
    """The weighted sum of each token's answers, over k in order."""
    rows, shares = vary_alike(rows, shares)
    return slots_to_tokens(rows[None], shares[None], slots)[0]


def _sums(answers: Chunks, shares: Chunks, routes: ChunkRoutes) -> Chunks:
    with jax.named_scope("combine"):
        each = zip(answers, shares, routes, strict=True)
        return tuple(combined(rows, share, way.answers) for rows, share, way in each)


def _named(answers: Chunks) -> Chunks:
    """Named once all rounds are in: recomputation then repeats none of them."""
    return tuple(checkpoint_name(each, EXCHANGED) for each in answers)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _all_rounds(
    rounds: Rounds, tokens: Chunks, weights: ExpertWeights, routes: ChunkRoutes, shares: Chunks
) -> Chunks:
    answers = rounds.first_rounds(tokens, weights, routes)
    return _sums(_further_rounds(rounds, answers, tokens, weights, routes), shares, routes)


def _further_rounds(
    rounds: Rounds, answers: Chunks, tokens: Chunks, weights: ExpertWeights, routes: ChunkRoutes
) -> Chunks:
    """The answers of the first rounds, completed; every choice is answered in one round."""

    def complete(
        answers: Float[Array, "N M"], tokens: Float[Array, "T M"], way: Routes
    ) -> Float[Array, "N M"]:
        def add(size: Counts, carried: Counts, answers: Float[Array, "N M"]) -> Array:
            return answers + rounds.further_round(tokens, weights, way, size, carried)

        return _loop(rounds, way, add, answers)

    return tuple(map(complete, answers, tokens, routes))


def _loop(
    rounds: Rounds, way: Routes, body: Callable[[Counts, Counts, Any], Any], first: Any
) -> Any:
    """A loop over the further rounds of a chunk; the devices of a group run equally many.

    Args:
        rounds: how.
        way: of the chunk.
        body: what a round carries, what those before it have carried, and a state; the next state.
        first: the state after the first round.
    """
    assert rounds.further is not None
    bound = rounds.further.bound

    def again(state: tuple[Counts, Any]) -> tuple[Counts, Any]:
        carried, inner = state
        size = take(way.counts - carried, bound)
        return carried + size, body(size, carried, inner)

    def some_left(state: tuple[Counts, Any]) -> Bool[Array, ""]:
        return jnp.any(state[0] < way.counts)

    with jax.named_scope(FURTHER_ROUNDS):
        return jax.lax.while_loop(some_left, again, (rounds.first_take(way), first))[1]


class _Kept(NamedTuple):
    """What the gradient needs of a forward pass."""

    pullback: Callable[[Chunks], tuple[Chunks, ExpertWeights]]
    answers: Chunks
    tokens: Chunks
    weights: ExpertWeights
    routes: ChunkRoutes
    shares: Chunks


def _all_rounds_fwd(
    rounds: Rounds, tokens: Chunks, weights: ExpertWeights, routes: ChunkRoutes, shares: Chunks
) -> tuple[Chunks, _Kept]:
    answers, pullback = jax.vjp(
        lambda tokens, weights: rounds.first_rounds(tokens, weights, routes), tokens, weights
    )
    answers = _named(_further_rounds(rounds, answers, tokens, weights, routes))
    kept = _Kept(pullback, answers, tokens, weights, routes, shares)
    return _sums(answers, shares, routes), kept


def _all_rounds_bwd(
    rounds: Rounds, kept: _Kept, gradients: Chunks
) -> tuple[Chunks, ExpertWeights, None, Chunks]:
    _, pullback = jax.vjp(
        lambda answers, shares: _sums(answers, shares, kept.routes), kept.answers, kept.shares
    )
    by_answers, by_shares = pullback(gradients)
    by_tokens, by_weights = kept.pullback(by_answers)
    sums = []
    each = zip(kept.tokens, kept.routes, kept.shares, gradients, by_tokens, strict=True)
    for chunk, way, share, gradient, by_chunk in each:

        def add(
            size: Counts,
            carried: Counts,
            sums: tuple[Float[Array, "T M"], ExpertWeights],
            chunk: Float[Array, "T M"] = chunk,
            way: Routes = way,
            share: Float[Array, "T K"] = share,
            gradient: Float[Array, "T M"] = gradient,
        ) -> tuple[Float[Array, "T M"], ExpertWeights]:
            # Of tokens, and made those of their K rows each in the loop alone: the rows' would be
            # held for a loop that seldom runs.
            gradient, size = jax.lax.optimization_barrier((gradient, size))

            def summed(chunk: Float[Array, "T M"], weights: ExpertWeights) -> Chunks:
                rows = rounds.further_round(chunk, weights, way, size, carried)
                return _sums((rows,), (share,), (way,))

            _, pullback = jax.vjp(summed, chunk, kept.weights)
            return jax.tree.map(jnp.add, sums, pullback((gradient,)))

        by_chunk, by_weights = _loop(rounds, way, add, (by_chunk, by_weights))
        sums.append(by_chunk)
    return tuple(sums), by_weights, None, by_shares


_all_rounds.defvjp(_all_rounds_fwd, _all_rounds_bwd)
