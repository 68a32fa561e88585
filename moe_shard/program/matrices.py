"""Update each matrix of a parameter by itself: Muon and Adafactor.

Both read a parameter as a matrix. Here a parameter also has dims that make no part of one: layers,
experts, and the pair of a fused gate and up. Each entry of those is a matrix of its own, as it
would be unstacked, and none of them is merged into another dim, so that a dim of experts stays on
its mesh axes. Dims of a matrix that belong together, heads and their elements, are merged.

    *K  stacked dims      I  inputs      O  outputs
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from moe_shard.models.params import Params, ParamSpec

_HEADS = frozenset({"heads", "kv_heads", "gdn_head", "gdn_value", "mamba_group", "mamba_head"})
_OF_HEADS = _HEADS | {"head_dim"}


class MatrixDims(NamedTuple):
    """Describe a parameter as matrices.

    Attributes:
        stacked: number of leading dims that are not part of a matrix.
        inputs: number of the dims after them that are contracted with activations.
        outputs: number of the last dims.
    """

    stacked: int
    inputs: int
    outputs: int


def matrix_dims(spec: ParamSpec) -> MatrixDims | None:
    """Return how a parameter consists of matrices; None for vectors."""
    return _dims(spec) if spec.is_matrix else None


def _dims(spec: ParamSpec) -> MatrixDims:
    """Return the same with a vector as one group of inputs."""
    axes = [spec.logical_axes[dim] for dim in _order(spec)]
    stacked = sum(_is_stacked(spec, axis) for axis in axes)
    if not spec.is_matrix:
        return MatrixDims(stacked, len(axes) - stacked, 0)
    inputs = 1
    if axes[stacked] in _HEADS:
        inputs = sum(1 for _ in itertools.takewhile(_OF_HEADS.__contains__, axes[stacked:]))
    return MatrixDims(stacked, inputs, len(axes) - stacked - inputs)


def _is_stacked(spec: ParamSpec, axis: str | None) -> bool:
    # A matrix has a dim without a logical axis where gate and up are one parameter.
    return axis in {"layers", "exp"} or (axis is None and spec.is_matrix)


def _order(spec: ParamSpec) -> tuple[int, ...]:
    """Return the parameter's dims with the stacked ones first."""
    axes = spec.logical_axes
    return tuple(sorted(range(len(axes)), key=lambda dim: not _is_stacked(spec, axes[dim])))


def matrix_entries(spec: ParamSpec) -> tuple[list[Any], Any, Any]:
    """Return the mesh axes of the stacked dims, of the inputs and of the outputs.

    Those of a later dim of a merged group are left out: no merged dim can have them.
    """
    dims = _dims(spec)
    assert dims.outputs, f"{spec.name} is a vector"
    entries = spec_entries(spec)
    ordered = [entries[dim] for dim in _order(spec)]
    return ordered[: dims.stacked], ordered[dims.stacked], ordered[dims.stacked + dims.inputs]


def spec_entries(spec: ParamSpec) -> list[Any]:
    """Return the mesh axes of each dim of a parameter; a spec may omit the last ones."""
    given = spec.sharding.spec
    return [*given, *[None] * (len(spec.shape) - len(given))]


def is_muons(spec: ParamSpec, *, routers: bool) -> bool:
    """Return whether Muon updates a parameter: a matrix between activations.

    Args:
        spec: the parameter.
        routers: whether that includes the routers' matrices.
    """
    axes = spec.logical_axes
    return spec.is_matrix and "vocab" not in axes and (routers or "exp_router" not in axes)


