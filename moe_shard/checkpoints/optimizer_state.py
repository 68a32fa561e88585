"""Map the optimizer's state between a checkpoint and a run that differ in wrappers only.

The statistic of `skip_step_on_spikes` may be on one side alone, or be of another length: then the
run starts one of its own, or goes on without. All else has to be the same arrays.

optax nests the states of chained transformations in tuples: with gradient clipping, Adam's moments
are in the second part of a pair, without it they are not. What is the same is the names on the way
to an array (`mu`, the parameter's path) and the order of arrays of one name (`count` of Adam, then
that of the schedule).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from moe_shard.errors import UserError
from moe_shard.program.spikes import History, WithHistory, no_history

_Name = tuple[str, ...]


@dataclass(frozen=True)
class Saved:
    """Describe an optimizer's state as a checkpoint has it.

    Attributes:
        arrays: what to read: shapes, dtypes and shardings.
        back: makes the run's state of what was read.
        lines: what differs, for people.
    """

    arrays: Any
    back: Callable[[Any], Any]
    lines: tuple[str, ...] = ()


def as_saved(found: Any, wanted: Any, replicated: jax.sharding.Sharding) -> Saved:
    """Describe a run's state as a checkpoint has it.

    Args:
        found: the structure of the checkpoint's state; each leaf has a `shape` and a `dtype`. None
            if it is not known.
        wanted: shapes, dtypes and shardings of the run's state.
        replicated: places an array whole on every device.

    Raises:
        UserError: the two do not hold the same arrays.
    """
    if found is None:
        return Saved(wanted, lambda read: read)
    there: Any = None
    here: Any = None
    if isinstance(found, dict) and {*found} == {*WithHistory._fields}:
        there = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated)
            for name, leaf in found["history"].items()
        }
        there, found = History(**there), found["inner"]
    if isinstance(wanted, WithHistory):
        wanted, here = wanted
    arranged = arranged_as(found, wanted)
    lines = []
    if arranged is not wanted:
        lines.append(
            "the optimizer's state was saved with other wrappers (clipping) and is the same"
        )
    same: bool = there is not None and here is not None and there.losses.shape == here.losses.shape
    if here is not None and not same:
        why = "none was saved" if there is None else f"the saved one is of {there.losses.size}"
        lines.append(f"a statistic of {here.losses.size} steps for spikes begins: {why}")
    elif there is not None and here is None:
        lines.append("the saved statistic for spikes is dropped (skip_step_on_spikes=false)")

    def back(read: Any) -> Any:
        history: Any = None
        inner, history = read if there is not None else (read, None)
        inner = arranged_back(inner, wanted)
        if here is None:
            return inner
        return WithHistory(inner, history if same else _begun(here))

    arrays = arranged if there is None else WithHistory(arranged, here if same else there)
    return Saved(arrays, back, tuple(lines))


def _begun(history: History) -> History:
    """Return a statistic of no steps, placed like a description of it."""
    places = jax.tree.map(lambda leaf: leaf.sharding, history)
    begin = partial(no_history, history.losses.size)
    begun: History = jax.jit(begin, out_shardings=places)()
    return begun


def arranged_as(found: Any, wanted: Any) -> Any:
    """Return a state's arrays in the arrangement that a checkpoint has.

    Args:
        found: the structure of the checkpoint's state; each leaf has a `shape`.
        wanted: the state's arrays, or their shapes and shardings.

    Returns:
        `wanted` itself where the arrangement is the same or is not known; else its leaves in the
        containers of `found`.

    Raises:
        UserError: the two do not hold the same arrays.
    """
    if found is None or _paths(found) == _paths(wanted):
        return wanted
    there, here = _by_name(found), _by_name(wanted)
    for name in sorted({*there, *here}):
        shapes = [[tuple(leaf.shape) for leaf in side.get(name, [])] for side in (there, here)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"the optimizer's state has other arrays in the checkpoint: {'.'.join(name)} "
                f"{_words(shapes[0])} there, {_words(shapes[1])} in this run\n"
                "fix: the optimizer's keys as in config.yml of the run that saved it"
            )
    return _filled(found, here)


def arranged_back(read: Any, wanted: Any) -> Any:
    """Return what was read in the arrangement that the run has, the inverse of `arranged_as`.

    Args:
        read: arrays in the arrangement of the checkpoint.
        wanted: the run's state, or its shapes.
    """
    if _paths(read) == _paths(wanted):
        return read
    return _filled(wanted, _by_name(read))


def _filled(containers: Any, leaves: dict[_Name, list[Any]]) -> Any:
    """Return containers with the leaves of the same names, in their order."""
    queues = {name: iter(each) for name, each in leaves.items()}
    return jax.tree_util.tree_map_with_path(lambda path, _: next(queues[_name(path)]), containers)


def _by_name(tree: Any) -> dict[_Name, list[Any]]:
    found: dict[_Name, list[Any]] = defaultdict(list)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        found[_name(path)].append(leaf)
    return found


def _paths(tree: Any) -> list[_Name]:
    return [tuple(_keys(path)) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def _name(path: Any) -> _Name:
    """Return the names in a path, without the positions in tuples that wrappers change."""
    return tuple(key for key in _keys(path) if not key.isdecimal())


def _keys(path: Any) -> Iterator[str]:
    for key in path:
        yield jax.tree_util.keystr((key,), simple=True)


def _words(shapes: list[tuple[int, ...]]) -> str:
    return " and ".join(map(str, shapes)) or "is not"
