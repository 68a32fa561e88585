"""Compute the decoder: embedding, scanned layers of a token mixer and MoE or MLP, logits."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, Shaped

from moe_shard.config.model_config import LayerKind, ModelConfig
from moe_shard.layers.cache import EMPTY, LayerCache, Memory
from moe_shard.layers.embedding import Embedding
from moe_shard.layers.mlp import MLP
from moe_shard.layers.norm import LayerNorm, RMSNorm
from moe_shard.models.adapted import add_adapters
from moe_shard.models.cycles import Cycle, cycles_of
from moe_shard.models.mixers import MIXERS, TokenMixer
from moe_shard.models.remat import LAYER_INPUT, remat
from moe_shard.moe.layer import MoELayer, MoEStats
from moe_shard.sharding.annotate import Sharding
from moe_shard.sharding.parameter import parameter

StackCaches = dict[str, dict[str, Shaped[Array, "layers B ..."]]]
"""Cached arrays by stack and name."""
Norm = RMSNorm | LayerNorm


class Cache(NamedTuple):
    """Keep what a decoder needs of earlier tokens while a text is generated.

    Attributes:
        length: number of places in use.
        positions: position of the token in each place.
        segment_ids: its document; `layers.cache.EMPTY` in a place not in use.
        stacks: caches of every stack of layers, each array with a leading dim of layers.
    """

    length: Int[Array, ""]
    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    stacks: StackCaches


class DecoderLayer(nnx.Module):
    """Add a token mixer, then MoE or MLP, to the residual stream; input or output is normalised.

    A layer may lack one of the two. The mixer stands at the attribute that its entry in `MIXERS`
    names, so that the parameters of each kind have names of their own; its norm is
    `attention_norm` whatever the kind. Where input and output are normalised, the outputs' norms
    are `attention_out_norm` and `mlp_out_norm`.
    """

    def __init__(
        self, config: ModelConfig, kind: LayerKind, sharding: Sharding, *, rngs: nnx.Rngs
    ) -> None:
        dtypes = {"dtype": config.dtype, "weight_dtype": config.weight_dtype}
        self.residual_multiplier = config.residual_multiplier
        self.normalises_input = config.norm_placement != "output"
        self.normalises_output = config.norm_placement != "input"
        self.mixer_attribute = ""
        if kind.mixer != "none":
            entry = MIXERS[kind.mixer]
            self.attention_norm = make_norm(config)
            self.attention_out_norm = make_out_norm(config)
            self.mixer_attribute = entry.attribute
            setattr(self, entry.attribute, entry.make(config, kind, sharding, rngs))
        self.mlp: MoELayer | MLP | None
        if kind.mlp:
            self.mlp_norm = make_norm(config)
            self.mlp_out_norm = make_out_norm(config)
        if kind.moe:
            assert config.moe is not None, "a layer kind with experts needs config.moe"
            self.mlp = MoELayer(
                config=config.moe,
                model_dim=config.emb_dim,
                gating=config.gating,
                sharding=sharding,
                rngs=rngs,
                norm_epsilon=config.normalization_layer_epsilon,
                zero_centered=config.normalization_zero_centered,
                **dtypes,
            )
        elif not kind.mlp:
            self.mlp = None
        else:
            self.mlp = MLP(
                model_dim=config.emb_dim,
                hidden_dim=config.mlp_dim,
                gating=config.gating,
                sharding=sharding,
                rngs=rngs,
                **dtypes,
            )
        self.layer_scalar = (
            parameter(jnp.ones((1,), config.weight_dtype), (None,)) if config.layer_scalar else None
        )
        if config.lora.enable_lora:
            add_adapters(self, config, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B S M"],
        positions: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"],
        memory: Memory | None = None,
        order: Int[np.ndarray, "S"] | None = None,
        real: Bool[Array, "B S"] | None = None,
    ) -> tuple[Float[Array, "B S M"], MoEStats | None, LayerCache]:
        """Apply the layer. Statistics are None for a dense layer."""
        x = checkpoint_name(x, LAYER_INPUT)
        cache: LayerCache = {}
        stats = None
        if self.mixer is not None:
            taken = self._taken(x, self.attention_norm)
            mixed, cache = self.mixer(taken, positions, segment_ids, memory, order)
            x = self._add(x, mixed, self.attention_out_norm or self.attention_norm)
        if self.mlp is not None:
            taken = self._taken(x, self.mlp_norm)
            if isinstance(self.mlp, MoELayer):
                y, stats = self.mlp(taken, x if self.mlp.config.routed_norms else None, real)
            else:
                y = self.mlp(taken)
            x = self._add(x, y, self.mlp_out_norm or self.mlp_norm)
        if self.layer_scalar is not None:
            x = x * jax.lax.stop_gradient(self.layer_scalar[...]).astype(x.dtype)
        return x, stats, cache

    @property
    def mixer(self) -> TokenMixer | None:
        """Return what mixes tokens; None where the layer has an MLP only."""
        mixer: TokenMixer | None = getattr(self, self.mixer_attribute or "_", None)
        return mixer

    def empty_cache(self, rows: int, places: int) -> LayerCache:
        """Make a cache without tokens, see `Decoder.empty_cache`; one layer's."""
        return {} if self.mixer is None else self.mixer.empty_cache(rows, places)

    def _taken(self, x: Float[Array, "B S M"], norm: Norm) -> Float[Array, "B S M"]:
        """Return what a mixer or MLP takes in."""
        return norm(x) if self.normalises_input else x

    def _add(
        self, x: Float[Array, "B S M"], y: Float[Array, "B S M"], norm: Norm
    ) -> Float[Array, "B S M"]:
        y = norm(y) if self.normalises_output else y
        return x + y if self.residual_multiplier == 1 else x + y * self.residual_multiplier


