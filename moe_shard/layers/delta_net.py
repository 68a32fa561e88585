"""Mix tokens by a gated delta net (arXiv 2412.06464), as in Qwen3-Next.

J  key heads      R  value heads of each      D  elements of a key      E  elements of a value
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moe_shard.config.delta_config import DeltaConfig
from moe_shard.config.model_config import LayerKind, ModelConfig
from moe_shard.layers.cache import LayerCache, Memory
from moe_shard.layers.causal_conv import causal_conv, earlier_in, first_of_document
from moe_shard.layers.delta_rule import DeltaInputs, gated_delta_rule
from moe_shard.layers.heads import make_weight
from moe_shard.layers.norm import RMSNorm
from moe_shard.layers.state_mixer import StateMixer
from moe_shard.sharding.annotate import Sharding
from moe_shard.sharding.parameter import parameter

_LENGTH_EPSILON = 1e-6
"""Added to the square of a query's or key's length; of the published models."""
_DECAYS = (0.01, 16.0)
"""Range of the initial decays."""


class GatedDeltaNet(StateMixer):
    """Keep a state for each value head, which each token decays, corrects and reads.

    Args:
        config: heads, convolution, chunks.
        model_dim: M, the model dim.
        norm_epsilon: epsilon of the norm of each head's output.
        dtype: dtype of the projections; the state and what changes it are in float32.
        weight_dtype: dtype of the parameters.
        sharding: the mesh and its rules.
        rngs: source of the initial weights.
    """

    words = "delta net"

    def __init__(
        self,
        *,
        config: DeltaConfig,
        model_dim: int,
        norm_epsilon: float,
        dtype: DTypeLike,
        weight_dtype: DTypeLike,
        sharding: Sharding,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(dtype=dtype, sharding=sharding)
        self.config = config
        heads, each, taps = (
            config.gdn_num_key_heads,
            config.values_per_key,
            config.gdn_conv_kernel_dim,
        )
        of_key, of_value = (
            (heads, config.gdn_key_head_dim),
            (heads, each, config.gdn_value_head_dim),
        )
        key_axes, value_axes = ("gdn_head", "head_dim"), ("gdn_head", "gdn_value", "head_dim")

        def project(dims: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param[Array]:
            return make_weight((model_dim, *dims), ("embed", *axes), dtype=weight_dtype, rngs=rngs)

        def conv(dims: tuple[int, ...]) -> nnx.Param[Array]:
            # No matrix: each channel has taps of its own.
            axes = (None, "gdn_head", *(None,) * (len(dims) - 1))
            return make_weight((taps, *dims), axes, dtype=weight_dtype, rngs=rngs)

        self.query, self.key = project(of_key, key_axes), project(of_key, key_axes)
        self.value, self.gate = project(of_value, value_axes), project(of_value, value_axes)
        self.rate, self.decay = (project((heads, each), value_axes[:2]) for _ in range(2))
        self.query_conv, self.key_conv, self.value_conv = conv(of_key), conv(of_key), conv(of_value)
        least, most = _DECAYS
        drawn = jax.random.uniform(rngs.params(), (heads, each), minval=least, maxval=most)
        self.decay_log = parameter(jnp.log(drawn).astype(weight_dtype), ("gdn_head", None))
        self.decay_bias = parameter(jnp.ones((heads, each), weight_dtype), ("gdn_head", None))
        self.norm = RMSNorm(
            dim=config.gdn_value_head_dim,
            epsilon=norm_epsilon,
            weight_dtype=weight_dtype,
            axis="head_dim",
        )
        self.out = make_weight(
            (*of_value, model_dim),
            (*value_axes, "embed"),
            contracted=3,
            dtype=weight_dtype,
            rngs=rngs,
        )

    def _mixed(
        self, x: Float[Array, "B S M"], segment_ids: Int[Array, "B S"], memory: Memory | None
    ) -> tuple[Float[Array, "B S J R E"], LayerCache]:
        cache: LayerCache = {}
        query, key, value = (
            self._convolved(x, name, segment_ids, memory, cache)
            for name in ("query", "key", "value")
        )
        inputs = self._inputs(x, query, key, value, first_of_document(segment_ids, memory))
        before = self._empty_state(x.shape[0]) if memory is None else memory.layer["state"]
        y, state = gated_delta_rule(inputs, before, chunk_size=self.config.gdn_chunk_size)
        y = self._by_head(y, "values read")
        if memory is not None:
            cache["state"] = self._placed(state, name="state")
        gate = self._project(x, self.gate, "gate").astype(jnp.float32)
        return (self.norm(y) * jax.nn.silu(gate)).astype(self.dtype), cache

    def _empty_cache(self, rows: int) -> LayerCache:
        config = self.config
        heads, before = config.gdn_num_key_heads, config.gdn_conv_kernel_dim - 1
        of_key = (rows, before, heads, config.gdn_key_head_dim)
        of_value = (rows, before, heads, config.values_per_key, config.gdn_value_head_dim)
        tails = {"query": of_key, "key": of_key, "value": of_value}
        return {
            "state": self._empty_state(rows),
            **{
                name: self._placed(jnp.zeros(shape, self.dtype), None, name=f"earlier {name}")
                for name, shape in tails.items()
            },
        }

    def _convolved(
        self,
        x: Float[Array, "B S M"],
        name: str,
        segment_ids: Int[Array, "B S"],
        memory: Memory | None,
        cache: LayerCache,
    ) -> Float[Array, "B S *heads"]:
        """Project, convolve and activate; the cache takes in what the next call reads."""
        y = checkpoint_name(self._project(x, getattr(self, name), name), f"{name}_proj")
        kernel = getattr(self, f"{name}_conv")
        used = (None, "activation_gdn_head", *(None,) * (y.ndim - 3))
        taps = self._in_use(kernel, used, f"{name} convolution", jnp.float32)
        y, tail = causal_conv(y, taps, segment_ids, earlier_in(memory, name))
        cache[name] = self._placed(tail, None, name=f"earlier {name}")
        return self._by_head(jax.nn.silu(y), f"{name} convolved")

    def _inputs(
        self,
        x: Float[Array, "B S M"],
        query: Float[Array, "B S J D"],
        key: Float[Array, "B S J D"],
        value: Float[Array, "B S J R E"],
        begins: Int[Array, "B S"],
    ) -> DeltaInputs:
        """Compute in float32 what the rule reads."""
        query, key = query.astype(jnp.float32), key.astype(jnp.float32)
        if self.config.use_qk_norm_in_gdn:
            query, key = _of_length_1(query), _of_length_1(key)
        rate = jax.nn.sigmoid(self._project(x, self.rate, "rate").astype(jnp.float32))
        used = ("activation_gdn_head", None)
        bias = self._in_use(self.decay_bias, used, "decay bias", jnp.float32)
        log = self._in_use(self.decay_log, used, "decay log", jnp.float32)
        steps = self._project(x, self.decay, "decay").astype(jnp.float32) + bias
        return DeltaInputs(
            query=query * self.config.gdn_key_head_dim**-0.5,
            key=key,
            value=value.astype(jnp.float32),
            log_decay=-jnp.exp(log) * jax.nn.softplus(steps),
            rate=rate,
            begins=begins,
        )

    def _project(
        self, x: Float[Array, "B S M"], weight: nnx.Param[Array], name: str
    ) -> Float[Array, "B S *heads"]:
        used = (None, "activation_gdn_head", *(None,) * (weight[...].ndim - 2))
        kernel = self._in_use(weight, used, name)
        return self._by_head(jnp.tensordot(x, kernel, 1), name)

    def _by_head(self, x: Float[Array, "B S *heads"], name: str) -> Float[Array, "B S *heads"]:
        return self._placed(x, "activation_length", name=f"{name} by head")

    def _placed(
        self, x: Float[Array, "B *dims"], *before: str | None, name: str
    ) -> Float[Array, "B *dims"]:
        """Place an array whose dims are sequences, then `before`, then heads."""
        axes = ("activation_batch", *before, "activation_gdn_head")
        rest = (None,) * (x.ndim - len(axes))
        return self.sharding(x, *axes, *rest, name=f"{self.words} {name}")

    def _empty_state(self, rows: int) -> Float[Array, "B J R D E"]:
        config = self.config
        shape = (config.gdn_num_key_heads, config.values_per_key)
        dims = (config.gdn_key_head_dim, config.gdn_value_head_dim)
        return self._placed(jnp.zeros((rows, *shape, *dims), jnp.float32), name="state")

    def _output(self, y: Float[Array, "B S J R E"]) -> Float[Array, "B S M"]:
        used = ("activation_gdn_head", None, "activation_head_dim", None)
        return self._placed_output(
            jnp.einsum("bsjre,jrem->bsm", y, self._in_use(self.out, used, "out"))
        )


def _of_length_1(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(square + _LENGTH_EPSILON)


def make_delta_net(
    config: ModelConfig, kind: LayerKind, sharding: Sharding, rngs: nnx.Rngs
) -> GatedDeltaNet:
    """Make the gated delta net of a layer of a model; see the class for the arguments."""
    assert kind.mixer == "gated_delta_net", kind
    return GatedDeltaNet(
        config=config.delta,
        model_dim=config.emb_dim,
        norm_epsilon=config.normalization_layer_epsilon,
        dtype=config.dtype,
        weight_dtype=config.weight_dtype,
        sharding=sharding,
        rngs=rngs,
    )


def delta_net_flops(config: ModelConfig, seq_len: int) -> tuple[int, int]:
    """Count the operations on the states for one token, forward and, apart, backward.

    Token by token a state is multiplied with the key, changed by a key and a value, and multiplied
    with the query: three products of D * E, 6 operations each as for a parameter. What chunks add
    to that is not counted.

    Args:
        config: the model.
        seq_len: tokens in a sequence; not read, as the state's size does not depend on it.
    """
    del seq_len
    delta = config.delta
    state = delta.gdn_key_head_dim * delta.gdn_value_head_dim
    products = 3 * delta.gdn_num_value_heads * state
    return 2 * products, 4 * products
