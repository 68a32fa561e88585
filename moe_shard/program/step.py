"""Define the training step: the one function that is trained, compiled for a target, explained.

`make_program` describes everything that is needed to compile it (shapes and shardings of state and
batch) without allocating anything, so that the same program compiles for absent hardware too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray

from moe_shard.config.schema import Config, brief_list
from moe_shard.layers.kernels.load_balance import order_tokens
from moe_shard.layers.loss import IGNORED
from moe_shard.models.flops import step_flops_per_token
from moe_shard.models.params import AbstractModel, Params, describe
from moe_shard.models.remat import kept
from moe_shard.program.balance import balanced, bias_norms
from moe_shard.program.guard import all_finite, change, choose_opt_state, choose_params
from moe_shard.program.kinds import kinds_of, norms_by_kind
from moe_shard.program.loss_function import (
    CountedGradFn,
    GradFn,
    LossFn,
    count_targets,
    real_tokens,
)
from moe_shard.program.loss_parts import Losses, expert_metrics, loss_parts
from moe_shard.program.mtp_loss import add_mtp_loss, tokens_ahead
from moe_shard.program.norms import Norms, norms
from moe_shard.program.opt_state import HOST, on_device, over_data, place_state
from moe_shard.program.optimizer import make_optimizer, make_schedule
from moe_shard.program.spikes import WithHistory, is_spike, no_history, remember
from moe_shard.program.trainable import ADAPTERS, Trainable
from moe_shard.program.working_weights import as_stored, working_weights
from moe_shard.sharding.annotate import Sharding
from moe_shard.units import human_count

Batch = dict[str, Int[Array, "A R S"]]
"""`inputs`, `targets`, `positions`, `segment_ids`; A microbatches of R sequences."""

BATCH_FIELDS = ("inputs", "targets", "positions", "segment_ids")


class TrainState(NamedTuple):
    """Hold everything that a checkpoint stores.

    Attributes:
        step: number of updates made.
        params: see `models.params.Params`.
        opt_state: optax's state.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: Any


Metrics = dict[str, Float[Array, "..."]]
"""Numbers of a step [], by layer [L] or [L E], or by kind of parameter [K], see `kinds`."""


@dataclass(frozen=True)
class Program:
    """Describe the training step, its state and its batch without allocating them.

    Attributes:
        model: the decoder.
        notes: one line each on what the configuration asks for in vain.
        abstract_state: a `TrainState` of `ShapeDtypeStruct`s with shardings.
        abstract_batch: a `Batch` of `ShapeDtypeStruct`s with shardings.
        init: key -> state; jitted, so that every device makes its own shards.
        init_rest: params -> step and opt_state for existing parameters.
        step: (state, batch) -> (state, metrics); jitted, and donates its state. A step whose loss,
            gradient or update is not finite leaves parameters and moments as they were.
        norms: (params, batch) -> `Norms`; jitted, for a step that went bad.
        evaluate: (params, batch of one microbatch) -> its mean cross entropy in nats; jitted.
        trained: `ParamSpec`s of the parameters that are trained.
        flops_per_token: useful operations of a step for each token, see `models.flops`.
    """

    model: AbstractModel
    notes: tuple[str, ...]
    abstract_state: TrainState
    abstract_batch: dict[str, jax.ShapeDtypeStruct]
    init: jax.stages.Wrapped
    init_rest: jax.stages.Wrapped
    step: jax.stages.Wrapped
    norms: jax.stages.Wrapped
    evaluate: jax.stages.Wrapped
    trained: Params
    flops_per_token: int

    @property
    def batch_sharding(self) -> NamedSharding:
        """Return the sharding of each field of a batch."""
        return self.abstract_batch["inputs"].sharding


