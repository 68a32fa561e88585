"""Register token mixers: all that the rest of the package asks of one is in its entry.

A mixer moves information between the tokens of a document: attention, or a state that passes from
token to token. Which one a layer has is `LayerKind.mixer`; what the layers of a model have is
`mixer_pattern`. To add one: its name in `config.model_config.MixerName`, its configuration in a
file of its own in `config/`, its module and costs in `layers/`, an entry here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from moe_shard.config.model_config import LayerKind, MixerName, ModelConfig
from moe_shard.layers.attention import make_attention
from moe_shard.layers.attention_costs import attention_flops
from moe_shard.layers.cache import LayerCache, Memory
from moe_shard.layers.delta_net import delta_net_flops, make_delta_net
from moe_shard.layers.mamba import make_mamba, mamba_flops
from moe_shard.layers.short_conv import make_short_convolution
from moe_shard.sharding.annotate import Sharding


class TokenMixer(Protocol):
    """Mix the tokens of each document; an `nnx.Module`."""

    def __call__(
        self,
        x: Float[Array, "B S M"],
        positions: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"],
        memory: Memory | None = None,
        order: Int[np.ndarray, "S"] | None = None,
    ) -> tuple[Float[Array, "B S M"], LayerCache]:
        """Return what is added to the residual stream, and the cache with these tokens.

        Args:
            x: normalised activations.
            positions: position of each token in its document.
            segment_ids: equal for tokens of one document, which stand together.
            memory: cache of earlier calls during generation; None in training.
            order: index of each token in its text where they are reordered, which only attention
                has to deal with; see `config.checks`.
        """
        ...

    def empty_cache(self, rows: int, places: int) -> LayerCache:
        """Make a cache without tokens for B sequences of at most T tokens."""
        ...


@dataclass(frozen=True)
class MixerEntry:
    """Describe what the rest of the package needs to know of a mixer.

    Attributes:
        attribute: attribute of a decoder layer that holds it, first part of its parameters' names.
        words: what reports call it.
        make: makes that of one layer.
        flops: counts the operations of a layer for one token in a sequence of so many that are no
            products with parameters: forward and, apart, backward.
    """

    attribute: str
    words: str
    make: Callable[[ModelConfig, LayerKind, Sharding, nnx.Rngs], TokenMixer]
    flops: Callable[[ModelConfig, LayerKind, int], tuple[int, int]]


def _attention(
    config: ModelConfig, kind: LayerKind, sharding: Sharding, rngs: nnx.Rngs
) -> TokenMixer:
    return make_attention(
        config=config.attention,
        kind=kind,
        model_dim=config.emb_dim,
        norm_epsilon=config.normalization_layer_epsilon,
        zero_centered=config.normalization_zero_centered,
        dtype=config.dtype,
        weight_dtype=config.weight_dtype,
        sharding=sharding,
        rngs=rngs,
    )


MIXERS: Mapping[MixerName, MixerEntry] = {
    "attention": MixerEntry(
        attribute="attention",
        words="attention",
        make=_attention,
        flops=lambda config, kind, length: attention_flops(
            config.attention.in_layers(kind.span), length
        ),
    ),
    "gated_delta_net": MixerEntry(
        attribute="delta",
        words="gated delta net",
        make=make_delta_net,
        flops=lambda config, _, length: delta_net_flops(config, length),
    ),
    "mamba2": MixerEntry(
        attribute="mamba",
        words="Mamba-2",
        make=make_mamba,
        flops=lambda config, _, length: mamba_flops(config, length),
    ),
    "short_convolution": MixerEntry(
        attribute="convolution",
        words="short convolution",
        make=make_short_convolution,
        flops=lambda *_: (0, 0),  # its products are all with parameters
    ),
}
"""Mixers by the name in `mixer_pattern`; "none" has no entry."""
