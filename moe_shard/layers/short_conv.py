"""Mix tokens by a short convolution between two gates, as LFM2 does (arXiv 2511.23404).

C  channels, as many as the model dim
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moe_shard.config.mamba_config import ShortConvConfig
from moe_shard.config.model_config import LayerKind, ModelConfig
from moe_shard.layers.cache import LayerCache, Memory
from moe_shard.layers.causal_conv import causal_conv, earlier_in
from moe_shard.layers.heads import make_vector, make_weight
from moe_shard.layers.state_mixer import StateMixer
from moe_shard.sharding.annotate import Sharding

_USED = "activation_conv_channel"


class ShortConvolution(StateMixer):
    """Compute out(b * conv(a * value)), where gates a, b and the value are projected from x.

    Args:
        config: taps and biases.
        model_dim: M, the model dim.
        dtype: dtype of the products.
        weight_dtype: dtype of the parameters.
        sharding: the mesh and its rules.
        rngs: source of the initial weights.
    """

    words = "convolution"

    def __init__(
        self,
        *,
        config: ShortConvConfig,
        model_dim: int,
        dtype: DTypeLike,
        weight_dtype: DTypeLike,
        sharding: Sharding,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(dtype=dtype, sharding=sharding)
        self.config, self.model_dim = config, model_dim

        def project() -> nnx.Param[Array]:
            axes = ("embed", "conv_channel")
            return make_weight((model_dim, model_dim), axes, dtype=weight_dtype, rngs=rngs)

        def bias(axis: str = "conv_channel") -> nnx.Param[Array] | None:
            if not config.short_conv_bias:
                return None
            return make_vector((model_dim,), (axis,), dtype=weight_dtype)

        self.input_gate, self.output_gate, self.value = project(), project(), project()
        self.input_gate_bias, self.output_gate_bias, self.value_bias = bias(), bias(), bias()
        # No matrix: each channel has taps of its own.
        self.taps = make_weight(
            (config.short_conv_kernel_dim, model_dim),
            (None, "conv_channel"),
            dtype=weight_dtype,
            rngs=rngs,
        )
        self.taps_bias = bias()
        self.out = make_weight(
            (model_dim, model_dim), ("conv_channel", "embed"), dtype=weight_dtype, rngs=rngs
        )
        self.out_bias = bias("norm")

    def _mixed(
        self, x: Float[Array, "B S M"], segment_ids: Int[Array, "B S"], memory: Memory | None
    ) -> tuple[Float[Array, "B S C"], LayerCache]:
        into, out_of, value = (
            checkpoint_name(self._project(x, name), f"{kept}_proj")
            for name, kept in (
                ("input_gate", "query"),
                ("output_gate", "key"),
                ("value", "value"),
            )
        )
        taps = self._in_use(self.taps, (None, _USED), "taps")
        y, tail = causal_conv(into * value, taps, segment_ids, earlier_in(memory, "convolved"))
        return out_of * self._plus(y, "taps_bias", (_USED,)), {"convolved": self._placed_tail(tail)}

    def _empty_cache(self, rows: int) -> LayerCache:
        before = self.config.short_conv_kernel_dim - 1
        empty = jnp.zeros((rows, before, self.model_dim), self.dtype)
        return {"convolved": self._placed_tail(empty)}

    def _placed_tail(self, tail: Float[Array, "B before C"]) -> Float[Array, "B before C"]:
        return self.sharding(tail, "activation_batch", None, _USED, name="convolution earlier")

    def _project(self, x: Float[Array, "B S M"], name: str) -> Float[Array, "B S C"]:
        kernel = self._in_use(getattr(self, name), (None, _USED), name)
        y = self.sharding(
            jnp.einsum("bsm,mc->bsc", x, kernel),
            "activation_batch",
            "activation_length",
            _USED,
            name=f"convolution {name}",
        )
        return self._plus(y, f"{name}_bias", (_USED,))

    def _output(self, y: Float[Array, "B S C"]) -> Float[Array, "B S M"]:
        out = self._in_use(self.out, (_USED, None), "out")
        y = self._placed_output(jnp.einsum("bsc,cm->bsm", y, out))
        return self._plus(y, "out_bias", ("activation_embed",))


def make_short_convolution(
    config: ModelConfig, kind: LayerKind, sharding: Sharding, rngs: nnx.Rngs
) -> ShortConvolution:
    """Make the short convolution of a layer of a model; see the class for the arguments."""
    assert kind.mixer == "short_convolution", kind
    return ShortConvolution(
        config=config.short_conv,
        model_dim=config.emb_dim,
        dtype=config.dtype,
        weight_dtype=config.weight_dtype,
        sharding=sharding,
        rngs=rngs,
    )