def make_program(config: Config, sharding: Sharding) -> Program:
    """Describe the training step of a configuration on a mesh.

    Args:
        config: model and training.
        sharding: the mesh and its rules.

    Raises:
        UserError: an array has a dim that its mesh axes do not divide.
    """
    model = describe(config.model, sharding)
    stored: Params = model.specs
    whole: tuple[str, ...] = ()
    if config.train.shard_optimizer_over_data:
        stored, whole = over_data(model.specs)
    lora = config.model.lora.enable_lora
    chosen = (ADAPTERS,) if lora else config.train.trainable_parameters_mask
    trainable = Trainable(chosen, model.specs)
    trained = trainable.of(model.specs)
    optimizer = make_optimizer(config.train, trainable.of(stored))
    schedule = make_schedule(config.train)
    grad_fn = make_grad(config, model, stored, trainable)
    held_out_loss_fn = make_loss(config, model, ahead=False)

    def init_rest(params: Params) -> tuple[Int[Array, ""], Any]:
        opt_state = optimizer.init(trainable.of(params))
        if config.train.skip_step_on_spikes:
            opt_state = WithHistory(opt_state, no_history(config.train.skip_step_interval))
        return jnp.zeros((), jnp.int32), opt_state

    def init(key: PRNGKeyArray) -> TrainState:
        params = model.init(key)
        step, opt_state = init_rest(params)
        return TrainState(step, params, opt_state)

    def gradient(params: Params, batch: Batch) -> tuple[Float[Array, ""], Losses, Params]:
        weights = working_weights(
            params, model.specs, stored, config.model.dtype, cast=config.train.cast_weights_once
        )
        counted = partial(grad_fn, targets=count_targets(config, batch))
        return _accumulate(counted, weights, trainable.of(params), batch)

    def evaluate(params: Params, batch: Batch) -> Float[Array, ""]:
        weights = working_weights(
            params, model.specs, stored, config.model.dtype, cast=config.train.cast_weights_once
        )
        first = jax.tree.map(lambda x: x[0], batch)
        return held_out_loss_fn(weights, first, count_targets(config, batch))[1].ce_loss

    def norms_of(params: Params, batch: Batch) -> Norms:
        loss, _, grads = gradient(params, batch)
        grads = as_stored(grads, trainable.of(params))
        return norms(loss, grads, params, model.specs, trained=trained)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        loss, losses, grads = gradient(state.params, batch)
        before = trainable.of(state.params)
        with jax.named_scope("optimizer"):
            grads = as_stored(grads, before)
            grad_norm = optax.tree.norm(grads)
            opt_state = on_device(state.opt_state, opt_places)
            history = None
            if isinstance(opt_state, WithHistory):
                opt_state, history = opt_state
            updates, new_opt_state = optimizer.update(grads, opt_state, before)
            params = trainable.into(optax.apply_updates(before, updates), state.params)
            params = trainable.of(balanced(config.model, params, losses.expert_counts))
            changes = change(before, params)
            update_norm = optax.tree.norm(changes)
            accept = finite = all_finite(loss, grad_norm, update_norm)
            if history is not None:
                factor = config.train.skip_step_scaling_factor
                accept &= ~is_spike(history, loss, grad_norm, factor=factor)
            params = trainable.into(choose_params(accept, params, before), state.params)
            opt_state = choose_opt_state(accept, new_opt_state, opt_state)
            if history is not None:
                history = remember(history, loss, grad_norm, finite=finite)
                opt_state = WithHistory(opt_state, history)
            kinds = kinds_of(model.specs)
            by_kind = {
                "grad_norm_by_kind": norms_by_kind(grads, trained, kinds),
                "param_norm_by_kind": norms_by_kind(state.params, model.specs, kinds),
                "update_norm_by_kind": norms_by_kind(changes, trained, kinds),
            }
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "update_norm": update_norm,
            "skipped": 1.0 - accept.astype(jnp.float32),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            **expert_metrics(losses),
            **bias_norms(config.model, state.params),
            **by_kind,
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    memory = HOST if config.train.optimizer_memory_host_offload else None
    abstract_state = _abstract_state(init, stored, sharding, memory)
    opt_places = _shardings(abstract_state.opt_state)
    abstract_batch = _abstract_batch(config, sharding)
    state_shardings = _shardings(abstract_state)
    replicated = NamedSharding(sharding.mesh, PartitionSpec())
    return Program(
        model=model,
        notes=tuple(_notes(config, whole, opt_places, sharding.platform, trainable)),
        abstract_state=abstract_state,
        abstract_batch=abstract_batch,
        init=jax.jit(init, out_shardings=state_shardings),
        init_rest=jax.jit(
            init_rest, out_shardings=(state_shardings.step, state_shardings.opt_state)
        ),
        step=jax.jit(
            step,
            in_shardings=(state_shardings, _shardings(abstract_batch)),
            out_shardings=(state_shardings, replicated),
            donate_argnums=0,
        ),
        norms=jax.jit(
            norms_of,
            in_shardings=(state_shardings.params, _shardings(abstract_batch)),
            out_shardings=replicated,
        ),
        evaluate=jax.jit(
            evaluate,
            in_shardings=(state_shardings.params, _shardings(abstract_batch)),
            out_shardings=replicated,
        ),
        trained=trained,
        flops_per_token=step_flops_per_token(
            config.model, model.specs, trained, seq_len=config.train.max_target_length
        ),
    )


