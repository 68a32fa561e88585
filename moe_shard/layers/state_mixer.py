"""Share what every mixer has that passes something from a token to the next ones of its text."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import jax
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moe_shard.layers.cache import LayerCache, Memory
from moe_shard.layers.heads import WHOLE_DIM, param_in_use
from moe_shard.sharding.annotate import Sharding
from moe_shard.sharding.rules import LogicalAxes


class StateMixer(nnx.Module):
    """Mix tokens in the order of the text; subclasses make the weights and pass the state.

    Args:
        dtype: dtype of the products.
        sharding: the mesh and its rules.
    """

    words: ClassVar[str]
    """What reports call its arrays."""

    def __init__(self, *, dtype: DTypeLike, sharding: Sharding) -> None:
        self.dtype, self.sharding = dtype, sharding

    def __call__(
        self,
        x: Float[Array, "B S M"],
        positions: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"],
        memory: Memory | None = None,
        order: Int[np.ndarray, "S"] | None = None,
    ) -> tuple[Float[Array, "B S M"], LayerCache]:
        """Mix the tokens of each document.

        Args:
            x: normalised activations.
            positions: not read: tokens stand in the order of the text.
            segment_ids: equal for tokens of one document, which stand together.
            memory: cache of earlier calls during generation; None in training.
            order: None: tokens have to be in the order of the text.

        Returns:
            The output, to be added to the residual stream, and the cache after these tokens (empty
            without a memory).
        """
        del positions
        assert order is None, "what a token leaves is for the next one of the text"
        with jax.named_scope("token_mixer"):
            # For all projections and their gradients at once: XLA would gather it for either.
            x = self.sharding(x, *WHOLE_DIM, name=f"{self.words} input")
            mixed, cache = self._mixed(x, segment_ids, memory)
            y = self._output(checkpoint_name(mixed, "context"))
            return checkpoint_name(y, "out_proj"), {} if memory is None else cache

    def empty_cache(self, rows: int, places: int) -> LayerCache:
        """Make a cache without tokens.

        Args:
            rows: B, sequences.
            places: not read: what is kept is as large as for one token.
        """
        del places
        return self._empty_cache(rows)

    @abstractmethod
    def _mixed(
        self, x: Float[Array, "B S M"], segment_ids: Int[Array, "B S"], memory: Memory | None
    ) -> tuple[Float[Array, "B S *heads"], LayerCache]:
        """Compute what the output projection takes in, and the cache; every subclass defines it."""

    @abstractmethod
    def _output(self, y: Float[Array, "B S *heads"]) -> Float[Array, "B S M"]:
        """Project back to the model dim; every subclass defines it."""

    @abstractmethod
    def _empty_cache(self, rows: int) -> LayerCache:
        """Make a cache without tokens; every subclass defines it."""

    def _in_use(
        self,
        param: nnx.Param[Array],
        used: LogicalAxes,
        name: str,
        dtype: DTypeLike | None = None,
    ) -> Float[Array, "*D"]:
        """Return a parameter, in the dtype of the products if no other is given."""
        dtype = self.dtype if dtype is None else dtype
        name = f"{self.words} {name.replace('_', ' ')}"
        return param_in_use(param, tuple(used), dtype=dtype, sharding=self.sharding, name=name)

    def _plus(
        self, y: Float[Array, "B S *heads"], bias: str, used: LogicalAxes
    ) -> Float[Array, "B S *heads"]:
        """Add the bias of this name, if there is one."""
        param: nnx.Param[Array] | None = getattr(self, bias)
        return y if param is None else y + self._in_use(param, used, bias)

    def _placed_output(self, y: Float[Array, "B S M"]) -> Float[Array, "B S M"]:
        axes = ("activation_batch", "activation_length", "activation_embed")
        return self.sharding(y, *axes, name=f"{self.words} output")
