"""Mix tokens by the state space of Mamba-2 (arXiv 2405.21060), as Granite 4 and Nemotron-H do.

G  groups      R  heads of a group      P  elements of a value      D  elements of a key
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moe_shard.config.mamba_config import MambaConfig
from moe_shard.config.model_config import LayerKind, ModelConfig
from moe_shard.layers.cache import LayerCache, Memory
from moe_shard.layers.causal_conv import causal_conv, earlier_in, first_of_document
from moe_shard.layers.heads import make_vector, make_weight
from moe_shard.layers.norm import normalise
from moe_shard.layers.state_mixer import StateMixer
from moe_shard.layers.state_space import scan_states
from moe_shard.sharding.annotate import Sharding
from moe_shard.sharding.parameter import parameter
from moe_shard.sharding.rules import LogicalAxes

_DECAYS = (1.0, 16.0)
"""Range of the initial rates of decay; this and the next of the paper's code."""
_STEPS = (1e-3, 1e-1)
"""Range of the initial steps."""
_VALUE: LogicalAxes = ("mamba_group", "mamba_head", "head_dim")
_KEY: LogicalAxes = ("mamba_group", "head_dim")
_AXES = {"gate": _VALUE, "value": _VALUE, "key": _KEY, "query": _KEY, "step": _VALUE[:2]}
"""Projections -> logical axes of their outputs."""
_CONVOLVED = ("value", "key", "query")


