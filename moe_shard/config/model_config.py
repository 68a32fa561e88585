"""Configure the decoder: what its layers consist of, and which kind each layer is."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal, NamedTuple, get_args

from moe_shard.config.attention_config import AttentionConfig, AttentionSpan
from moe_shard.config.delta_config import DeltaConfig
from moe_shard.config.keys import MOST_SIZE, Key, check_leaves, shown
from moe_shard.config.lora_config import LoraConfig
from moe_shard.config.mamba_config import MambaConfig, ShortConvConfig
from moe_shard.config.moe_config import MoEConfig
from moe_shard.config.mtp_config import MTPConfig
from moe_shard.config.remat_config import RematConfig, RematPolicy
from moe_shard.errors import UserError
from moe_shard.units import human_ranges

DType = Literal["bfloat16", "float16", "float32"]
CrossEntropyName = Literal["auto", "tokamax"]
Normalization = Literal["rms", "layer"]
NormPlacement = Literal["input", "output", "both"]
MixerName = Literal["attention", "gated_delta_net", "mamba2", "short_convolution", "none"]
MOST_LAYERS = 2**12  # far above any model; the cycle of their kinds is looked for layer by layer
GATE_ACTIVATIONS = ("silu", "gelu", "gelu_exact", "quick_gelu", "relu", "relu2")
"""Values of the first entry of `mlp_activations`; the second, if any, is `linear`. `gelu` is the
tanh form, as in JAX; `quick_gelu` is x * sigmoid(1.702 x), `relu2` the square of relu."""


class LayerKind(NamedTuple):
    """Describe what distinguishes one decoder layer from another.

    Attributes:
        moe: whether it has routed experts rather than one dense MLP.
        span: span of its attention; "global" in a layer without attention.
        rope: whether its queries and keys are rotated by their positions; false without attention.
        mixer: what moves information between its tokens; "none": nothing does.
        mlp: whether it has experts or an MLP.
    """

    moe: bool
    span: AttentionSpan
    rope: bool
    mixer: MixerName = "attention"
    mlp: bool = True

    @property
    def carries_state(self) -> bool:
        """Return whether a token's output needs a state that the token before it leaves.

        All mixers do but attention, which reaches earlier tokens by their keys and values.
        """
        return self.mixer not in ("attention", "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatingConfig:
    """Describe the MLP of dense layers and experts: down(act(gate(x)) * (up(x) + offset)).

    Without a gate it is down(act(up(x))).

    >>> import moe_shard as ms
    >>> ms.GatingConfig(mlp_activations=("gelu", "linear"), mlp_bias=True).activation
    'gelu'

    Attributes:
        mlp_activations: activation of the gate, then "linear"; or, alone, the activation of an MLP
            without a gate.
        mlp_activations_limit: before all else, gate is clamped from above and up on both sides to
            this magnitude; -1: no clamp.
        mlp_linear_offset: number added to up.
        mlp_bias: whether the three projections have biases.

    Raises:
        UserError: on a value out of range.
    """

    mlp_activations: Annotated[tuple[str, ...], Key()] = ("silu", "linear")
    mlp_activations_limit: Annotated[float, Key(above=0, off=-1)] = -1.0
    mlp_linear_offset: Annotated[float, Key()] = 0.0
    mlp_bias: Annotated[bool, Key()] = False

    def __post_init__(self) -> None:
        check_leaves(self)
        first, *others = self.mlp_activations or ("",)
        if first not in GATE_ACTIVATIONS or others not in ([], ["linear"]):
            raise UserError(
                f"mlp_activations={shown(self.mlp_activations)} is not a known pair\n"
                f"fix: [ACTIVATION, linear] with ACTIVATION one of {', '.join(GATE_ACTIVATIONS)}; "
                "without a gate, [ACTIVATION]"
            )
        if not self.has_gate and (self.mlp_activations_limit != -1 or self.mlp_linear_offset != 0):
            raise UserError(
                f"mlp_activations={shown(self.mlp_activations)} has no gate, which "
                "mlp_activations_limit and mlp_linear_offset are for\n"
                f"fix: neither of them, or mlp_activations=[{first}, linear]"
            )

    @property
    def activation(self) -> str:
        """Return the gate's activation, or the MLP's, a name in `GATE_ACTIVATIONS`."""
        return self.mlp_activations[0]

    @property
    def has_gate(self) -> bool:
        """Return whether a gate multiplies the up projection."""
        return len(self.mlp_activations) == 2

    @property
    def projections(self) -> int:
        """Return the number of an MLP's projections."""
        return 2 + self.has_gate


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Describe the decoder. Sizes count elements.

    Attributes:
        emb_dim: M, the model dim.
        num_decoder_layers: L, decoder layers.
        mlp_dim: hidden size of a dense MLP.
        vocab_size: V, tokens of the vocabulary.
        normalization_type: a `Normalization`: "rms" is RMSNorm, "layer" LayerNorm with a bias.
        normalization_layer_epsilon: number added to the mean square.
        normalization_zero_centered: whether RMSNorms multiply by 1 + scale, which begins at 0, and
            not by scale, which begins at 1.
        norm_placement: a `NormPlacement`: whether attention and MLP are of normalised activations,
            or what they add to the residual stream is normalised (OLMo 2, arXiv 2501.00656), or
            both, by norms of their own (Gemma).
        layer_scalar: whether what each layer leaves is multiplied by a number of its own, which is
            not trained (Gemma 4).
        logits_via_embedding: whether the output projection is the embedding table, transposed.
        logits_bias: whether the output projection has a bias.
        embedding_multiplier: factor of the token embeddings.
        residual_multiplier: factor of what attention and MLP add to the residual stream.
        logits_scaling: number that logits are divided by.
        final_logits_soft_cap: logits l become cap * tanh(l / cap); 0: no cap.
        first_num_dense_layers: layers before the first MoE layer.
        interleave_moe_layer_step: the last of every so many layers has experts, the others are
            dense.
        dense_layers: numbers, from 0, of further layers that are dense.
        mixer_pattern: what moves information between the tokens of each layer, a `MixerName`,
            repeated over the layers.
        layers_without_mlp: numbers, from 0, of layers that have a mixer only.
        dtype: dtype of activations and matrix products.
        weight_dtype: dtype of the stored parameters.
        remat_policy: what the forward pass saves for the backward pass: a `RematPolicy`.
        remat: the tensors of `remat_policy="custom"`.
        gating: the gated MLPs.
        attention: attention of the layers whose mixer it is.
        delta: the gated delta net, likewise.
        mamba: the state space of Mamba-2, likewise.
        short_conv: the short convolution, likewise.
        moe: the MoE layer, or None for a dense model (`num_experts: 1`).
        mtp: multi-token prediction.
        lora: low-rank adapters of weights.

    Raises:
        UserError: on a value out of range or a contradiction between keys.
    """

    emb_dim: Annotated[int, Key("base_emb_dim", least=1, most=MOST_SIZE)] = 2048
    num_decoder_layers: Annotated[
        int, Key("base_num_decoder_layers", least=1, most=MOST_LAYERS)
    ] = 16
    mlp_dim: Annotated[int, Key("base_mlp_dim", least=1, most=MOST_SIZE)] = 7168
    vocab_size: Annotated[int, Key(least=2, most=MOST_SIZE)] = 32000
    normalization_type: Annotated[Normalization, Key(choices=get_args(Normalization))] = "rms"
    normalization_layer_epsilon: Annotated[float, Key(above=0)] = 1e-05
    normalization_zero_centered: Annotated[bool, Key()] = False
    norm_placement: Annotated[NormPlacement, Key(choices=get_args(NormPlacement))] = "input"
    layer_scalar: Annotated[bool, Key()] = False
    logits_via_embedding: Annotated[bool, Key()] = False
    logits_bias: Annotated[bool, Key()] = False
    embedding_multiplier: Annotated[float, Key(above=0)] = 1.0
    residual_multiplier: Annotated[float, Key(above=0)] = 1.0
    logits_scaling: Annotated[float, Key(above=0)] = 1.0
    final_logits_soft_cap: Annotated[float, Key(least=0)] = 0.0
    first_num_dense_layers: Annotated[int, Key(least=0)] = 0
    interleave_moe_layer_step: Annotated[int, Key(least=1)] = 1
    dense_layers: Annotated[tuple[int, ...], Key(least=0)] = ()
    mixer_pattern: Annotated[tuple[MixerName, ...], Key(each=get_args(MixerName))] = ("attention",)
    layers_without_mlp: Annotated[tuple[int, ...], Key(least=0)] = ()
    dtype: Annotated[DType, Key(choices=get_args(DType))] = "bfloat16"
    weight_dtype: Annotated[DType, Key(choices=get_args(DType))] = "float32"
    remat_policy: Annotated[RematPolicy, Key(choices=get_args(RematPolicy))] = "save_exchanged"
    remat: RematConfig = dataclasses.field(default_factory=RematConfig)
    gating: GatingConfig = dataclasses.field(default_factory=GatingConfig)
    attention: AttentionConfig = dataclasses.field(default_factory=AttentionConfig)
    delta: DeltaConfig = dataclasses.field(default_factory=DeltaConfig)
    mamba: MambaConfig = dataclasses.field(default_factory=MambaConfig)
    short_conv: ShortConvConfig = dataclasses.field(default_factory=ShortConvConfig)
    moe: MoEConfig | None = None
    mtp: MTPConfig = dataclasses.field(default_factory=MTPConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        check_leaves(self)
        for key, numbers in (
            ("dense_layers", self.dense_layers),
            ("nope_layers", self.attention.nope_layers),
            ("layers_without_mlp", self.layers_without_mlp),
        ):
            beyond = [layer for layer in numbers if layer >= self.num_decoder_layers]
            if beyond:
                raise UserError(
                    f"{key}={shown(numbers)} names layer {beyond[0]} of "
                    f"{self.num_decoder_layers}\nfix: numbers below {self.num_decoder_layers}"
                )
        self._check_mixers()
        if self.lora.enable_lora and self.mtp.mtp_num_layers:
            raise UserError(
                f"enable_lora=true with mtp_num_layers={self.mtp.mtp_num_layers}: adapters are of "
                "decoder layers\nfix: mtp_num_layers=0"
            )
        if self.moe is not None and not any(kind.moe for kind in self.layer_kinds):
            raise UserError(
                f"num_experts={self.moe.num_experts}, but no layer has experts: "
                f"first_num_dense_layers={self.first_num_dense_layers}, interleave_moe_layer_step="
                f"{self.interleave_moe_layer_step}, {self.num_decoder_layers} layers\n"
                "fix: fewer dense layers, or num_experts=1"
            )

    def _check_mixers(self) -> None:
        if not self.mixer_pattern:
            raise UserError("mixer_pattern=[] names no mixer\nfix: [attention], for example")
        if self.normalization_zero_centered and self.normalization_type != "rms":
            raise UserError(
                f"normalization_zero_centered=true with normalization_type="
                f"{self.normalization_type}: it is about RMSNorm\nfix: normalization_type=rms"
            )
        if self.moe is not None and self.moe.routed_norms and self.normalization_type != "rms":
            raise UserError(
                f"routed_norms=true with normalization_type={self.normalization_type}: these norms "
                "are RMSNorms\nfix: normalization_type=rms"
            )
        empty = [n for n, kind in enumerate(self.layer_kinds) if kind[3:] == ("none", False)]
        if empty:
            raise UserError(
                f"layer {human_ranges(empty, most=4)} has neither a mixer (mixer_pattern) nor an "
                "MLP (layers_without_mlp)\nfix: one of the two"
            )

    @property
    def num_experts(self) -> int:
        """Return the number of experts in each MoE layer; 1 for a dense model."""
        return self.moe.num_experts if self.moe else 1

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """Return the kind of every layer, in order."""
        return tuple(self._kind(layer) for layer in range(self.num_decoder_layers))

    def _kind(self, layer: int) -> LayerKind:
        pattern, interval = self.attention.attention_pattern, self.attention.nope_layer_interval
        mixer = self.mixer_pattern[layer % len(self.mixer_pattern)]
        attends, mlp = mixer == "attention", layer not in self.layers_without_mlp
        return LayerKind(
            moe=self.moe is not None
            and mlp
            and layer >= self.first_num_dense_layers
            and (layer + 1) % self.interleave_moe_layer_step == 0
            and layer not in self.dense_layers,
            span=pattern[layer % len(pattern)] if attends else "global",
            rope=attends
            and (interval == -1 or (layer + 1) % interval != 0)
            and layer not in self.attention.nope_layers,
            mixer=mixer,
            mlp=mlp,
        )

    @property
    def mtp_kinds(self) -> tuple[LayerKind, ...]:
        """Return the kind of every MTP layer: that of the last decoder layer."""
        return self.layer_kinds[-1:] * self.mtp.mtp_num_layers

    @property
    def all_layer_kinds(self) -> tuple[LayerKind, ...]:
        """Return the kinds of the decoder's layers, then those of the MTP layers after them."""
        return self.layer_kinds + self.mtp_kinds
