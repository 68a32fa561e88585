"""Define the interface of a dispatch strategy, and make the one that a config names.

A strategy is one file in `moe_shard.moe.dispatch`, or one of your own: a class registered with
`moe_shard.config.strategies.register_strategy`, whose instances are called as `Strategy` says.
"""

from __future__ import annotations

from typing import Any, NoReturn, Protocol, cast

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moe_shard.config.moe_config import MoEConfig
from moe_shard.config.strategies import find_strategy
from moe_shard.errors import UserError
from moe_shard.moe.experts import Experts
from moe_shard.moe.placement import Placement
from moe_shard.moe.record import MoERecord
from moe_shard.moe.router import Routing
from moe_shard.sharding.annotate import Sharding


class Strategy(Protocol):
    """Bring tokens to their experts and the expert outputs back."""

    def __call__(
        self, x: Float[Array, "B S M"], routing: Routing, experts: Experts
    ) -> tuple[Float[Array, "B S M"], Int[Array, "B"]]:
        """Apply the chosen experts to every token.

        Args:
            x: tokens.
            routing: the router's decision.
            experts: their parameters.

        Returns:
            The weighted sum over each token's experts, summed over k in order and in float32,
            in `x`'s dtype, or in the wider one of `x` and the experts' products where these
            differ; and how many choices of each sequence were dropped, zeros if none can be.
        """
        ...

    def record(self, tokens: tuple[int, ...], dtype: DTypeLike) -> MoERecord:
        """Return how a call with such tokens runs, and why not otherwise; nothing is traced.

        Args:
            tokens: [B S M], the shape of what is dispatched, on all devices together.
            dtype: dtype of the experts' products.
        """
        ...


def make_strategy(config: MoEConfig, placement: Placement) -> Strategy:
    """Make the strategy that `moe_dispatch` names.

    Args:
        config: the layer's configuration.
        placement: the placement of the layer's arrays.

    Raises:
        UserError: no strategy of that name is registered, it cannot run on these devices, or what
            was made has not the methods of one.
    """
    made = find_strategy(config.moe_dispatch).make(config, placement)
    missing = [each for each in ("__call__", "record") if not callable(getattr(made, each, None))]
    if missing:
        raise UserError(
            f"moe_dispatch={config.moe_dispatch}: {type(made).__name__} has no "
            f"{' and no '.join(missing)}\n"
            "fix: both methods of moe_shard.moe.strategy.Strategy, or ByCapacity as the base class"
        )
    return cast(Strategy, made)


def checked_results(
    found: Any, x: Float[Array, "B S M"], dtype: DTypeLike, *, name: str
) -> tuple[Float[Array, "B S M"], Int[Array, "B"]]:
    """Check the shapes and dtypes of what a strategy returned; adds no operation.

    The strategy is called by the layer and not here, where it would be a call further away.

    Args:
        found: what the strategy returned.
        x: the tokens that it was given.
        dtype: of the experts' products.
        name: the strategy's, for messages.

    Raises:
        UserError: it is something else than `Strategy` says.
    """
    if not isinstance(found, tuple) or len(found) != 2:
        one = "one array" if hasattr(found, "shape") else f"a {type(found).__name__}"
        _refuse(name, one, "a tuple of output and dropped choices")
    y, dropped = found
    wider = jnp.result_type(x.dtype, dtype)
    if getattr(y, "shape", None) != x.shape or y.dtype not in (x.dtype, wider):
        _refuse(name, f"an output {_kind(y)}", f"{_kind(x)}, as its input")
    is_count = jnp.issubdtype(getattr(dropped, "dtype", jnp.float32), jnp.integer)
    if not is_count or dropped.shape != x.shape[:1]:
        wanted = f"{[x.shape[0]]} int32: a number for each sequence, zeros if none can be dropped"
        _refuse(name, f"dropped choices {_kind(dropped)}", wanted)
    return y, dropped


def _refuse(name: str, returned: str, wanted: str) -> NoReturn:
    raise UserError(f"moe_dispatch={name} returned {returned}\nfix: {wanted}")


def _kind(array: Any) -> str:
    """Return the shape and dtype of an array in words, or what it is instead."""
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        return f"of type {type(array).__name__}"
    return f"{[*array.shape]} {array.dtype}"


def moe_record(
    config: MoEConfig, sharding: Sharding, tokens: tuple[int, ...], dtype: DTypeLike
) -> MoERecord:
    """Return how a layer runs, from configuration, mesh, rules and shapes; nothing is traced.

    Args:
        config: the layer's configuration.
        sharding: the mesh and its rules.
        tokens: [B S M], the shape of the layer's input on all devices together.
        dtype: dtype of the experts' products.

    Raises:
        UserError: as the layer's call.
    """
    placement = Placement(sharding, no_expert_sharding=config.moe_dispatch_no_expert_sharding)
    return make_strategy(config, placement).record(config.dispatched(tokens), dtype)
