"""The decoder: what its layers are made of, and which layer is of which kind."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal, NamedTuple, get_args

from moe_shard.config.attention_config import AttentionConfig, AttentionSpan
from moe_shard.config.keys import Key, check_leaves, shown
from moe_shard.config.moe_config import MoEConfig
from moe_shard.errors import UserError

DType = Literal["bfloat16", "float16", "float32"]
RematPolicy = Literal["none", "dots", "full", "save_exchanged"]
Normalization = Literal["rms", "layer"]
GATE_ACTIVATIONS = ("silu", "gelu", "gelu_exact", "quick_gelu", "relu")
"""First entry of `mlp_activations`; the second is `linear`. `gelu` is the tanh form, as in JAX;
`quick_gelu` is x * sigmoid(1.702 x)."""


class LayerKind(NamedTuple):
    """What tells one decoder layer from another.

    Attributes:
        moe: routed experts, not one dense MLP.
        span: of its attention.
        rope: its queries and keys are rotated by their positions.
    """

    moe: bool
    span: AttentionSpan
    rope: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatingConfig:
    """The gated MLP, dense, shared or of an expert: down(act(gate(x)) * (up(x) + offset)).

    >>> import moe_shard as ms
    >>> ms.GatingConfig(mlp_activations=("gelu", "linear"), mlp_bias=True).activation
    'gelu'

    Attributes:
        mlp_activations: the gate's activation, then "linear".
        mlp_activations_limit: gate is clamped from above and up on both sides, before all else; -1:
            neither.
        mlp_linear_offset: added to up.
        mlp_bias: of all three projections.

    Raises:
        UserError: on a value out of range.
    """

    mlp_activations: Annotated[tuple[str, ...], Key()] = ("silu", "linear")
    mlp_activations_limit: Annotated[float, Key(above=0, off=-1)] = -1.0
    mlp_linear_offset: Annotated[float, Key()] = 0.0
    mlp_bias: Annotated[bool, Key()] = False

    def __post_init__(self) -> None:
        check_leaves(self)
        if self.mlp_activations not in [(name, "linear") for name in GATE_ACTIVATIONS]:
            raise UserError(
                f"mlp_activations={shown(self.mlp_activations)} is not a known pair\n"
                f"fix: [ACTIVATION, linear] with ACTIVATION one of {', '.join(GATE_ACTIVATIONS)}"
            )

    @property
    def activation(self) -> str:
        """Return the gate's activation, a name in `GATE_ACTIVATIONS`."""
        return self.mlp_activations[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The decoder. Sizes count elements.

    Attributes:
        emb_dim: M, the model dim.
        num_decoder_layers: L.
        mlp_dim: hidden size of a dense MLP.
        vocab_size: V.
        normalization_type: a `Normalization`; "layer" has a mean and a bias as well.
        normalization_layer_epsilon: added to the mean square.
        logits_via_embedding: the output projection is the embedding table, transposed.
        logits_bias: of the output projection.
        embedding_multiplier: of what is looked up.
        residual_multiplier: of what a layer's attention and MLP add to the residual stream.
        logits_scaling: what logits are divided by.
        final_logits_soft_cap: logits l become cap * tanh(l / cap); 0: they stay.
        first_num_dense_layers: layers before the first MoE layer.
        interleave_moe_layer_step: every so many layers one has experts, the last of them.
        dense_layers: numbers of further layers that have a dense MLP, from 0.
        dtype: of activations and matrix products.
        weight_dtype: of the stored parameters.
        remat_policy: what the backward pass finds saved; a `RematPolicy`.
        gating: the MLPs.
        attention: of each layer.
        moe: the MoE layer, or None for a dense model (`num_experts: 1`).

    Raises:
        UserError: on a value out of range or a contradiction between keys.
    """

    emb_dim: Annotated[int, Key("base_emb_dim", least=1)] = 2048
    num_decoder_layers: Annotated[int, Key("base_num_decoder_layers", least=1)] = 16
    mlp_dim: Annotated[int, Key("base_mlp_dim", least=1)] = 7168
    vocab_size: Annotated[int, Key(least=2)] = 32000
    normalization_type: Annotated[Normalization, Key(choices=get_args(Normalization))] = "rms"
    normalization_layer_epsilon: Annotated[float, Key(above=0)] = 1e-05
    logits_via_embedding: Annotated[bool, Key()] = False
    logits_bias: Annotated[bool, Key()] = False
    embedding_multiplier: Annotated[float, Key(above=0)] = 1.0
    residual_multiplier: Annotated[float, Key(above=0)] = 1.0
    logits_scaling: Annotated[float, Key(above=0)] = 1.0
    final_logits_soft_cap: Annotated[float, Key(least=0)] = 0.0
    first_num_dense_layers: Annotated[int, Key(least=0)] = 0
    interleave_moe_layer_step: Annotated[int, Key(least=1)] = 1
    dense_layers: Annotated[tuple[int, ...], Key(least=0)] = ()
    dtype: Annotated[DType, Key(choices=get_args(DType))] = "bfloat16"
    weight_dtype: Annotated[DType, Key(choices=get_args(DType))] = "float32"
    remat_policy: Annotated[RematPolicy, Key(choices=get_args(RematPolicy))] = "save_exchanged"
    gating: GatingConfig = dataclasses.field(default_factory=GatingConfig)
    attention: AttentionConfig = dataclasses.field(default_factory=AttentionConfig)
    moe: MoEConfig | None = None

    def __post_init__(self) -> None:
        check_leaves(self)
        beyond = [layer for layer in self.dense_layers if layer >= self.num_decoder_layers]
        if beyond:
            raise UserError(
                f"dense_layers={shown(self.dense_layers)} names layer {beyond[0]} of "
                f"{self.num_decoder_layers}\nfix: numbers below {self.num_decoder_layers}"
            )
        if self.moe is not None and not any(kind.moe for kind in self.layer_kinds):
            raise UserError(
                f"num_experts={self.moe.num_experts}, but no layer has experts: "
                f"first_num_dense_layers={self.first_num_dense_layers}, interleave_moe_layer_step="
                f"{self.interleave_moe_layer_step}, {self.num_decoder_layers} layers\n"
                "fix: fewer dense layers, or num_experts=1"
            )

    @property
    def num_experts(self) -> int:
        """Return the number of experts in each MoE layer; 1 for a dense model."""
        return self.moe.num_experts if self.moe else 1

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """Return the kind of every layer, in order."""
        pattern, interval = self.attention.attention_pattern, self.attention.nope_layer_interval
        return tuple(
            LayerKind(
                moe=self.moe is not None
                and layer >= self.first_num_dense_layers
                and (layer + 1) % self.interleave_moe_layer_step == 0
                and layer not in self.dense_layers,
                span=pattern[layer % len(pattern)],
                rope=interval == -1 or (layer + 1) % interval != 0,
            )
            for layer in range(self.num_decoder_layers)
        )
