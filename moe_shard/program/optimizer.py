"""Make the optimizer and the learning-rate schedule from optax."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from moe_shard.config.schema import TrainConfig
from moe_shard.models.params import Params, ParamSpec
from moe_shard.program.matrices import adafactor, is_muons, scale_by_muon
from moe_shard.program.trainable import is_adapter


def make_schedule(config: TrainConfig) -> optax.Schedule:
    """Make the schedule: linear warm-up, cosine decay to a fraction of the peak, then constant.

    With `learning_rate_rule="plain"` the first update runs at 1/(warm-up steps) of the peak, not at
    0. For "maxtext" see `_maxtext_schedule`.
    """
    if config.learning_rate_rule == "maxtext":
        return _maxtext_schedule(config)
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


def _maxtext_schedule(config: TrainConfig) -> optax.Schedule:
    """Make MaxText's schedule: from 0 at the first update to the final rate at the last, then 0.

    The number of warm-up steps is rounded down; the cosine runs from the peak to the final rate
    over the remaining steps, both ends included.
    """
    length, peak = config.schedule_steps, config.learning_rate
    last = peak * config.learning_rate_final_fraction
    warmup = int(length * config.warmup_steps_fraction)
    span = length - warmup

    def rate(step: jax.typing.ArrayLike) -> Float[Array, ""]:
        step = jnp.asarray(step)
        done = (step - warmup) / (span - 1) if span > 1 else jnp.ones_like(step, jnp.float32)
        cosine = 0.5 * (jnp.cos(jnp.pi * done) + 1)
        falling = peak * cosine + last * (1 - cosine)
        rising = peak * step / max(warmup, 1)
        return jnp.where(step >= length, 0.0, jnp.where(step < warmup, rising, falling))

    return rate


def make_optimizer(config: TrainConfig, specs: Params) -> optax.GradientTransformation:
    """Make the optimizer: clip by global norm, then the update at the scheduled rate.

    The norm is taken over whole arrays, whatever their sharding: under jit a sum over a sharded
    array is the sum over all of its shards, so experts on other devices count once and fully.

    Args:
        config: optimizer and schedule.
        specs: the parameters' `ParamSpec`s; weight decay excludes vectors such as norm scales,
            unless `adam_decay_vectors` is set.
    """
    update = _make_update(config, make_schedule(config), specs)
    if config.gradient_clipping_threshold == 0:
        return update
    return optax.chain(optax.clip_by_global_norm(config.gradient_clipping_threshold), update)


def _make_update(
    config: TrainConfig, schedule: optax.Schedule, specs: Params
) -> optax.GradientTransformation:
    match config.optimizer:
        case "adamw":
            return _adam(config, schedule, specs, nesterov=False)
        case "sgd":
            return optax.sgd(schedule)
        case "adafactor":
            return adafactor(schedule, specs)
        case "muon":
            return _muon(config, schedule, specs)


def _adam(
    config: TrainConfig, schedule: optax.Schedule, specs: Params, *, nesterov: bool
) -> optax.GradientTransformation:
    return optax.adamw(
        schedule,
        b1=config.adam_b1,
        b2=config.adam_b2,
        eps=config.adam_eps,
        weight_decay=config.adam_weight_decay,
        mu_dtype=config.mu_dtype or None,
        mask=jax.tree.map(lambda spec: _is_decayed(spec, config.adam_decay_vectors), specs),
        nesterov=nesterov,
    )


def _muon(
    config: TrainConfig, schedule: optax.Schedule, specs: Params
) -> optax.GradientTransformation:
    """Make Muon for the matrices between activations, and Adam for all other parameters."""
    routers = config.muon_include_routers
    by_muon = jax.tree.map(lambda spec: is_muons(spec, routers=routers), specs)

    def only(wanted: bool) -> Params:
        return jax.tree.map(
            lambda spec, muons: spec if muons == wanted else optax.MaskedNode(), specs, by_muon
        )

    rms = config.muon_consistent_rms
    muon = optax.chain(
        scale_by_muon(
            only(True),
            beta=config.muon_beta,
            eps=config.adam_eps,
            mu_dtype=config.mu_dtype or None,
            consistent_rms=None if rms == -1 else rms,
        ),
        optax.add_decayed_weights(config.muon_weight_decay),
        optax.scale_by_learning_rate(schedule),
    )
    return optax.partition(
        {"muon": muon, "adam": _adam(config, schedule, only(False), nesterov=True)},
        jax.tree.map(lambda muons: "muon" if muons else "adam", by_muon),
    )


def _is_decayed(spec: ParamSpec, vectors: bool) -> bool:
    """Tell whether weight decay acts on a parameter."""
    if vectors:
        # This bias has no gradient; decay must not move it either.
        return not spec.name.endswith("correction_bias")
    return spec.is_matrix or is_adapter(spec.name)