class Mamba2(StateMixer):
    """Keep a state for each head, which each token decays, adds to and reads.

    Args:
        config: heads, groups, convolution, chunks.
        model_dim: M, the model dim.
        norm_epsilon: epsilon of the norm of each group's output.
        dtype: dtype of the projections; the state and what changes it are in float32.
        weight_dtype: dtype of the parameters.
        sharding: the mesh and its rules.
        rngs: source of the initial weights.
    """

    words = "mamba"

    def __init__(
        self,
        *,
        config: MambaConfig,
        model_dim: int,
        norm_epsilon: float,
        dtype: DTypeLike,
        weight_dtype: DTypeLike,
        sharding: Sharding,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(dtype=dtype, sharding=sharding)
        self.config = config
        self.norm_epsilon = norm_epsilon
        taps, heads = (
            config.mamba_conv_kernel_dim,
            (config.mamba_num_groups, config.heads_per_group),
        )
        of_value = (*heads, config.mamba_head_dim)
        of_key = (config.mamba_num_groups, config.mamba_state_dim)

        def project(name: str, dims: tuple[int, ...]) -> nnx.Param[Array]:
            axes = ("embed", *_AXES[name])
            return make_weight((model_dim, *dims), axes, dtype=weight_dtype, rngs=rngs)

        def vector(dims: tuple[int, ...], wanted: bool = True) -> nnx.Param[Array] | None:
            axes = ("mamba_group", *(None,) * (len(dims) - 1))
            return make_vector(dims, axes, dtype=weight_dtype) if wanted else None

        def conv(dims: tuple[int, ...]) -> nnx.Param[Array]:
            # No matrix: each channel has taps of its own.
            axes = (None, "mamba_group", *(None,) * (len(dims) - 1))
            return make_weight((taps, *dims), axes, dtype=weight_dtype, rngs=rngs)

        def drawn(least: float, most: float) -> Float[Array, "G R"]:
            return jax.random.uniform(rngs.params(), heads, minval=least, maxval=most)

        def of_heads(values: Float[Array, "G R"]) -> nnx.Param[Array]:
            return parameter(values.astype(weight_dtype), ("mamba_group", None))

        self.gate, self.value = project("gate", of_value), project("value", of_value)
        self.key, self.query = project("key", of_key), project("query", of_key)
        self.step = project("step", heads)
        biased = config.mamba_proj_bias
        self.gate_bias, self.value_bias = vector(of_value, biased), vector(of_value, biased)
        self.key_bias, self.query_bias = vector(of_key, biased), vector(of_key, biased)
        self.step_bias = vector(heads, biased)
        self.value_conv, self.key_conv, self.query_conv = map(conv, (of_value, of_key, of_key))
        biased = config.mamba_conv_bias
        self.value_conv_bias = vector(of_value, biased)
        self.key_conv_bias, self.query_conv_bias = vector(of_key, biased), vector(of_key, biased)
        self.decay_log = of_heads(jnp.log(drawn(*_DECAYS)))
        steps = jnp.exp(drawn(*map(math.log, _STEPS)))
        self.step_shift = of_heads(steps + jnp.log(-jnp.expm1(-steps)))  # softplus gives steps
        self.skip = of_heads(jnp.ones(heads))
        self.norm_scale = parameter(jnp.ones(of_value, weight_dtype), ("mamba_group", None, None))
        self.out = make_weight(
            (*of_value, model_dim),
            (*_VALUE, "embed"),
            contracted=3,
            dtype=weight_dtype,
            rngs=rngs,
        )
        self.out_bias = (
            make_vector((model_dim,), ("norm",), dtype=weight_dtype)
            if config.mamba_proj_bias
            else None
        )

    def _mixed(
        self, x: Float[Array, "B S M"], segment_ids: Int[Array, "B S"], memory: Memory | None
    ) -> tuple[Float[Array, "B S G R P"], LayerCache]:
        cache: LayerCache = {}
        value, key, query = (
            self._convolved(x, name, segment_ids, memory, cache) for name in _CONVOLVED
        )
        step, decay = self._steps(x)
        y, state = scan_states(
            value,
            key,
            query,
            step,
            decay,
            first_of_document(segment_ids, memory).astype(bool),
            self._empty_state(x.shape[0]) if memory is None else memory.layer["state"],
            chunk=self.config.mamba_chunk_size,
        )
        cache["state"] = self._placed_state(state)
        skip = self._of_heads(self.skip, "skip")[..., None]
        y = self._by_head(y + skip * value.astype(jnp.float32), "value", " read")
        return self._gated(y, self._project(x, "gate")), cache

    def _empty_cache(self, rows: int) -> LayerCache:
        cache = {"state": self._empty_state(rows)}
        for name in _CONVOLVED:
            dims = getattr(self, f"{name}_conv")[...].shape[-len(_AXES[name]) :]
            empty = jnp.zeros((rows, self.config.mamba_conv_kernel_dim - 1, *dims), self.dtype)
            cache[name] = self._placed_tail(empty, name)
        return cache

    def _convolved(
        self,
        x: Float[Array, "B S M"],
        name: str,
        segment_ids: Int[Array, "B S"],
        memory: Memory | None,
        cache: LayerCache,
    ) -> Float[Array, "B S *heads"]:
        """Project, convolve and activate; the cache takes in what the next call reads."""
        y = checkpoint_name(self._project(x, name), f"{name}_proj")
        used = _used(_AXES[name])
        taps = self._in_use(getattr(self, f"{name}_conv"), (None, *used), f"{name} taps")
        y, tail = causal_conv(y, taps, segment_ids, earlier_in(memory, name))
        cache[name] = self._placed_tail(tail, name)
        y = self._plus(y, f"{name}_conv_bias", used)
        return self._by_head(jax.nn.silu(y), name, " convolved")

    def _steps(
        self, x: Float[Array, "B S M"]
    ) -> tuple[Float[Array, "B S G R"], Float[Array, "B S G R"]]:
        """Return the steps, and the logarithm of what each leaves of the state, in float32."""
        most = self.config.mamba_step_max
        step = self._project(x, "step").astype(jnp.float32)
        step = jax.nn.softplus(step + self._of_heads(self.step_shift, "step shift"))
        step = jnp.clip(step, self.config.mamba_step_min, None if most == -1 else most)
        return step, -jnp.exp(self._of_heads(self.decay_log, "decay log")) * step

    def _gated(
        self, y: Float[Array, "B S G R P"], gate: Float[Array, "B S G R P"]
    ) -> Float[Array, "B S G R P"]:
        """Multiply by the gate, then normalise each group, in float32."""
        y = y * jax.nn.silu(gate.astype(jnp.float32))
        y = normalise(y, epsilon=self.norm_epsilon, dims=2)
        scale = self._in_use(self.norm_scale, _used(_VALUE), "norm", jnp.float32)
        return (y * scale).astype(self.dtype)

    def _project(self, x: Float[Array, "B S M"], name: str) -> Float[Array, "B S *heads"]:
        used = _used(_AXES[name])
        kernel = self._in_use(getattr(self, name), (None, *used), name)
        y = self._by_head(jnp.tensordot(x, kernel, 1), name)
        return self._plus(y, f"{name}_bias", used)

    def _of_heads(self, param: nnx.Param[Array], name: str) -> Float[Array, "G R"]:
        return self._in_use(param, _used(_AXES["step"]), name, jnp.float32)

    def _by_head(
        self, x: Float[Array, "B S *heads"], of: str, what: str = ""
    ) -> Float[Array, "B S *heads"]:
        """Place an array that has the dims of a projection's output."""
        name = f"{of}{what} by head"
        return self._placed(x, "activation_length", *_used(_AXES[of]), name=name)

    def _placed(
        self, x: Float[Array, "B *dims"], *axes: str | None, name: str
    ) -> Float[Array, "B *dims"]:
        placed: Float[Array, "B *dims"] = self.sharding(
            x, "activation_batch", *axes, name=f"{self.words} {name}"
        )
        return placed

    def _placed_tail(
        self, tail: Float[Array, "B before *heads"], name: str
    ) -> Float[Array, "B before *heads"]:
        return self._placed(tail, None, *_used(_AXES[name]), name=f"earlier {name}")

    def _placed_state(self, state: Float[Array, "B G R P D"]) -> Float[Array, "B G R P D"]:
        return self._placed(state, *_used(_VALUE), None, name="state")

    def _empty_state(self, rows: int) -> Float[Array, "B G R P D"]:
        config = self.config
        heads = (config.mamba_num_groups, config.heads_per_group)
        dims = (config.mamba_head_dim, config.mamba_state_dim)
        return self._placed_state(jnp.zeros((rows, *heads, *dims), jnp.float32))

    def _output(self, y: Float[Array, "B S G R P"]) -> Float[Array, "B S M"]:
        out = self._in_use(self.out, (*_used(_VALUE), None), "out")
        y = self._placed_output(jnp.einsum("bsgrp,grpm->bsm", y, out))
        return self._plus(y, "out_bias", ("activation_embed",))


def _used(axes: LogicalAxes) -> LogicalAxes:
    """Return the logical axes that a parameter's dims of heads are used with."""
    return tuple(None if axis is None else f"activation_{axis}" for axis in axes)


def mamba_flops(config: ModelConfig, seq_len: int) -> tuple[int, int]:
    """Count the operations on the states for one token, forward and, apart, backward.

    Token by token a value and a key are added to each state of P * D numbers, and it is multiplied
    with the query: two products, 6 operations each as for a parameter. What chunks add to that is
    not counted.

    Args:
        config: the model.
        seq_len: tokens in a sequence; not read, as the state's size does not depend on it.
    """
    del seq_len
    mamba = config.mamba
    products = 2 * mamba.mamba_num_heads * mamba.mamba_head_dim * mamba.mamba_state_dim
    return 2 * products, 4 * products


def make_mamba(config: ModelConfig, kind: LayerKind, sharding: Sharding, rngs: nnx.Rngs) -> Mamba2:
    """Make the state space of a layer of a model; see the class for the arguments."""
    assert kind.mixer == "mamba2", kind
    return Mamba2(
        config=config.mamba,
        model_dim=config.emb_dim,
        norm_epsilon=config.normalization_layer_epsilon,
        dtype=config.dtype,
        weight_dtype=config.weight_dtype,
        sharding=sharding,
        rngs=rngs,
    )
