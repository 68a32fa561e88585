"""Share code between grouped-query and latent attention: weights, placement, output."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.nn.initializers import variance_scaling
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from moe_shard.config.attention_config import AttentionConfig
from moe_shard.config.model_config import LayerKind
from moe_shard.layers.adapter import adapter_of
from moe_shard.layers.cache import LayerCache, Memory
from moe_shard.layers.kernels import dot_product
from moe_shard.layers.kernels.choose import SHORT
from moe_shard.layers.kernels.on_mesh import attend_on_mesh, plan_attention
from moe_shard.layers.kernels.rule import AttentionRule, Tokens
from moe_shard.layers.rope import apply_rope
from moe_shard.sharding.annotate import Sharding
from moe_shard.sharding.parameter import parameter

OUT = ("heads", "head_dim", "embed")
WHOLE_DIM = ("activation_batch", "activation_length", None)
"""Logical axes of activations whose model dim is not sharded, as projections by head read it."""


def make_weight(
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    *,
    contracted: int = 1,
    variance: float = 1.0,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> nnx.Param[Array]:
    """Make a projection whose initial output has the variance of its input, times `variance`.

    Args:
        shape: input dims, then output dims.
        axes: their logical axes.
        contracted: number of input dims.
        variance: variance of the output over that of the input.
        dtype: dtype of the parameter.
        rngs: source of the values.
    """
    dims = tuple(range(len(shape)))
    init = variance_scaling(
        variance,
        "fan_in",
        "truncated_normal",
        in_axis=dims[:contracted],
        out_axis=dims[contracted:],
    )
    return parameter(init(rngs.params(), shape, dtype), axes)


def make_vector(
    shape: tuple[int, ...], axes: tuple[str | None, ...], *, dtype: DTypeLike
) -> nnx.Param[Array]:
    """Make a bias or a score that starts at 0.

    Args:
        shape: shape of the parameter.
        axes: its logical axes; None for the elements of a head, so that weight decay does not
            take the parameter for a matrix.
        dtype: dtype of the parameter.
    """
    return parameter(jnp.zeros(shape, dtype), axes)


def param_in_use(
    param: nnx.Param[Array],
    used: tuple[str | None, ...],
    *,
    dtype: DTypeLike,
    sharding: Sharding,
    name: str,
) -> Float[Array, "*D"]:
    """Return a parameter in a dtype, placed where a product needs it.

    Args:
        param: the parameter; the leading dims of a stack of layers are not counted.
        used: the logical axes that it is used with.
        dtype: dtype of the product.
        sharding: the mesh and its rules.
        name: its name in reports.
    """
    axes = param.get_metadata("out_sharding")
    stored = axes[-len(used) :]  # stacked parameters have `layers` first
    return sharding.use_weight(param[...].astype(dtype), stored, used, name=name)


class Heads(nnx.Module):
    """Share what every kind of attention has; subclasses make the weights.

    Args:
        config: heads, norms, positions.
        kind: the layer's span, and whether it has RoPE.
        dtype: dtype of the products.
        sharding: the mesh and its rules.
    """

    out: nnx.Param[Array]
    out_bias: nnx.Param[Array] | None
    sink: nnx.Param[Array] | None

    def __init__(
        self, *, config: AttentionConfig, kind: LayerKind, dtype: DTypeLike, sharding: Sharding
    ) -> None:
        self.config, self.kind = config, kind
        self.dtype = dtype
        self.sharding = sharding

    def __call__(
        self,
        x: Float[Array, "B S M"],
        positions: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"],
        memory: Memory | None = None,
        order: Int[np.ndarray, "S"] | None = None,
    ) -> tuple[Float[Array, "B S M"], LayerCache]:
        """Attend from each token to itself and the earlier ones of its document.

        Args:
            x: normalised activations.
            positions: position of each token in its document.
            segment_ids: equal for tokens of one document.
            memory: cache of earlier calls during generation; None in training.
            order: index of each token in its text, without a memory; None: as they are.

        Returns:
            The output, to be added to the residual stream, and the cache with these tokens in it
            (empty without a memory).
        """
        with jax.named_scope("attention"):
            attended, cache = self._attended(x, positions, segment_ids, memory, order)
            attended = checkpoint_name(self._gated(attended, x), "attention_out")
            return checkpoint_name(self._output(attended), "out_proj"), cache

    @abstractmethod
    def _attended(
        self,
        x: Float[Array, "B S M"],
        positions: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"],
        memory: Memory | None,
        order: Int[np.ndarray, "S"] | None,
    ) -> tuple[Float[Array, "B S N Dv"], LayerCache]:
        """Compute each head's weighted values, and the cache; every subclass defines it."""

    def _gated(
        self, attended: Float[Array, "B S N Dv"], x: Float[Array, "B S M"]
    ) -> Float[Array, "B S N Dv"]:
        """Multiply by a gate, where attention has one."""
        del x
        return attended

    def _make_output(
        self, *, model_dim: int, value_dim: int, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        """Make the sink, and the projection from heads back to the model dim."""
        heads = self.config.num_query_heads
        self.out = make_weight(
            (heads, value_dim, model_dim), OUT, contracted=2, dtype=dtype, rngs=rngs
        )
        self.out_bias = (
            make_vector((model_dim,), ("norm",), dtype=dtype)
            if self.config.attention_out_bias
            else None
        )
        self.sink = (
            make_vector((heads,), ("heads",), dtype=dtype) if self.config.attention_sink else None
        )

    def _in_use(
        self, param: nnx.Param[Array], used: tuple[str | None, ...], name: str
    ) -> Float[Array, "*D"]:
        """Return a parameter in the dtype of the products, placed where they use it."""
        return param_in_use(
            param, used, dtype=self.dtype, sharding=self.sharding, name=f"attention {name}"
        )

    def _by_head(
        self,
        x: Float[Array, "B S N D"],
        heads: str,
        name: str,
        length: str = "activation_length",
    ) -> Float[Array, "B S N D"]:
        return self.sharding(
            x,
            "activation_batch",
            length,
            f"activation_{heads}",
            "activation_head_dim",
            name=f"{name} by head",
        )

    def _turn(
        self, x: Float[Array, "B S N D"], positions: Int[Array, "B S"], memory: Memory | None
    ) -> Float[Array, "B S N D"]:
        """Rotate queries or keys by their positions."""
        length = x.shape[1] if memory is None else memory.positions.shape[1]
        return apply_rope(
            x,
            positions,
            rope=self.config.rope,
            turned_dim=self.config.turned_dim,
            length=length,
        )

    def _remember(self, memory: Memory, new: dict[str, Shaped[Array, "B S ..."]]) -> LayerCache:
        """Write this call's tokens to their places in the memory's cache."""

        def write(name: str, array: Shaped[Array, "B S ..."]) -> Shaped[Array, "B T ..."]:
            kept = memory.layer[name]
            kept = jax.lax.dynamic_update_slice_in_dim(kept, array, memory.slot, axis=1)
            return self._place_cache(name, kept)

        return {name: write(name, array) for name, array in new.items()}

    def _empty_cache(
        self, rows: int, places: int, dims: Mapping[str, tuple[int, ...]]
    ) -> LayerCache:
        return {
            name: self._place_cache(name, jnp.zeros((rows, places, *each), self.dtype))
            for name, each in dims.items()
        }

    def _place_cache(self, name: str, array: Shaped[Array, "B T ..."]) -> Shaped[Array, "B T ..."]:
        by_head = ("activation_kv_heads", "activation_head_dim")
        dims = by_head if array.ndim == 4 else (None,)
        return self.sharding(
            array, "activation_batch", "activation_kv_length", *dims, name=f"cached {name}"
        )

    def _sink_in_use(self) -> Float[Array, "N"] | None:
        return None if self.sink is None else self._in_use(self.sink, ("activation_heads",), "sink")

    def _attend(
        self,
        query: Float[Array, "B S N D"],
        key: Float[Array, "B T J D"],
        value: Float[Array, "B T J Dv"],
        positions: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"],
        memory: Memory | None,
        order: Int[np.ndarray, "S"] | None,
        *,
        key_length: str = "activation_length",
    ) -> Float[Array, "B S N Dv"]:
        """Weight values by the softmax of the scores, with the implementation chosen.

        With a memory, keys and values are those of all its places.

        Args:
            query: rotated by their positions, as the keys.
            key: keys.
            value: values.
            positions: position of each query's token in its document.
            segment_ids: the document.
            memory: see `__call__`.
            order: see `__call__`.
            key_length: logical axis of T.
        """
        rule, sink = self._rule, self._sink_in_use()
        queries, keys = self._tokens(positions, segment_ids, memory, order)
        if memory is not None and query.shape[1] <= SHORT:
            # A few scores for each place of the cache: nothing to gain from blocks.
            return dot_product.attend(query, key, value, queries, keys, rule=rule, sink=sink)
        kernel, shards = plan_attention(
            self.config,
            rule,
            self.sharding,
            query.shape,
            key.shape,
            value.shape[-1],
            dtype=query.dtype,
            key_length=key_length if memory is None else "activation_kv_length",
            same_tokens=memory is None,
        )
        return attend_on_mesh(
            kernel.attend,
            query,
            key,
            value,
            queries,
            keys,
            rule=rule,
            sink=sink,
            shards=shards,
            check_vma=kernel.check_vma,
        )

    @property
    def _rule(self) -> AttentionRule:
        return AttentionRule.of(self.config, self.kind.span)

    def _tokens(
        self,
        positions: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"],
        memory: Memory | None,
        order: Int[np.ndarray, "S"] | None = None,
    ) -> tuple[Tokens, Tokens]:
        """Return the tokens that attend and those attended to, the memory's where there is one."""
        if memory is not None:
            of_memory = Tokens(memory.positions, memory.segment_ids)
            return Tokens(positions, segment_ids), of_memory
        order = np.arange(positions.shape[1], dtype=np.int32) if order is None else order
        tokens = Tokens(positions, segment_ids, order)
        return tokens, tokens

    def _adapted(
        self,
        y: Float[Array, "B S *outs"],
        x: Float[Array, "B S *ins"],
        used: tuple[str | None, ...],
        name: str,
    ) -> Float[Array, "B S *outs"]:
        """Add what the adapter of a weight makes of x to its product with the weight.

        Args:
            y: the product.
            x: what the weight is multiplied with.
            used: the logical axes that the weight is used with.
            name: the weight's name in reports.
        """
        adapter = adapter_of(self, name.replace(" ", "_"))
        if adapter is None:
            return y
        return y + adapter(x, used, dtype=self.dtype, sharding=self.sharding, name=name)

    def _output(self, attended: Float[Array, "B S N Dv"]) -> Float[Array, "B S M"]:
        attended = self._by_head(attended, "heads", "attended")
        used = ("activation_heads", "activation_head_dim", None)
        out = self._in_use(self.out, used, "out")
        y = self.sharding(
            self._adapted(jnp.einsum("bsnd,ndm->bsm", attended, out), attended, used, "out"),
            "activation_batch",
            "activation_length",
            "activation_embed",
            name="attention output",
        )
        if self.out_bias is None:
            return y
        return y + self._in_use(self.out_bias, ("activation_embed",), "out bias")
