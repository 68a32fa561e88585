"""Compute the experts: E MLPs, `down(act(gate(x)) * up(x))`. Arithmetic only; no mesh.

Without a gate they are `down(act(up(x)))`.

The product of token copies and experts' weights is an argument: a batched product over capacity
slots, or a grouped product over copies that are sorted by expert. So is the placement of the arrays
in between.

Where experts have biases, the output of an empty slot or of padding is not zero. Nothing reads it,
so it gets no gradient either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.nn.initializers import variance_scaling
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from moe_shard.config.lora_config import LoraConfig
from moe_shard.config.model_config import GatingConfig
from moe_shard.errors import UserError
from moe_shard.layers.activation import activated
from moe_shard.layers.adapter import first_a
from moe_shard.moe.axes import (
    EXPERT_BIAS_FUSED,
    EXPERT_BIAS_IN,
    EXPERT_BIAS_OUT,
    EXPERT_WEIGHT_FUSED,
    EXPERT_WEIGHT_IN,
    EXPERT_WEIGHT_OUT,
)
from moe_shard.moe.weights import ExpertWeights, fuse, unfuse
from moe_shard.sharding.parameter import parameter
from moe_shard.sharding.rules import LogicalAxes


class Product(Protocol):
    """Multiply token copies, each by the weights of its own expert."""

    def __call__(
        self,
        x: Float[Array, "*R A"],
        w: Float[Array, "E A *P"],
        bias: Float[Array, "E *P"] | None = None,
    ) -> Float[Array, "*R *P"]:
        """Multiply, and add the bias of the same expert."""
        ...


class FusedMLP(Protocol):
    """Apply the experts to token copies, gate and up as one product."""

    def __call__(self, x: Float[Array, "*R M"], weights: ExpertWeights) -> Float[Array, "*R M"]:
        """Return the expert outputs; gate and up are two arrays of weights."""
        ...


def gated_mlp(
    x: Float[Array, "*R M"],
    weights: ExpertWeights,
    *,
    product: Product,
    gating: GatingConfig,
    fused_mlp: FusedMLP | None = None,
    pin_hidden: Callable[[Float[Array, "*R H"]], Float[Array, "*R H"]] = lambda h: h,
) -> Float[Array, "*R M"]:
    """Apply each token copy's expert to it.

    Args:
        x: token copies; `product` knows which expert each belongs to.
        weights: weights of the experts on this device, in the dtype of the products.
        product: see `Product`.
        gating: activation, gate, clamps and offset between the products.
        fused_mlp: does all of this at once, where gate and up are two arrays of weights; None:
            `product` is called for each.
        pin_hidden: places the hidden activations; not called with `fused_mlp`.
    """
    if fused_mlp is not None and not weights.fused and not weights.adapted:
        return checkpoint_name(fused_mlp(x, weights), "moe_mlpwo")
    biases = weights.inward_bias or (None,) * len(weights.inward)
    pairs = zip(weights.inward, biases, strict=True)
    inward = [product(x, w, bias) for w, bias in pairs]
    if weights.fused:
        inward = [*unfuse(inward[0])]
    if weights.inward_lora:
        low = product(x, weights.inward_lora[0])
        outs = zip(inward, weights.inward_lora[1:], strict=True)
        inward = [each + product(low, b) for each, b in outs]
    inward = [checkpoint_name(each, f"moe_mlpwi_{n}") for n, each in enumerate(inward)]
    hidden = activated([pin_hidden(each) for each in inward], gating)
    y = product(hidden, weights.down, weights.down_bias)
    if weights.down_lora:
        a, b = weights.down_lora
        y = y + product(product(hidden, a), b)
    return checkpoint_name(y, "moe_mlpwo")


def batched_product(
    x: Float[Array, "E *R A"],
    w: Float[Array, "E A *P"],
    bias: Float[Array, "E *P"] | None = None,
) -> Float[Array, "E *R *P"]:
    """Multiply where every expert has equally many token copies, see `Product`."""
    y = _multiply(x, w)
    if bias is None:
        return y
    return y + jnp.expand_dims(bias, tuple(range(1, x.ndim - 1)))


@jax.custom_vjp
def _multiply(x: Float[Array, "E *R A"], w: Float[Array, "E A *P"]) -> Float[Array, "E *R *P"]:
    rows, out = _letters(x, w)
    return jnp.einsum(f"e{rows}a,ea{out}->e{rows}{out}", x, w)


def _multiply_fwd(
    x: Float[Array, "E *R A"], w: Float[Array, "E A *P"]
) -> tuple[Float[Array, "E *R *P"], tuple[Float[Array, "E *R A"], Float[Array, "E A *P"]]]:
    return _multiply(x, w), (x, w)


def _multiply_bwd(
    residuals: tuple[Float[Array, "E *R A"], Float[Array, "E A *P"]], dy: Float[Array, "E *R *P"]
) -> tuple[Float[Array, "E *R A"], Float[Array, "E A *P"]]:
    x, w = residuals
    rows, out = _letters(x, w)
    dx = jnp.einsum(f"e{rows}{out},ea{out}->e{rows}a", dy, w)
    # x first, where jax would have dy first: XLA's CPU compiler transposes the first operand of a
    # sum over rows, and fuses into that copy whatever dy is computed from. For x it is a plain
    # copy, and one for gate and up.
    return dx, jnp.einsum(f"e{rows}a,e{rows}{out}->ea{out}", x, dy)


_multiply.defvjp(_multiply_fwd, _multiply_bwd)


def _letters(x: Float[Array, "E *R A"], w: Float[Array, "E A *P"]) -> tuple[str, str]:
    """Return einsum's letters for the dims of rows, and of outputs."""
    return "bc"[: x.ndim - 2], "gh"[-(w.ndim - 2) :]


