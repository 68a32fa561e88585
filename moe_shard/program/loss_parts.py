"""Hold the parts of a loss and the statistics of the MoE layers that came with it."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_shard.config.schema import Config
from moe_shard.moe.layer import MoEStats
from moe_shard.moe.losses import load_balance_loss, mean_over_sequences


class Losses(NamedTuple):
    """Hold the parts and statistics of one microbatch's loss.

    All are means over the microbatch except `expert_counts`, how often each expert was chosen in
    each MoE layer. A model without MoE layers has arrays of no layers.

    Attributes:
        ce_loss: cross entropy.
        aux_loss: weighted auxiliary losses.
        dropped: share of token choices beyond the capacity.
        expert_counts: choices of each expert, before drops.
        layer_dropped: `dropped` of each MoE layer.
        layer_z: mean squared logsumexp of each router's logits, the z loss before its weight.
        mtp_loss: weighted cross entropy of multi-token prediction; None without.
    """

    ce_loss: Float[Array, ""]
    aux_loss: Float[Array, ""]
    dropped: Float[Array, ""]
    expert_counts: Float[Array, "L E"]
    layer_dropped: Float[Array, "L"]
    layer_z: Float[Array, "L"]
    mtp_loss: Float[Array, ""] | None = None


def loss_parts(
    config: Config,
    ce_loss: Float[Array, ""],
    stats: MoEStats | None,
    mtp_loss: Float[Array, ""] | None = None,
) -> Losses:
    """Reduce the layers' statistics over sequences, and to the auxiliary losses.

    Args:
        config: model and training.
        ce_loss: cross entropy.
        stats: statistics of the MoE layers; None: there are none.
        mtp_loss: see `Losses`.
    """
    zero = jnp.zeros((), jnp.float32)
    moe = config.model.moe
    if stats is None or moe is None:
        none = jnp.zeros((0,), jnp.float32)
        return Losses(ce_loss, zero, zero, jnp.zeros((0, 1), jnp.float32), none, none, mtp_loss)
    balance = moe.load_balance_loss_weight * load_balance_loss(
        stats.mean_probs,
        stats.expert_counts,
        tokens=config.train.max_target_length if stats.tokens is None else stats.tokens,
        k=moe.num_experts_per_tok,
        convention=moe.load_balance_loss_type,
    )
    layer_z = mean_over_sequences(stats.router_z_loss, stats.tokens)
    expert_counts = jnp.sum(stats.expert_counts.astype(jnp.float32), axis=1)
    dropped = jnp.sum(stats.dropped, axis=1)
    return Losses(
        ce_loss=ce_loss,
        aux_loss=balance + jnp.mean(layer_z) * moe.router_z_loss_weight,
        dropped=jnp.sum(dropped) / jnp.sum(expert_counts),
        expert_counts=expert_counts,
        layer_dropped=dropped / jnp.sum(expert_counts, axis=1),
        layer_z=layer_z,
        mtp_loss=mtp_loss,
    )


def expert_metrics(losses: Losses) -> dict[str, Float[Array, "..."]]:
    """Return the parts of a loss and the experts' statistics, as metrics of a step.

    Those by layer are left out for a model without MoE layers.
    """
    counts = losses.expert_counts
    load = jnp.max(counts, axis=-1) / jnp.mean(counts, axis=-1)
    metrics: dict[str, Float[Array, "..."]] = {
        "ce_loss": losses.ce_loss,
        "aux_loss": losses.aux_loss,
        "dropped_token_fraction": losses.dropped,
        # In the layer where it is worst; 1 without one.
        "expert_load_max_over_mean": jnp.max(load, initial=1.0),
    }
    if losses.mtp_loss is not None:
        metrics["mtp_loss"] = losses.mtp_loss
    if counts.shape[0]:
        metrics |= {
            "expert_counts": counts,
            "dropped_by_layer": losses.layer_dropped,
            "router_z_by_layer": losses.layer_z,
        }
    return metrics