def make_loss(config: Config, model: AbstractModel, *, ahead: bool = True) -> LossFn:
    """Make the function of cross entropy plus weighted auxiliary losses, and their parts.

    Args:
        config: model and training.
        model: the decoder.
        ahead: whether the loss of multi-token prediction is one of them, if the model has any.
    """

    def loss_fn(
        params: Params,
        batch: dict[str, Int[Array, "R S"]],
        targets: Float[Array, ""] | None = None,
    ) -> tuple[Float[Array, ""], Losses]:
        order = order_tokens(config.model, model.sharding, batch["inputs"].shape[-1]).order
        further = tokens_ahead(config, batch) if ahead else None
        if order is not None:
            # Means over tokens do not depend on their order, nor does any layer but attention.
            batch, further = jax.tree.map(lambda x: x[..., order], (batch, further))
        decoder, real = model.apply(params), real_tokens(config, batch)
        x, stats = decoder.residual_stream(
            batch["inputs"], batch["positions"], batch["segment_ids"], order, real
        )
        ce_loss = decoder.embedding.cross_entropy(
            decoder.final_norm(x),
            batch["targets"],
            config.train.cross_entropy,
            config.train.num_vocab_tiling,
            None if targets is None else batch["targets"] != IGNORED,
            targets,
        )
        mtp_loss, stats = add_mtp_loss(config, decoder, x, further, batch, order, real, stats)
        with jax.named_scope("loss"):
            losses = loss_parts(config, ce_loss, stats, mtp_loss)
            loss = ce_loss + losses.aux_loss
            return loss if mtp_loss is None else loss + mtp_loss, losses

    return loss_fn


def make_grad(
    config: Config,
    model: AbstractModel,
    stored: Params | None = None,
    trainable: Trainable | None = None,
) -> CountedGradFn:
    """Make the gradient function of `make_loss`.

    Args:
        config: model and training.
        model: the decoder.
        stored: `ParamSpec`s with the placement of the gradients; None: that of the parameters.
        trainable: the parameters that have gradients; None: all.
    """
    loss_fn = make_loss(config, model)
    chosen = trainable or Trainable((), model.specs)
    shardings = jax.tree.map(lambda spec: spec.sharding, chosen.of(stored or model.specs))

    def grad_fn(
        params: Params,
        batch: dict[str, Int[Array, "R S"]],
        targets: Float[Array, ""] | None = None,
    ) -> tuple[Float[Array, ""], Losses, Params]:
        def of_trained(trained: Params) -> tuple[Float[Array, ""], Losses]:
            return loss_fn(chosen.into(trained, params), batch, targets)

        (loss, losses), grads = jax.value_and_grad(of_trained, has_aux=True)(chosen.of(params))
        # Shard gradients as their parameters, so that a sum over microbatches stays sharded.
        return loss, losses, jax.lax.with_sharding_constraint(grads, shardings)

    return grad_fn