class Decoder(nnx.Module):
    """Compute a causal language model.

    Layers of one kind have their parameters stacked along a leading dim, `layers`, and run in a
    scan, so that the program, and the time to compile it, do not grow with their number. Where
    kinds alternate, the scan is over turns of the cycle, and each place in it has a stack. A stack
    is named after its first layer, `layers_1`; the only stack of a model is named `layers`.

    Args:
        config: the model.
        sharding: the mesh and its rules.
        rngs: source of the initial weights.
    """

    def __init__(self, config: ModelConfig, sharding: Sharding, *, rngs: nnx.Rngs) -> None:
        self.embedding = Embedding(config, sharding, rngs=rngs)
        self.cycles = cycles_of(config.layer_kinds)
        for cycle in self.cycles:
            for name, kind in zip(cycle.names, cycle.kinds, strict=True):
                stack = make_stack(DecoderLayer, config, kind, cycle.turns, sharding, rngs)
                setattr(self, name, stack)
        self.final_norm = make_norm(config)
        self.remat_policy, self.remat = config.remat_policy, config.remat

    def __call__(
        self,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"],
        order: Int[np.ndarray, "S"] | None = None,
        real: Bool[Array, "B S"] | None = None,
    ) -> tuple[Float[Array, "B S V"], MoEStats | None]:
        """Predict the token after each token.

        Args:
            tokens: ids below the vocabulary size.
            positions: position of each token in its document.
            segment_ids: equal for tokens of one document; no token attends across documents.
            order: index of each token in its sequence, where they are not in the order of the text.
            real: which tokens are not padding, which no expert gets; None: all.

        Returns:
            Logits in float32, and the statistics of the MoE layers, each with a leading dim of MoE
            layers (None for a dense model).
        """
        x, stats = self.hidden_states(tokens, positions, segment_ids, order, real)
        return self.embedding.logits(x), stats

    def hidden_states(
        self,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"],
        order: Int[np.ndarray, "S"] | None = None,
        real: Bool[Array, "B S"] | None = None,
    ) -> tuple[Float[Array, "B S M"], MoEStats | None]:
        """Compute what the logits are made of, for `embedding.logits` or `.cross_entropy`.

        Arguments and statistics are those of a call.
        """
        x, stats = self.residual_stream(tokens, positions, segment_ids, order, real)
        return self.final_norm(x), stats

    def residual_stream(
        self,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"],
        order: Int[np.ndarray, "S"] | None = None,
        real: Bool[Array, "B S"] | None = None,
    ) -> tuple[Float[Array, "B S M"], MoEStats | None]:
        """Compute what the last layer leaves, before the final norm, as `hidden_states` does."""
        x, stats, _ = self._layers(tokens, positions, segment_ids, None, order, real)
        return x, stats

    def extend(
        self,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"],
        cache: Cache,
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Process the next tokens of a text.

        Args:
            tokens: ids below the vocabulary size.
            positions: position of each token in its document.
            segment_ids: equal for tokens of one document, across calls too.
            cache: the result of `empty_cache` or of the previous call, with S places left.

        Returns:
            Logits for the token after the last one, in float32, and the cache with these tokens.
        """

        def write(kept: Int[Array, "B T"], new: Int[Array, "B S"]) -> Int[Array, "B T"]:
            return jax.lax.dynamic_update_slice_in_dim(kept, new, cache.length, axis=1)

        cache = cache._replace(
            positions=write(cache.positions, positions),
            segment_ids=write(cache.segment_ids, segment_ids),
        )
        x, _, stacks = self._layers(tokens, positions, segment_ids, cache)
        logits = self.embedding.logits(self.final_norm(x[:, -1:]))[:, 0]
        return logits, cache._replace(length=cache.length + tokens.shape[1], stacks=stacks)

    def empty_cache(self, rows: int, places: int) -> Cache:
        """Make a cache without tokens.

        Args:
            rows: B, sequences.
            places: T, the most tokens that a sequence will have.
        """
        stacks: StackCaches = {}
        for cycle in self.cycles:
            for name in cycle.names:
                one = getattr(self, name).empty_cache(rows, places)
                stacks[name] = {
                    key: jnp.broadcast_to(array, (cycle.turns, *array.shape))
                    for key, array in one.items()
                }
        empty = jnp.full((rows, places), EMPTY, jnp.int32)
        return Cache(jnp.zeros((), jnp.int32), jnp.zeros_like(empty), empty, stacks)

    def _layers(
        self,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"],
        cache: Cache | None,
        order: Int[np.ndarray, "S"] | None = None,
        real: Bool[Array, "B S"] | None = None,
    ) -> tuple[Float[Array, "B S M"], MoEStats | None, StackCaches]:
        x = self.embedding.embed(tokens)
        found: list[MoEStats] = []
        stacks: StackCaches = {}
        with jax.named_scope("layers"):
            for cycle in self.cycles:
                x, stats, kept = self._turn(cycle, x, positions, segment_ids, cache, order, real)
                found += stats
                stacks |= kept
        if not found:
            return x, None, stacks
        return x, join_layers(*found), stacks

    def _turn(
        self,
        cycle: Cycle,
        x: Float[Array, "B S M"],
        positions: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"],
        cache: Cache | None,
        order: Int[np.ndarray, "S"] | None = None,
        real: Bool[Array, "B S"] | None = None,
    ) -> tuple[Float[Array, "B S M"], list[MoEStats], StackCaches]:
        """Run all turns of one cycle; return statistics by layer and caches by stack."""
        parts = [nnx.split(getattr(self, name)) for name in cycle.names]
        kept = [{} if cache is None else cache.stacks[name] for name in cycle.names]

        def apply(graph: Any) -> Any:
            def layer(x: Float[Array, "B S M"], params: Any, kept: LayerCache) -> Any:
                memory = None
                if cache is not None:
                    memory = Memory(kept, cache.length, cache.positions, cache.segment_ids)
                return nnx.merge(graph, params)(x, positions, segment_ids, memory, order, real)

            return remat(layer, self.remat_policy, self.remat)

        layers = [apply(graph) for graph, _ in parts]

        def turn(x: Float[Array, "B S M"], each: Any) -> Any:
            stats, caches = [], []
            for layer, params, before in zip(layers, *each, strict=True):
                x, stat, after = layer(x, params, before)
                stats += [] if stat is None else [stat]
                caches.append(after)
            return x, (stats, caches)

        x, (stats, caches) = jax.lax.scan(turn, x, ([params for _, params in parts], kept))
        if len(stats) > 1:
            stats = [jax.tree.map(_interleaved, *stats)]
        return x, stats, dict(zip(cycle.names, caches, strict=True))


def make_norm(config: ModelConfig) -> Norm:
    """Make the normalisation of the residual stream."""
    dim, epsilon = config.emb_dim, config.normalization_layer_epsilon
    if config.normalization_type == "layer":
        return LayerNorm(dim=dim, epsilon=epsilon, weight_dtype=config.weight_dtype)
    return RMSNorm(
        dim=dim,
        epsilon=epsilon,
        weight_dtype=config.weight_dtype,
        zero_centered=config.normalization_zero_centered,
    )


def make_out_norm(config: ModelConfig) -> Norm | None:
    """Make the norm of what a layer adds, where what it takes in has another; else None."""
    return make_norm(config) if config.norm_placement == "both" else None


Layer = TypeVar("Layer", bound=DecoderLayer)


def make_stack(
    layer: type[Layer],
    config: ModelConfig,
    kind: LayerKind,
    layers: int,
    sharding: Sharding,
    rngs: nnx.Rngs,
) -> Layer:
    """Make layers of one kind, their parameters stacked.

    Args:
        layer: the module.
        config: the model.
        kind: the layers' kind.
        layers: their number.
        sharding: the mesh and its rules.
        rngs: source of the initial weights.
    """

    @nnx.split_rngs(splits=layers)
    @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
    def make(rngs: nnx.Rngs) -> Layer:
        return layer(config, kind, sharding, rngs=rngs)

    stack: Layer = make(rngs)
    return stack


def join_layers(*stats: MoEStats) -> MoEStats:
    """Join the statistics of MoE layers that follow one another."""
    return stats[0] if len(stats) == 1 else jax.tree.map(_joined, *stats)


def _joined(*parts: Shaped[Array, "_ *dims"]) -> Shaped[Array, "layers *dims"]:
    return jnp.concatenate(parts)


def _interleaved(*parts: Shaped[Array, "turns *dims"]) -> Shaped[Array, "layers *dims"]:
    """Put the statistics of a cycle's places in the order of its layers."""
    return jnp.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:])
