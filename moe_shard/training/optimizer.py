"""Optimizer and learning-rate schedule, put together from optax."""

from __future__ import annotations

import jax
import optax

from moe_shard.config.schema import TrainConfig
from moe_shard.models.params import Params


def make_schedule(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up from 0, cosine decay to a fraction of the peak, constant after that.

    The first update already learns: it runs at 1/(warm-up steps) of the peak, not at 0.
    """
    warmup = round(config.warmup_steps_fraction * config.schedule_steps)
    decay = optax.cosine_decay_schedule(
        config.learning_rate,
        max(config.schedule_steps - warmup, 1),
        alpha=config.learning_rate_final_fraction,
    )
    if warmup == 0:
        return decay
    rise = optax.linear_schedule(
        config.learning_rate / warmup, config.learning_rate, max(warmup - 1, 1)
    )
    return optax.join_schedules([rise, decay], [warmup])


def make_optimizer(config: TrainConfig, specs: Params) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW or plain SGD, at the scheduled learning rate.

    The norm is taken over whole arrays, whatever their sharding: under jit a sum over a sharded
    array is the sum over all of its shards, so experts on other devices count once and fully.

    Args:
        config: optimizer and schedule.
        specs: the parameters' `ParamSpec`s; weight decay leaves out vectors such as norm scales.
    """
    schedule = make_schedule(config)
    if config.optimizer == "adamw":
        # Neither stacked layers or experts nor a dim without a name make a matrix of a vector.
        decayed = jax.tree.map(
            lambda spec: len(set(spec.logical_axes) - {"layers", "exp", None}) > 1, specs
        )
        update = optax.adamw(
            schedule,
            b1=config.adam_b1,
            b2=config.adam_b2,
            eps=config.adam_eps,
            weight_decay=config.adam_weight_decay,
            mask=decayed,
        )
    else:
        update = optax.sgd(schedule)
    if config.gradient_clipping_threshold == 0:
        return update
    return optax.chain(optax.clip_by_global_norm(config.gradient_clipping_threshold), update)