def _accumulate(
    grad_fn: GradFn, weights: Params, params: Params, batch: Batch
) -> tuple[Float[Array, ""], Losses, Params]:
    """Average loss and gradients over the microbatches; add up expert counts.

    Args:
        grad_fn: the result of `make_grad`.
        weights: the parameters in the dtypes in which the layers use them.
        params: those that are trained, in the dtypes in which gradients are added up.
        batch: see `Batch`.

    Returns:
        Loss, statistics and gradients; those of a single microbatch in the dtypes of `weights`.
    """
    microbatches = batch["inputs"].shape[0]
    first = jax.tree.map(lambda x: x[0], batch)
    if microbatches == 1:
        return grad_fn(weights, first)

    def one(microbatch: dict[str, Int[Array, "R S"]]) -> tuple[Any, Losses, Params]:
        loss, losses, grads = grad_fn(weights, microbatch)
        return loss, losses, as_stored(grads, params)

    def add(total: Any, microbatch: dict[str, Int[Array, "R S"]]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, one(microbatch)), None

    # Start from zeros, not from the first microbatch: one copy of the program instead of two.
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(one, first))
    total, _ = jax.lax.scan(add, zeros, batch)
    loss, losses, grads = jax.tree.map(lambda x: x / microbatches, total)
    return loss, losses._replace(expert_counts=total[1].expert_counts), grads


def _abstract_state(
    init: Callable[[PRNGKeyArray], TrainState],
    stored: Params,
    sharding: Sharding,
    memory: str | None,
) -> TrainState:
    """Describe the state; moments are sharded as their parameters, scalars replicated.

    Args:
        init: makes it.
        stored: the parameters' `ParamSpec`s, placed as they are stored.
        sharding: the mesh and its rules.
        memory: memory of the moments; None: the device's own.
    """
    replicated = NamedSharding(sharding.mesh, PartitionSpec())
    shapes = jax.eval_shape(init, jax.random.key(0))
    step: Any = jax.ShapeDtypeStruct(shapes.step.shape, shapes.step.dtype, sharding=replicated)
    params = jax.tree.map(lambda spec: spec.abstract(), stored)
    opt_state = place_state(shapes.opt_state, stored, replicated, memory=memory)
    return TrainState(step, params, opt_state)


def _notes(
    config: Config,
    whole: tuple[str, ...],
    opt_places: Any,
    platform: str,
    trainable: Trainable,
) -> Iterator[str]:
    """Write what is trained, and what is asked for in vain on these devices, one line each."""
    if note := trainable.note():
        yield note
    if whole:
        yield (
            f"shard_optimizer_over_data: {human_count(len(whole), 'parameter')} with no dim that "
            f"the data axis divides, whose state every device has: {brief_list(whole, 5)}"
        )
    names = kept(config.model.remat_policy, config.model.remat)
    moments = config.train.optimizer_memory_host_offload
    if platform == "cpu":
        if moments:
            yield "optimizer_memory_host_offload=true has no effect: a CPU's memory is the host's"
        if names and names.host:
            yield (
                f"remat_policy={config.model.remat_policy} offloads nothing: a CPU's memory is the "
                "host's"
            )
    elif moments and all(leaf.memory_kind != HOST for leaf in jax.tree.leaves(opt_places)):
        yield (
            "optimizer_memory_host_offload is left out here: jax names no memory of the host for "
            "these devices, as for GPUs that are absent"
        )


def _abstract_batch(config: Config, sharding: Sharding) -> dict[str, jax.ShapeDtypeStruct]:
    shape = (
        config.train.gradient_accumulation_steps,
        config.train.microbatch_rows(sharding.mesh.size),
        config.train.max_target_length,
    )
    logical_axes = (None, "activation_batch", "activation_length")
    placed = sharding.named_sharding("batch", logical_axes, shape, dtype=jnp.int32)
    return {
        field: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=placed) for field in BATCH_FIELDS
    }


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)