class ExpertAdapter(nnx.Module):
    """Hold A and B of weights of all experts that have the same inputs; see `layers.adapter`.

    Args:
        weights: the weights, [E A P] each.
        config: rank and scale.
        rngs: source of A.
    """

    def __init__(
        self, weights: Sequence[nnx.Param[Array]], *, config: LoraConfig, rngs: nnx.Rngs
    ) -> None:
        experts, inputs, outputs = weights[0].get_value().shape
        exp, of_inputs, of_outputs = weights[0].get_metadata("out_sharding")
        rank = config.lora_rank
        shape = (experts, inputs, rank)
        self.a = first_a(shape, (exp, of_inputs, None), fan_in=inputs, rngs=rngs)

        def zeros() -> nnx.Param[Array]:
            drawn = jnp.zeros((experts, rank, outputs), jnp.float32)
            return parameter(drawn, (exp, None, of_outputs))

        self.b = zeros()
        if len(weights) == 2:
            self.b_up = zeros()
        self.scale = config.scale

    def weights(self, dtype: DTypeLike) -> tuple[Array, ...]:
        """Return A, and B times the scale of each weight, as they are stored."""
        outs = [self.b] if not hasattr(self, "b_up") else [self.b, self.b_up]
        scaled = ((each[...] * self.scale).astype(dtype) for each in outs)
        return (self.a[...].astype(dtype), *scaled)


