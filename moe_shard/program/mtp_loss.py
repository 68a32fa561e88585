"""Add the loss of multi-token prediction to a step's, with the statistics of its MoE layers."""

from __future__ import annotations

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from moe_shard.config.schema import Config
from moe_shard.models.decoder import Decoder, join_layers
from moe_shard.models.mtp import Ahead, PredictingDecoder, look_ahead, merged
from moe_shard.moe.layer import MoEStats

Fields = dict[str, Int[Array, "B S"]]


def tokens_ahead(config: Config, batch: Fields) -> Ahead | None:
    """Find what the MTP layers take in and predict; None without such layers.

    Args:
        config: model and training.
        batch: a microbatch, its tokens in the order of the text.
    """
    depths = config.model.mtp.mtp_num_layers
    return look_ahead(batch, depths) if depths else None


def add_mtp_loss(
    config: Config,
    decoder: Decoder,
    x: Float[Array, "B S M"],
    ahead: Ahead | None,
    batch: Fields,
    order: Int[np.ndarray, "S"] | None,
    real: Bool[Array, "B S"] | None,
    stats: MoEStats | None,
) -> tuple[Float[Array, ""] | None, MoEStats | None]:
    """Compute the weighted loss of the MTP layers: the mean over all that they predict, together.

    Args:
        config: model and training.
        decoder: the model.
        x: what its last layer leaves.
        ahead: the result of `tokens_ahead`, in the order of the batch.
        batch: the microbatch, in `order`.
        order: index of each token in its sequence.
        real: which tokens are not padding.
        stats: statistics of the decoder's MoE layers.

    Returns:
        The loss, None without MTP layers, and the statistics of all MoE layers.
    """
    if ahead is None:
        return None, stats
    assert isinstance(decoder, PredictingDecoder), "a model with MTP layers is made of this class"
    predicted, further = decoder.predict(
        x, ahead.inputs, batch["positions"], batch["segment_ids"], order, real
    )
    loss = decoder.embedding.cross_entropy(
        predicted,
        merged(ahead.targets),
        config.train.cross_entropy,
        config.train.num_vocab_tiling,
        merged(ahead.counted),
    )
    if stats is not None and further is not None:
        stats = join_layers(stats, further)
    with jax.named_scope("loss"):
        return loss * config.model.mtp.mtp_loss_scaling_factor, stats or further