def on_each_matrix(
    function: Callable[..., Any], specs: Params, *trees: Any, shared: tuple[Any, ...] = ()
) -> Any:
    """Apply a function of [I, O] matrices to every matrix of every parameter.

    Args:
        function: takes an array of each tree, then `shared`; returns arrays.
        specs: the parameters' `ParamSpec`s; of vectors, the function gets the vectors themselves,
            without a leading dim of layers.
        *trees: trees of arrays in the shapes of the parameters, or with the parameter's stacked
            dims in front.
        shared: further arguments, the same for all.

    Returns:
        A tree like `specs` of what the function returns, its arrays with the stacked dims in front.
        An array in the shape of a matrix is in the shape of the parameter again.
    """

    def at(spec: ParamSpec, *arrays: Shaped[Array, "..."]) -> Any:
        dims, order = _dims(spec), _order(spec)
        front = tuple(spec.shape[dim] for dim in order)
        stacked = front[: dims.stacked]
        matrix = matrix_shape(spec)

        def as_matrices(array: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
            if array.shape != spec.shape:
                return array
            return array.transpose(order).reshape(*stacked, *matrix)

        def as_parameter(array: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
            if array.shape != (*stacked, *matrix):
                return array
            back = tuple(sorted(range(len(order)), key=lambda dim: order[dim]))
            return array.reshape(front).transpose(back)

        mapped = lambda *each: function(*each, *shared)  # noqa: E731
        for _ in stacked:
            mapped = jax.vmap(mapped)
        return jax.tree.map(as_parameter, mapped(*map(as_matrices, arrays)))

    return jax.tree.map(at, specs, *trees)


def matrix_shape(spec: ParamSpec) -> tuple[int, ...]:
    """Return the shape of one of a parameter's matrices, or of a vector as it is."""
    dims = _dims(spec)
    rest = tuple(spec.shape[dim] for dim in _order(spec))[dims.stacked :]
    if not dims.outputs:
        return rest
    return math.prod(rest[: dims.inputs]), math.prod(rest[dims.inputs :])


class MuonState(NamedTuple):
    """Hold the state of Muon.

    Attributes:
        count: updates made.
        mu: first moments, in the shapes of the parameters.
    """

    count: Int[Array, ""]  # type: ignore[assignment]  # as optax's states; hides tuple.count
    mu: Params


def scale_by_muon(
    specs: Params,
    *,
    beta: float,
    eps: float,
    mu_dtype: DTypeLike | None,
    consistent_rms: float | None,
) -> optax.GradientTransformation:
    """Make updates orthogonal, matrix by matrix: Muon (arXiv 2502.16982), as optax.contrib.muon.

    Nesterov's momentum, then five Newton-Schulz iterations of optax, then a scale by the shape.

    Args:
        specs: the parameters' `ParamSpec`s, `optax.MaskedNode`s where Muon updates none.
        beta: decay of the momentum.
        eps: number added to the norm that a matrix is divided by.
        mu_dtype: dtype of the momentum; None: that of the parameters.
        consistent_rms: root mean square of the updates; None: a scale of sqrt(max(1, O / I)).
    """
    # With beta 0 its momentum is the update itself; what is left of it is the iteration.
    iteration = optax.contrib.scale_by_muon(beta=0.0, nesterov=False, eps=eps)

    def orthogonal(update: Float[Array, "I O"]) -> Float[Array, "I O"]:
        inputs, outputs = update.shape
        found, _ = iteration.update(update, iteration.init(update))
        if consistent_rms is None:
            return found * math.sqrt(max(1, outputs / inputs))
        return found * (math.sqrt(max(inputs, outputs)) * consistent_rms)

    def init(params: Params) -> MuonState:
        return MuonState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params, dtype=mu_dtype))

    def update(
        updates: Params, state: MuonState, params: Params | None = None
    ) -> tuple[Params, MuonState]:
        del params
        mu = optax.tree.update_moment(updates, state.mu, beta, 1)
        count = optax.safe_increment(state.count)
        ahead = optax.tree.bias_correction(mu, beta, optax.safe_increment(count))
        here = optax.tree.bias_correction(updates, beta, count)
        updates = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, ahead, here)
        updates = on_each_matrix(orthogonal, specs, updates)
        return updates, MuonState(count, optax.tree.cast(mu, mu_dtype))

    return optax.GradientTransformation(init, update)


def adafactor(
    schedule: optax.Schedule, specs: Params, *, clipping_threshold: float = 1.0
) -> optax.GradientTransformation:
    """Make Adafactor (arXiv 1804.04235) of optax's parts, each applied matrix by matrix.

    The rate is relative to the root mean square of a matrix. Second moments are factored where
    both dims of a matrix have 128 elements or more. There is no momentum and no weight decay.

    Args:
        schedule: learning rate by the number of updates.
        specs: the parameters' `ParamSpec`s.
        clipping_threshold: root mean square that the scaled update of a matrix is clipped to.
    """
    rms, clip = optax.scale_by_factored_rms(), optax.clip_by_block_rms(clipping_threshold)
    relative = optax.scale_by_param_block_rms()

    def moments(param: Float[Array, "*D"]) -> tuple[Any, ...]:
        return tuple(rms.init(param)[1:])

    def one(grad: Any, param: Any, row: Any, column: Any, whole: Any, count: Any, rate: Any) -> Any:
        update, state = rms.update(grad, optax.FactoredState(count, row, column, whole), param)
        update, _ = clip.update(update, optax.EmptyState())
        update, _ = relative.update(-rate * update, optax.EmptyState(), param)
        return update, *state[1:]

    def apart(results: Any) -> list[Any]:
        """Turn a tree of tuples into one tree for each of their entries."""
        structure = jax.tree.structure(specs)
        tuples = jax.tree.leaves(results, is_leaf=lambda node: isinstance(node, tuple))
        return [jax.tree.unflatten(structure, each) for each in zip(*tuples, strict=True)]

    def init(params: Params) -> optax.FactoredState:
        trees = apart(on_each_matrix(moments, specs, params))
        return optax.FactoredState(jnp.zeros((), jnp.int32), *trees)

    def update(
        updates: Params, state: optax.FactoredState, params: Params | None = None
    ) -> tuple[Params, optax.FactoredState]:
        assert params is not None, "the rate is relative to the parameters"
        count, *trees = state
        shared = (count, schedule(count))
        results = on_each_matrix(one, specs, updates, params, *trees, shared=shared)
        updates, *trees = apart(results)
        return updates, optax.FactoredState(optax.safe_increment(count), *trees)

    return optax.GradientTransformation(init, update)
