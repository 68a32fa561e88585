"""Say where a program is to run, and make a step of a loss: what every program here shares.

Dims, as capitals: B sequences, S positions, M model, H hidden, E experts, C slots, K experts a
token, L layers, V vocabulary, N heads, D head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Tree = Any


@dataclass(frozen=True)
class Place:
    """A mesh, and what its axes are for.

    Attributes:
        ep: the axis that experts are split over; other people's names are not ours.
        fsdp: the axis that one other dim of a weight is split over, or None.
        batch: the axes that sequences are split over.
        scopes: {what a block is: what its author calls it}; a block without an entry has no scope.
    """

    mesh: Mesh
    ep: str
    fsdp: str | None
    batch: tuple[str, ...]
    scopes: dict[str, str] = field(default_factory=dict)

    @property
    def rest(self) -> tuple[str, ...]:
        """The batch's axes without the experts'."""
        return tuple(axis for axis in self.batch if axis != self.ep)

    def named(self, *dims: Any) -> NamedSharding:
        return NamedSharding(self.mesh, P(*dims))

    def keep(self, x: jax.Array, *dims: Any) -> jax.Array:
        """Constrain the layout of `x`."""
        return jax.lax.with_sharding_constraint(x, self.named(*dims))

    def scope(self, what: str) -> AbstractContextManager[object]:
        name = self.scopes.get(what)
        return jax.named_scope(name) if name else nullcontext()

    def array(self, shape: Sequence[int], dtype: Any, *dims: Any) -> jax.ShapeDtypeStruct:
        """Return an abstract array, sharded as `dims` specify."""
        return jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype), sharding=self.named(*dims))


def finish(
    kind: str, loss: Callable[..., jax.Array], params: Tree, *batch: jax.ShapeDtypeStruct
) -> tuple[Callable[..., Any], tuple[Any, ...], Any]:
    """Make a step of a loss.

    Args:
        kind: "forward", "grad", "sgd" or "adam".
        loss: of the parameters and the batch.
        params: arrays that are not there, with their layouts.
        batch: likewise.

    Returns:
        The step, its arguments, and the layouts of its outputs (None: as the compiler likes).
    """
    layouts = jax.tree.map(lambda leaf: leaf.sharding, params)
    if kind == "forward":
        return loss, (params, *batch), None
    if kind == "grad":
        return jax.value_and_grad(loss), (params, *batch), (None, layouts)
    if kind == "sgd":

        def sgd_step(params: Tree, *batch: jax.Array) -> tuple[jax.Array, Tree]:
            value, grads = jax.value_and_grad(loss)(params, *batch)
            return value, jax.tree.map(lambda p, g: p - 0.1 * g.astype(p.dtype), params, grads)

        return sgd_step, (params, *batch), (None, layouts)
    assert kind == "adam", kind
    optimizer = optax.adam(1e-3)
    moments = jax.eval_shape(optimizer.init, params)
    replicated = NamedSharding(jax.tree.leaves(params)[0].sharding.mesh, P())
    state_layouts = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, layout: layout,
        moments,
        layouts,
        transform_non_params=lambda _: replicated,
    )
    state = jax.tree.map(
        lambda leaf, layout: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout),
        moments,
        state_layouts,
    )

    def adam_step(params: Tree, opt_state: Tree, *batch: jax.Array) -> tuple[jax.Array, Tree, Tree]:
        value, grads = jax.value_and_grad(loss)(params, *batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return value, optax.apply_updates(params, updates), opt_state

    return adam_step, (params, state, *batch), (None, layouts, state_layouts)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over tokens of logits [B, S, V] against labels [B, S]."""
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)
