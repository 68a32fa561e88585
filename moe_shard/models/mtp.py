"""Predict tokens further ahead than the next: the MTP layers of DeepSeek-V3.

Source: arXiv 2412.19437, section 2.2, in the form of the published checkpoints, and of MaxText.
Layer k takes the residual stream that layer k - 1 leaves (the first one: the decoder's) and the
embedding of the token k ahead, both normalised and projected together to the model dim; then it is
a decoder layer. Its output, normalised, makes logits for the token k + 1 ahead by the head that all
share.

Where the token k ahead is of another document, or of none, there is nothing to predict: such tokens
do not count, and since they are the last ones of a document no other attends to them.

    K  MTP layers
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Shaped

from moe_shard.config.model_config import LayerKind, ModelConfig
from moe_shard.layers.heads import make_weight
from moe_shard.layers.loss import IGNORED
from moe_shard.models.cycles import PREDICTION
from moe_shard.models.decoder import Decoder, DecoderLayer, make_norm, make_stack
from moe_shard.models.remat import remat
from moe_shard.moe.layer import MoEStats
from moe_shard.sharding.annotate import Sharding

_STORED, _USED = (None, "embed", "norm"), (None, None, "activation_embed")


class Ahead(NamedTuple):
    """Hold, for each MTP layer, the tokens further ahead.

    Attributes:
        inputs: the token k ahead of each token; 0 where there is none.
        targets: the token to predict, k + 1 ahead.
        counted: whether there is one, in the document of the token, that is trained on.
    """

    inputs: Int[Array, "B K S"]
    targets: Int[Array, "B K S"]
    counted: Bool[Array, "B K S"]


def look_ahead(batch: dict[str, Int[Array, "B S"]], depths: int) -> Ahead:
    """Find the tokens further ahead of a batch whose tokens are in the order of the text.

    Args:
        batch: `inputs`, `targets` and `segment_ids`; the tokens of a document follow one another.
        depths: K.
    """

    def shifted(x: Int[Array, "B S"], depth: int) -> Int[Array, "B S"]:
        return jnp.pad(x[:, depth:], ((0, 0), (0, min(depth, x.shape[1]))))

    segments = batch["segment_ids"]
    places = jnp.arange(segments.shape[1])
    inputs, targets, counted = [], [], []
    for depth in range(1, depths + 1):
        there = (shifted(segments, depth) == segments) & (places < segments.shape[1] - depth)
        inputs.append(jnp.where(there, shifted(batch["inputs"], depth), 0))
        there &= shifted(batch["targets"], depth) != IGNORED
        targets.append(jnp.where(there, shifted(batch["targets"], depth), 0))
        counted.append(there)
    return Ahead(*(jnp.stack(each, axis=1) for each in (inputs, targets, counted)))


class PredictionLayer(DecoderLayer):
    """Join the residual stream with a token further ahead; then compute a decoder layer.

    Args:
        config: the model.
        kind: kind of the decoder layer.
        sharding: the mesh and its rules.
        rngs: source of the initial weights.
    """

    def __init__(
        self, config: ModelConfig, kind: LayerKind, sharding: Sharding, *, rngs: nnx.Rngs
    ) -> None:
        super().__init__(config, kind, sharding, rngs=rngs)
        self.embedding_norm, self.hidden_norm = make_norm(config), make_norm(config)
        # A dim of its own tells the two inputs apart: one after the other along the model dim, they
        # would have to be laid out anew where that is over a tensor axis.
        self.projection = make_weight(
            (2, config.emb_dim, config.emb_dim),
            _STORED,
            contracted=2,
            dtype=config.weight_dtype,
            rngs=rngs,
        )
        self.prediction_norm = make_norm(config)
        self.dtype, self.sharding = config.dtype, sharding

    def join(
        self, x: Float[Array, "B S M"], embedded: Float[Array, "B S M"]
    ) -> Float[Array, "B S M"]:
        """Project the residual stream and the embedding of a token further ahead, normalised."""
        kernel = self.sharding.use_weight(
            self.projection[...].astype(self.dtype), _STORED, _USED, name="mtp projection"
        )
        both = jnp.stack([self.embedding_norm(embedded), self.hidden_norm(x)])
        y = jnp.einsum("pbsm,pmn->bsn", both, kernel)
        rows = ("activation_batch", "activation_length", "activation_embed")
        return self.sharding(y, *rows, name="mtp input")


class PredictingDecoder(Decoder):
    """Compute a causal language model with MTP layers.

    The layers are a stack of their own, `mtp`, which generation does not run.

    Args:
        config: the model; it has MTP layers.
        sharding: the mesh and its rules.
        rngs: source of the initial weights.
    """

    def __init__(self, config: ModelConfig, sharding: Sharding, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, sharding, rngs=rngs)
        kinds = config.mtp_kinds
        stack = make_stack(PredictionLayer, config, kinds[0], len(kinds), sharding, rngs)
        setattr(self, PREDICTION, stack)
        self.after_final_norm = config.mtp.mtp_after_final_norm

    def predict(
        self,
        x: Float[Array, "B S M"],
        inputs: Int[Array, "B K S"],
        positions: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"],
        order: Int[np.ndarray, "S"] | None = None,
        real: Bool[Array, "B S"] | None = None,
    ) -> tuple[Float[Array, "B*K S M"], MoEStats | None]:
        """Compute what the logits of tokens further ahead are made of.

        Args:
            x: what `residual_stream` returns.
            inputs: see `Ahead`, in the order of the other tokens.
            positions: see `Decoder.__call__`, as the next three.
            segment_ids: the document of each token.
            order: index of each token in its sequence.
            real: which tokens are not padding.

        Returns:
            Normalised activations, the K of a sequence one after the other, and the statistics of
            the MoE layers, None where these layers are dense.
        """
        rows, depths, tokens = inputs.shape
        # One lookup of all, so that the table's gradient is one.
        embedded = self.embedding.embed(inputs.reshape(rows * depths, tokens))
        by_depth = jnp.moveaxis(embedded.reshape(rows, depths, tokens, -1), 1, 0)
        graph, params = nnx.split(getattr(self, PREDICTION))

        def layer(x: Float[Array, "B S M"], params: Any, ahead: Float[Array, "B S M"]) -> Any:
            module = nnx.merge(graph, params)
            x, stats, _ = module(module.join(x, ahead), positions, segment_ids, None, order, real)
            return x, module.prediction_norm(x), stats

        layer = remat(layer, self.remat_policy, self.remat)

        def deeper(x: Float[Array, "B S M"], each: Any) -> Any:
            x, normalised, stats = layer(x, *each)
            return x, (normalised, stats)

        with jax.named_scope("mtp"):
            x = self.final_norm(x) if self.after_final_norm else x
            _, (normalised, stats) = jax.lax.scan(deeper, x, (params, by_depth))
        return merged(jnp.moveaxis(normalised, 0, 1)), stats


def merged(x: Shaped[Array, "B K *dims"]) -> Shaped[Array, "B*K *dims"]:
    """Let the K of a sequence follow one another as sequences."""
    return x.reshape(-1, *x.shape[2:])
