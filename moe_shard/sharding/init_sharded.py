"""Create a model's variables where the rule table places them, whoever wrote the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import meta
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from moe_shard.errors import UserError
from moe_shard.sharding.annotate import Sharding, with_auto_axes
from moe_shard.sharding.parameter import logical_axes_of

M = TypeVar("M")


def init_sharded(
    build: Callable[[nnx.Rngs], M], *, rngs: nnx.Rngs, sharding: Sharding | None = None
) -> M:
    """Build a model whose parameters are created on the devices that the rule table names.

    No array is allocated whole: `build` is traced, each variable is placed by the logical axes of
    its dims, and one compiled program creates the shards, each device its own.

    >>> import jax, moe_shard as ms
    >>> from flax import nnx
    >>> sharding = ms.Sharding(ms.make_mesh(data=2, expert=4), ms.RuleTable.default())
    >>> class Model(nnx.Module):
    ...     def __init__(self, rngs):
    ...         names = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("vocab", "embed"))
    ...         self.embed = nnx.Embed(64, 32, embedding_init=names, rngs=rngs)
    ...         config = ms.MoEConfig(num_experts=8, num_experts_per_tok=2, moe_mlp_dim=64)
    ...         self.moe = ms.MoELayer(config, model_dim=32, sharding=sharding, rngs=rngs)
    >>> model = ms.init_sharded(Model, rngs=nnx.Rngs(0))
    >>> model.moe.experts.down.sharding.spec
    P('expert', None, None)
    >>> model.embed.embedding.sharding.spec
    P(None, 'expert')

    Dims are named by Flax's own means: `nnx.with_partitioning` or the metadata `out_sharding` of a
    variable, `nn.with_logical_partitioning` in Linen, `transform_metadata={nnx.PARTITION_NAME:
    "layers"}` for the dim that `nnx.vmap` stacks along. The names are logical axes, which the
    table has rules for. Variables without names, such as biases, statistics of batches and
    counters of random numbers, are replicated. While `build` runs, Flax's own placing of
    variables (`nnx.use_eager_sharding`) is off, and the axes of the mesh are Auto.

    Args:
        build: makes the model; it is traced twice, so it must not store what it makes elsewhere. It
            returns an `nnx.Module` (or an `nnx.Optimizer`, or a tuple of them), or variables of a
            Linen model: `lambda rngs: model.init(rngs.params(), x)`.
        rngs: passed to `build`, and left in the state in which it leaves them.
        sharding: the mesh and its rules. By default the one that the modules hold, such as a
            `MoELayer`.

    Raises:
        UserError: no sharding is given and the modules hold none, or different ones; a dim's name
            has no rule; names do not fit the dims; a dim is not divisible; see `Sharding`.
    """
    with nnx.use_eager_sharding(False), _without_explicit_axes():
        _leave_uncommitted(rngs, only=_has_explicit_type)
        abstract = _shapes_of(build, rngs)
        sharding = _agreed(sharding, list(_held(abstract)))
        if not isinstance(sharding.mesh, Mesh):
            raise UserError(
                "init_sharded: the mesh is abstract, it has no devices\n"
                "fix: a mesh of make_mesh or jax.make_mesh"
            )
        places: dict[str, NamedSharding] = {}

        def resolve(name: str, variable: Any, value: Any) -> Any:
            places[name] = place(name, variable, value, sharding)
            return value

        _map_values(resolve, abstract)

        def placed(rngs: nnx.Rngs) -> M:
            def pin(name: str, _variable: Any, value: Any) -> Any:
                return jax.lax.with_sharding_constraint(value, places[name])

            return _map_values(pin, build(rngs))

        model: M = nnx.jit(placed)(rngs)

    # The same shards, on the mesh as it was given, with the specs of the table.
    def outside(name: str, _variable: Any, value: Any) -> Any:
        return jax.device_put(value, sharding.outside(places[name]))

    model = _map_values(outside, model)
    own = {
        id(node)
        for part in jax.tree.leaves(model, is_leaf=_is_module)
        if _is_module(part)
        for _, node in nnx.iter_graph(part)
    }
    _leave_uncommitted(rngs, only=lambda variable: id(variable) not in own)
    return model


def _shapes_of(build: Callable[[nnx.Rngs], M], rngs: nnx.Rngs) -> M:
    """Trace `build` and return the model with shapes for values; `rngs` are unchanged.

    `nnx.eval_shape` cannot be used: in a mesh context it reads the names of dims as mesh axes.
    """
    graph, state = nnx.split(rngs)
    graphs = []

    def trace(state: Any) -> Any:
        found, values = nnx.split(build(nnx.merge(graph, state)))
        graphs.append(found)
        return values

    values = jax.eval_shape(trace, state)
    model: M = nnx.merge(graphs[0], values)
    return model


def place(name: str, variable: Any, value: Any, sharding: Sharding) -> NamedSharding:
    """Resolve the placement of a variable; without names for its dims it is replicated.

    Args:
        name: its name in messages and reports.
        variable: an `nnx.Variable` or a Linen box, which may name the dims; or any array.
        value: its value, or a description of it.
        sharding: the mesh and its rules.

    Raises:
        UserError: see `init_sharded`.
    """
    axes = logical_axes_of(variable, name)
    if axes is None:
        return NamedSharding(sharding.mesh, PartitionSpec())
    if len(axes) != len(value.shape):
        raise UserError(
            f"{name}: {len(value.shape)} dims {tuple(value.shape)} have {len(axes)} names {axes}\n"
            "fix: a name or None per dim; nnx.vmap adds that of a stacked dim by "
            'transform_metadata={nnx.PARTITION_NAME: "layers"}'
        )
    return sharding.named_sharding(name, axes, value.shape, dtype=value.dtype)


_Change = Callable[[str, Any, Any], Any]
"""(name, variable, value) -> value"""


def _map_values(change: _Change, model: M) -> M:
    """Change the value of every variable and array of a model; modules are changed in place."""

    def of_part(path: tuple[Any, ...], part: Any) -> Any:
        prefix = jax.tree_util.keystr(path, simple=True, separator=".")
        if not _is_module(part):
            return of_leaf(prefix, part)
        state = nnx.map_state(
            lambda path, leaf: of_leaf(".".join([*filter(None, [prefix]), *map(str, path)]), leaf),
            nnx.state(part),
        )
        nnx.update(part, state)
        return part

    def of_leaf(name: str, leaf: Any) -> Any:
        if isinstance(leaf, nnx.Variable):
            return leaf.replace(_of_value(change, name, leaf, leaf.get_raw_value()))
        if isinstance(leaf, meta.AxisMetadata):
            value = leaf.value  # type: ignore[attr-defined]  # every box of Flax has one
            return leaf.replace_boxed(_of_value(change, name, leaf, value))
        return _of_value(change, name, leaf, leaf)

    return jax.tree_util.tree_map_with_path(
        of_part, model, is_leaf=lambda x: _is_module(x) or isinstance(x, meta.AxisMetadata)
    )


def _of_value(change: _Change, name: str, variable: Any, value: Any) -> Any:
    """Change a value; in a tree of arrays change each of them, without names for its dims."""
    if hasattr(value, "shape"):
        return change(name, variable, value)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: change(name + jax.tree_util.keystr(path), leaf, leaf), value
    )


def _is_module(part: Any) -> bool:
    return isinstance(part, nnx.Pytree | nnx.Variable)


def _held(model: Any) -> Iterator[Sharding]:
    """Yield the shardings that the modules of a model hold as attributes."""
    for part in jax.tree.leaves(model, is_leaf=_is_module):
        for _, node in nnx.iter_graph(part) if _is_module(part) else ():
            if isinstance(node, nnx.Pytree):
                yield from (each for each in vars(node).values() if isinstance(each, Sharding))


def _agreed(given: Sharding | None, held: Sequence[Sharding]) -> Sharding:
    """Return the one sharding of a model.

    Raises:
        UserError: there is none, or they differ.
    """
    known = list(dict.fromkeys([*([given] if given else []), *held]))
    if not known:
        raise UserError(
            "init_sharded: no module of the model holds a Sharding, so nothing says where "
            "parameters live\nfix: init_sharded(build, rngs=rngs, sharding=Sharding(mesh, rules))"
        )
    if len(known) > 1:
        raise UserError(
            f"init_sharded: two different shardings, {known[0]} and {known[1]}\n"
            "fix: one Sharding for the whole model, handed to every module and to init_sharded"
        )
    return known[0]


@contextmanager
def _without_explicit_axes() -> Iterator[None]:
    """Make the Explicit axes in force Auto within the block.

    Under Explicit axes every array has a sharding in its type, random numbers too, and until they
    are resharded they are replicated: each device would make all of them.
    """
    current = jax.sharding.get_mesh()
    if current.empty or AxisType.Explicit not in current.axis_types:
        yield
        return
    mesh = with_auto_axes(current)
    assert isinstance(mesh, Mesh), mesh
    try:
        with jax.set_mesh(mesh):
            yield
    except ValueError as error:
        if "should match the aval mesh" not in str(error):
            raise
        raise UserError(
            "init_sharded: build uses an array that was made outside of it, on Explicit axes\n"
            "fix: make arrays inside of build, where the axes are Auto"
        ) from error


def _has_explicit_type(variable: nnx.Variable[Any]) -> bool:
    mesh = jax.typeof(variable.get_value()).sharding.mesh
    return AxisType.Explicit in mesh.axis_types


def _leave_uncommitted(rngs: nnx.Rngs, *, only: Callable[[nnx.Variable[Any]], bool]) -> None:
    """Take the state of random numbers off every mesh, so that it can be used anywhere."""
    for _, variable in nnx.iter_graph(rngs):
        if isinstance(variable, nnx.Variable) and only(variable):
            variable.set_value(_on_no_device(variable.get_value()))


def _on_no_device(array: Array) -> Array:
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        data = jnp.asarray(np.asarray(jax.random.key_data(array)))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(array))
    return jnp.asarray(np.asarray(array))