class Experts(nnx.Module):
    """Hold the parameters of the experts.

    Args:
        num_experts: E, experts of the layer.
        model_dim: M, the model dim.
        hidden_dim: H, hidden size of one expert.
        gating: activation, gate, clamps, offset, biases.
        fused: whether gate and up are one parameter `gate_up`, [E M 2 H], and so their biases.
        dtype: dtype of the products.
        weight_dtype: dtype of the parameters.
        rngs: source of the initial weights, the same fused or not.
    """

    def __init__(
        self,
        *,
        num_experts: int,
        model_dim: int,
        hidden_dim: int,
        gating: GatingConfig,
        fused: bool,
        dtype: DTypeLike,
        weight_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        init = variance_scaling(1.0, "fan_in", "truncated_normal", batch_axis=(0,))
        shape_in = (num_experts, model_dim, hidden_dim)
        shape_out = (num_experts, hidden_dim, model_dim)
        inward = [init(rngs.params(), shape_in, weight_dtype) for _ in range(1 + gating.has_gate)]
        if fused:
            self.gate_up = parameter(fuse(*inward), EXPERT_WEIGHT_FUSED)
        else:
            if gating.has_gate:
                self.gate = parameter(inward[0], EXPERT_WEIGHT_IN)
            self.up = parameter(inward[-1], EXPERT_WEIGHT_IN)
        self.down = parameter(init(rngs.params(), shape_out, weight_dtype), EXPERT_WEIGHT_OUT)
        self.fused, self.gating = fused, gating
        if gating.mlp_bias:
            self._make_biases(num_experts, hidden_dim, model_dim, fused, weight_dtype)
        self.dtype = dtype

    def weights(self) -> ExpertWeights:
        """Return the parameters in the dtype of the products, placed as they are stored.

        Cast here, on the shards, so that FSDP gathers weights in the narrow dtype.
        """

        def cast(*params: nnx.Param[Array]) -> tuple[Array, ...]:
            return tuple(param[...].astype(self.dtype) for param in params)

        inward = cast(*((self.gate_up,) if self.fused else self._inward("")))
        (down,) = cast(self.down)
        inward_lora: ExpertAdapter | None = getattr(self, "inward_lora", None)
        down_lora: ExpertAdapter | None = getattr(self, "down_lora", None)
        lora = (
            inward_lora.weights(self.dtype) if inward_lora else (),
            down_lora.weights(self.dtype) if down_lora else (),
        )
        if not self.gating.mlp_bias:
            return ExpertWeights(inward, down, (), None, *lora)
        biases = cast(*((self.gate_up_bias,) if self.fused else self._inward("_bias")))
        (down_bias,) = cast(self.down_bias)
        return ExpertWeights(inward, down, biases, down_bias, *lora)

    @property
    def adapted(self) -> bool:
        """Return whether weights have adapters."""
        return hasattr(self, "inward_lora") or hasattr(self, "down_lora")

    def add_adapters(self, config: LoraConfig, *, inward: bool, down: bool, rngs: nnx.Rngs) -> None:
        """Add adapters beside the weights.

        Args:
            config: rank and scale.
            inward: of gate and up, which share A as one tensor of both would.
            down: of the second projection.
            rngs: source of A.

        Raises:
            UserError: gate and up are one parameter.
        """
        if inward and self.fused:
            raise UserError(
                "enable_lora=true adapts gate and up of the experts, which prefuse_moe_weights="
                "true makes one parameter\nfix: prefuse_moe_weights=false"
            )
        if inward:
            self.inward_lora = ExpertAdapter(self._inward(""), config=config, rngs=rngs)
        if down:
            self.down_lora = ExpertAdapter([self.down], config=config, rngs=rngs)

    def _inward(self, end: str) -> list[nnx.Param[Array]]:
        """Return the weights, or biases, of gate and up, or without a gate of up."""
        return [getattr(self, part + end) for part in ("gate", "up")[not self.gating.has_gate :]]

    def _make_biases(
        self, experts: int, hidden_dim: int, model_dim: int, fused: bool, dtype: DTypeLike
    ) -> None:
        def zeros(axes: LogicalAxes, *dims: int) -> nnx.Param[Array]:
            return parameter(jnp.zeros((experts, *dims), dtype), axes)

        if fused:
            self.gate_up_bias = zeros(EXPERT_BIAS_FUSED, 2, hidden_dim)
        else:
            if self.gating.has_gate:
                self.gate_bias = zeros(EXPERT_BIAS_IN, hidden_dim)
            self.up_bias = zeros(EXPERT_BIAS_IN, hidden_dim)
        self.down_bias = zeros(EXPERT_BIAS_OUT, model_dim)
