"""Configure how a decoder layer attends: heads, masks, latent attention (MLA), positions (RoPE)."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal, get_args

from moe_shard.config.keys import MOST_SIZE, Key, check_leaves, divisors, shown
from moe_shard.errors import UserError

RopeType = Literal["default", "llama3.1", "yarn", "longrope", "proportional"]
AttentionType = Literal["global", "mla"]
AttentionSpan = Literal["global", "sliding", "chunked"]
ContextStrategy = Literal["all_gather", "ring"]
QKNorm = Literal["head", "projection", "l2", "head_after_rope"]
AttentionName = Literal["autoselected", "dot_product", "blockwise", "flash", "cudnn_flash_jax"]
MOST_HEADS = 2**16  # far above any model; keeps the divisors in a fix countable


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Describe rotary positions, and how they are stretched beyond the original length.

    Attributes:
        rope_type: how positions are stretched: a `RopeType`; "yarn" is arXiv 2309.00071, "longrope"
            arXiv 2402.13753. "proportional" does not stretch: pairs and frequencies are those of
            the whole head, of which the first ones, of the highest frequencies, turn (Gemma 4).
        rope_max_timescale: theta, the base of the frequencies, in positions.
        local_rope_max_timescale: theta in layers whose span is "sliding", which turn whole heads
            and are not stretched; -1: they have the positions of the others.
        partial_rotary_factor: the fraction of each head, from its first element, that is rotated;
            "proportional": the fraction of its pairs.
        rope_interleave: whether the elements of a rotated pair are neighbours (2i, 2i + 1), rather
            than in the two halves of a head (i, i + D/2).
        rope_factor: stretched context length over the original one.
        original_max_position_embeddings: context length that the model was first trained on.
        max_position_embeddings: context length that the model supports.
        beta_fast: yarn: frequencies with more rotations than this over the original length are
            unchanged.
        beta_slow: yarn: frequencies with fewer rotations than this are divided by `rope_factor`.
        rope_truncate: yarn: whether the bounds between the two are rounded outwards to whole pairs.
        rope_attention_scaling: whether cos and sin are multiplied by 0.1 ln(rope_factor) + 1.
        rope_attention_factor: factor of cos and sin in place of that; -1: as
            `rope_attention_scaling` says.
        mscale: yarn with MLA: attention scores are multiplied by (0.1 mscale ln(rope_factor) + 1)
            squared.
        rope_low_freq_factor: llama3.1: frequencies with fewer rotations than this over the original
            length are divided by `rope_factor`.
        rope_high_freq_factor: llama3.1: frequencies with more rotations than this are unchanged.
        rope_short_factors: longrope: divisors of the frequencies, one a pair, up to the original
            length.
        rope_long_factors: longrope: divisors of the frequencies, one a pair, for longer sequences.

    Raises:
        UserError: on a value out of range, or longrope without its divisors.
    """

    rope_type: Annotated[RopeType, Key(choices=get_args(RopeType))] = "default"
    rope_max_timescale: Annotated[float, Key(above=1)] = 10000.0
    local_rope_max_timescale: Annotated[float, Key(above=1, off=-1)] = -1.0
    partial_rotary_factor: Annotated[float, Key(above=0, most=1)] = 1.0
    rope_interleave: Annotated[bool, Key()] = False
    rope_factor: Annotated[float, Key(least=1)] = 40.0
    original_max_position_embeddings: Annotated[int, Key(least=1)] = 4096
    max_position_embeddings: Annotated[int, Key(least=1)] = 163840
    beta_fast: Annotated[float, Key(above=0)] = 32.0
    beta_slow: Annotated[float, Key(above=0)] = 1.0
    rope_truncate: Annotated[bool, Key()] = True
    rope_attention_scaling: Annotated[bool, Key()] = False
    rope_attention_factor: Annotated[float, Key(above=0, off=-1)] = -1.0
    mscale: Annotated[float, Key(least=0)] = 1.0
    rope_low_freq_factor: Annotated[float, Key(above=0)] = 1.0
    rope_high_freq_factor: Annotated[float, Key(above=0)] = 4.0
    rope_short_factors: Annotated[tuple[float, ...], Key(above=0)] = ()
    rope_long_factors: Annotated[tuple[float, ...], Key(above=0)] = ()

    def __post_init__(self) -> None:
        check_leaves(self)
        if self.rope_type == "longrope" and not (
            len(self.rope_short_factors) == len(self.rope_long_factors) > 0
        ):
            raise UserError(
                f"rope_type=longrope with {len(self.rope_short_factors)} rope_short_factors and "
                f"{len(self.rope_long_factors)} rope_long_factors: it needs as many of both\n"
                "fix: one of each for every pair of a head's elements that turns"
            )
        if self.rope_type == "llama3.1" and self.rope_high_freq_factor < self.rope_low_freq_factor:
            raise UserError(
                f"rope_high_freq_factor={self.rope_high_freq_factor:g} is below "
                f"rope_low_freq_factor={self.rope_low_freq_factor:g}\n"
                "fix: 4 and 1, as Llama 3.1 has"
            )

    def turned_dim(self, size: int) -> int:
        """Return how many elements of a head are in pairs that have a frequency, be it 0.

        Args:
            size: elements of the head.
        """
        part = int(size * self.partial_rotary_factor)
        return size if self.rope_type == "proportional" and part > 1 else part

    def of_sliding_layers(self) -> RopeConfig:
        """Return the positions of layers whose span is "sliding"."""
        if self.local_rope_max_timescale == -1:
            return self
        return RopeConfig(
            rope_max_timescale=self.local_rope_max_timescale,
            rope_interleave=self.rope_interleave,
            max_position_embeddings=self.max_position_embeddings,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Describe a layer's attention. Sizes count elements.

    Attributes:
        attention: the implementation, an `AttentionName`; "autoselected": the fastest that computes
            the layer on the platform. They differ in time and memory, not in what they compute.
        context_parallel_strategy: how tokens reach the keys and values of tokens of their sequence
            on other devices, a `ContextStrategy`: "all_gather": each device holds all of them;
            "ring": they pass from device to device (arXiv 2310.01889).
        context_parallel_load_balance: whether tokens are reordered, where devices share sequences,
            so that a causal mask leaves each the same work.
        attention_type: an `AttentionType`; "mla" is multi-head latent attention (arXiv 2405.04434).
        num_query_heads: N, query heads.
        num_kv_heads: J, key and value heads; divides N. MLA has N of each.
        head_dim: D, elements of a head; even, because RoPE rotates pairs. MLA has the sizes below
            instead.
        global_num_kv_heads: J in layers whose span is "global"; 0: `num_kv_heads`.
        global_head_dim: D in these layers; 0: `head_dim`.
        share_kv_projections: whether the values of these layers are what is projected to keys,
            before norm and positions.
        q_lora_rank: MLA: size of the latent of queries; 0: queries are projected from x directly.
        kv_lora_rank: MLA: size of the latent of keys and values.
        qk_nope_head_dim: MLA: elements of a query and key that RoPE does not rotate.
        qk_rope_head_dim: MLA: elements that RoPE rotates; those of the keys are shared by all
            heads.
        v_head_dim: MLA: elements of a value.
        latent_norm_epsilon: MLA: added to the mean square in the latents' norms.
        use_indexer: MLA: whether tokens of longer sequences than `indexer_topk` attend to the ones
            that an indexer chooses (DeepSeek-V3.2, arXiv 2512.02556). Its parameters have no
            gradient.
        indexer_head_dim: elements of the indexer's queries and keys.
        indexer_n_heads: heads of the indexer.
        indexer_topk: tokens that each token attends to.
        indexer_rope_interleave: as `rope_interleave`, of the indexer.
        attention_pattern: span of each layer's attention ("global", "sliding" or "chunked"),
            repeated over the layers.
        sliding_window_size: tokens that a token of a "sliding" layer attends to, itself included.
        chunk_attn_window_size: tokens of a chunk; a token of a "chunked" layer attends within its
            own chunk only.
        nope_layer_interval: the last of every so many layers has no RoPE; -1: all layers have it.
        nope_layers: numbers, from 0, of further layers that have no RoPE.
        attention_bias: whether the projections to queries, keys and values have biases; in MLA,
            those to the latents.
        attention_out_bias: whether the projection back to the model dim has a bias.
        attention_output_gate: whether what each head attends to is multiplied, element by element,
            by the sigmoid of another projection of x; its bias is `attention_bias`'s.
        attention_sink: whether each head has a learned score that takes part in the softmax and has
            no value.
        attn_logits_soft_cap: scores s become cap * tanh(s / cap); 0: no cap.
        attention_scale: factor of the scores; -1: one over the root of a key's size. Where it is 1,
            queries are initialised smaller by that root instead, as in T5 and MaxText.
        use_qk_norm: whether queries and keys are normalised.
        qk_norm_type: how they are normalised, a `QKNorm`: RMSNorm of each head before RoPE; of all
            heads together before they are split; or after RoPE, without a scale, in the layers that
            have RoPE; or of each head with a scale, after RoPE in the layers that have it.
        use_v_norm: whether each value is divided by its root mean square.
        clip_qkv: largest magnitude of queries, keys and values; -1: no clipping.
        temperature_tuning: whether queries of layers without RoPE grow with the position p, by the
            factor 1 + temperature_tuning_scale * ln(1 + floor((p + 1) / temperature_tuning_floor)).
        temperature_tuning_scale: see `temperature_tuning`.
        temperature_tuning_floor: see `temperature_tuning`; in positions.
        rope: rotary positions.

    Raises:
        UserError: on a value out of range or a contradiction between keys.
    """

    attention: Annotated[AttentionName, Key(choices=get_args(AttentionName))] = "autoselected"
    context_parallel_strategy: Annotated[
        ContextStrategy, Key(choices=get_args(ContextStrategy))
    ] = "all_gather"
    context_parallel_load_balance: Annotated[bool, Key()] = True
    attention_type: Annotated[AttentionType, Key(choices=get_args(AttentionType))] = "global"
    num_query_heads: Annotated[int, Key("base_num_query_heads", least=1, most=MOST_HEADS)] = 16
    num_kv_heads: Annotated[int, Key("base_num_kv_heads", least=1, most=MOST_HEADS)] = 16
    head_dim: Annotated[int, Key(least=2, most=MOST_SIZE)] = -1
    global_num_kv_heads: Annotated[int, Key(least=0, most=MOST_HEADS)] = 0
    global_head_dim: Annotated[int, Key(least=0, most=MOST_SIZE)] = 0
    share_kv_projections: Annotated[bool, Key()] = False
    q_lora_rank: Annotated[int, Key(least=0, most=MOST_SIZE)] = 0
    kv_lora_rank: Annotated[int, Key(least=1, most=MOST_SIZE)] = 512
    qk_nope_head_dim: Annotated[int, Key(least=1, most=MOST_SIZE)] = 128
    qk_rope_head_dim: Annotated[int, Key(least=2, most=MOST_SIZE)] = 64
    v_head_dim: Annotated[int, Key(least=1, most=MOST_SIZE)] = 128
    latent_norm_epsilon: Annotated[float, Key(above=0)] = 1e-06
    use_indexer: Annotated[bool, Key()] = False
    indexer_head_dim: Annotated[int, Key(least=2, most=MOST_SIZE)] = 128
    indexer_n_heads: Annotated[int, Key(least=1, most=MOST_HEADS)] = 64
    indexer_topk: Annotated[int, Key(least=1)] = 2048
    indexer_rope_interleave: Annotated[bool, Key()] = False
    attention_pattern: Annotated[tuple[AttentionSpan, ...], Key(each=get_args(AttentionSpan))] = (
        "global",
    )
    sliding_window_size: Annotated[int, Key(least=0)] = 0
    chunk_attn_window_size: Annotated[int, Key(least=0)] = 0
    nope_layer_interval: Annotated[int, Key(least=1, off=-1)] = -1
    nope_layers: Annotated[tuple[int, ...], Key(least=0)] = ()
    attention_bias: Annotated[bool, Key()] = False
    attention_out_bias: Annotated[bool, Key()] = False
    attention_output_gate: Annotated[bool, Key()] = False
    attention_sink: Annotated[bool, Key()] = False
    attn_logits_soft_cap: Annotated[float, Key(least=0)] = 0.0
    attention_scale: Annotated[float, Key(above=0, off=-1)] = -1.0
    use_qk_norm: Annotated[bool, Key()] = False
    qk_norm_type: Annotated[QKNorm, Key(choices=get_args(QKNorm))] = "head"
    use_v_norm: Annotated[bool, Key()] = False
    clip_qkv: Annotated[float, Key(above=0, off=-1)] = -1.0
    temperature_tuning: Annotated[bool, Key()] = False
    temperature_tuning_scale: Annotated[float, Key(above=0)] = 0.1
    temperature_tuning_floor: Annotated[int, Key(least=1)] = 8192
    rope: RopeConfig = dataclasses.field(default_factory=RopeConfig)

    def __post_init__(self) -> None:
        check_leaves(self)
        for key, heads in (
            ("base_num_kv_heads", self.num_kv_heads),
            ("global_num_kv_heads", self.global_num_kv_heads or self.num_kv_heads),
        ):
            if self.num_query_heads % heads:
                raise UserError(
                    f"base_num_query_heads={self.num_query_heads} is not a multiple of "
                    f"{key}={heads}: every key head serves as many queries\n"
                    f"fix: {key} one of {divisors(self.num_query_heads)}"
                )
        self._check_latent()
        for span in dict.fromkeys(self.attention_pattern):
            self._check_turned(span)
        if not self.attention_pattern:
            raise UserError("attention_pattern=[] names no span\nfix: [global], for example")
        for span, key, size in (
            ("sliding", "sliding_window_size", self.sliding_window_size),
            ("chunked", "chunk_attn_window_size", self.chunk_attn_window_size),
        ):
            if span in self.attention_pattern and size == 0:
                raise UserError(
                    f"attention_pattern={shown(self.attention_pattern)} with {key}=0\n"
                    f"fix: {key} above 0"
                )

    def _check_latent(self) -> None:
        if self.use_indexer and (self.attention_type != "mla" or self.q_lora_rank == 0):
            raise UserError(
                f"use_indexer=true with attention_type={self.attention_type}, q_lora_rank="
                f"{self.q_lora_rank}: it reads the latents of the queries\n"
                "fix: attention_type=mla with a q_lora_rank, or use_indexer=false"
            )
        if self.use_indexer and self.indexer_head_dim < self.qk_rope_head_dim:
            raise UserError(
                f"indexer_head_dim={self.indexer_head_dim} is below qk_rope_head_dim="
                f"{self.qk_rope_head_dim}, which RoPE turns in the indexer too\n"
                f"fix: indexer_head_dim={self.qk_rope_head_dim} or more"
            )
        if self.attention_type != "mla":
            return
        for key, on in (
            ("use_qk_norm", self.use_qk_norm),
            ("clip_qkv", self.clip_qkv != -1),
            ("temperature_tuning", self.temperature_tuning),
            ("attention_output_gate", self.attention_output_gate),
            ("global_num_kv_heads", self.global_num_kv_heads),
            ("global_head_dim", self.global_head_dim),
            ("share_kv_projections", self.share_kv_projections),
            ("use_v_norm", self.use_v_norm),
        ):
            if on:
                raise UserError(
                    f"attention_type=mla with {key}: it is of queries and keys that have weights "
                    f"of their own\nfix: leave {key} out, or attention_type=global"
                )

    def _check_turned(self, span: AttentionSpan) -> None:
        name, size = "head_dim", self.head_dim
        if span == "global" and self.global_head_dim:
            name, size = "global_head_dim", self.global_head_dim
        rope = self.rope.of_sliding_layers() if span == "sliding" else self.rope
        if self.attention_type == "mla":
            name, size = "qk_rope_head_dim", self.qk_rope_head_dim
        if size % 2:
            raise UserError(
                f"{name}={size} is odd, and RoPE turns pairs of elements\nfix: {name}={size + 1}"
            )
        turned = rope.turned_dim(size)
        if turned < 2 or turned % 2:
            raise UserError(
                f"partial_rotary_factor={rope.partial_rotary_factor:g} of {name}={size} turns "
                f"{turned} elements, not pairs\nfix: 0.5 or 1, for example"
            )
        factors = len(rope.rope_short_factors)
        if rope.rope_type == "longrope" and factors != turned // 2:
            raise UserError(
                f"rope_type=longrope: {factors} rope_short_factors for {turned // 2} "
                f"pairs ({name}={size})\nfix: one for every pair"
            )

    @property
    def turned_dim(self) -> int:
        """Return how many elements of a query or key RoPE rotates."""
        of = self.qk_rope_head_dim if self.attention_type == "mla" else self.head_dim
        return self.rope.turned_dim(of)

    def in_layers(self, span: AttentionSpan) -> AttentionConfig:
        """Return the attention of the layers with a span, whose heads and positions may differ.

        >>> import moe_shard as ms
        >>> config = ms.load_config("gemma4-26b-a4b").model.attention
        >>> [config.in_layers(span).head_dim for span in ("sliding", "global")]
        [256, 512]
        """
        if span == "global":
            return dataclasses.replace(
                self,
                num_kv_heads=self.global_num_kv_heads or self.num_kv_heads,
                head_dim=self.global_head_dim or self.head_dim,
            )
        rope = self.rope.of_sliding_layers() if span == "sliding" else self.rope
        return dataclasses.replace(self, share_kv_projections=False, rope=rope)
