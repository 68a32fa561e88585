"""Convert states between the layouts of the experts: gate and up separate, or as one array.

A run may be continued with the other value of `prefuse_moe_weights`. Only the experts' gate and up
and their biases differ, in the parameters and in the trees of the same form that an optimizer
keeps; so any tree is searched for experts, whatever it holds. A model that is loaded for generation
is converted here too, once, and not in each call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from moe_shard.autoep.host_blocks import HostBlock
from moe_shard.moe.weights import fuse, unfuse

Tree = TypeVar("Tree")
Abstract = jax.ShapeDtypeStruct
ExpertArrays = dict[str, Any]
"""`gate_up` or `gate` and `up`, and `down`, and likewise their biases: arrays or descriptions of
arrays."""

_EXPERTS = "experts"


class _Pair(NamedTuple):
    """Hold the names of what is one array in one layout and two in the other."""

    both: str
    gate: str
    up: str


_PAIRS = (_Pair("gate_up", "gate", "up"), _Pair("gate_up_bias", "gate_bias", "up_bias"))


def is_fused(tree: Any) -> bool | None:
    """Return whether a tree has gate and up as one; None if it has no experts.

    Args:
        tree: parameters or a tree that contains them, with leaves of any kind.
    """
    for node in jax.tree.leaves(tree, is_leaf=_has_experts):
        if _has_experts(node):
            return "gate_up" in node[_EXPERTS]
    return None


def other_layout(abstract: Tree) -> Tree:
    """Describe the same state in the other layout, with each shard on the same device.

    Args:
        abstract: a tree of `ShapeDtypeStruct`s, all placed by `NamedSharding`s.
    """

    def change(experts: ExpertArrays) -> ExpertArrays:
        new = dict(experts)
        for pair in _PAIRS:
            if pair.both in new:
                new[pair.gate] = new[pair.up] = _without_pair(new.pop(pair.both))
            elif pair.gate in new:
                new[pair.both] = _with_pair(new.pop(pair.gate))
                del new[pair.up]
        return new

    return _map_experts(change, abstract)


def to_layout(tree: Tree, wanted: Any) -> Tree:
    """Convert arrays to the layout of `wanted`, bit for bit; those that have it are untouched.

    Converted arrays are freed as soon as they have been read, so that besides the state memory
    holds the gate and up of one tree at most, not a second state.

    Args:
        tree: a tree of arrays, in either layout.
        wanted: a tree of `ShapeDtypeStruct`s with shardings, in the target layout.
    """

    def change(experts: ExpertArrays, wanted: ExpertArrays) -> ExpertArrays:
        new = dict(experts)
        old: list[Any] = []
        for pair in _PAIRS:
            if pair.both in wanted and pair.gate in experts:
                halves = new.pop(pair.gate), new.pop(pair.up)
                if _is_masked(halves[0]):
                    new[pair.both] = halves[0]
                    continue
                place = wanted[pair.both].sharding
                new[pair.both] = jax.jit(fuse, out_shardings=place)(*halves)
                old += halves
            elif pair.gate in wanted and pair.both in experts:
                whole = new.pop(pair.both)
                if _is_masked(whole):
                    new[pair.gate] = new[pair.up] = whole
                    continue
                places = wanted[pair.gate].sharding, wanted[pair.up].sharding
                new[pair.gate], new[pair.up] = jax.jit(unfuse, out_shardings=places)(whole)
                old.append(whole)
        for name, array in new.items():
            assert _is_masked(array) or array.shape == wanted[name].shape, (name, new, wanted)
        # Donating them would free nothing and warn: no output has their shape.
        for array in old:
            array.delete()
        return new

    return _map_experts(change, tree, wanted)


def apart(block: HostBlock) -> Iterator[HostBlock]:
    """Split a part of a parameter as in the layout with gate and up separate.

    Args:
        block: a part of any parameter, in either layout.
    """
    *outer, name = block.param
    pair = next((pair for pair in _PAIRS if outer[-1:] == [_EXPERTS] and name == pair.both), None)
    if pair is None:
        yield block
        return
    shape, bounds = ((*whole[:-2], whole[-1]) for whole in (block.shape, block.bounds))
    first, _ = block.bounds[-2]
    for half in range(block.values.shape[-2]):
        part = (pair.gate, pair.up)[first + half]
        yield HostBlock((*outer, part), shape, bounds, block.values[..., half, :])


def _map_experts(change: Callable[..., ExpertArrays], tree: Tree, *others: Any) -> Tree:
    """Return a tree with all its experts changed, wherever they are in it."""

    def at(node: Any, *nodes: Any) -> Any:
        if not _has_experts(node):
            return node
        changed = change(node[_EXPERTS], *(other[_EXPERTS] for other in nodes))
        return {**node, _EXPERTS: changed}

    mapped: Tree = jax.tree.map(at, tree, *others, is_leaf=_has_experts)
    return mapped


def _has_experts(node: Any) -> bool:
    return isinstance(node, dict) and _EXPERTS in node


def _is_masked(leaf: Any) -> bool:
    """Return whether a tree of one optimizer has nothing here, as another one has the parameter."""
    return isinstance(leaf, optax.MaskedNode)


def _with_pair(part: Abstract) -> Abstract:
    """Describe [*E H] as [*E 2 H], the new dim unsharded."""
    if _is_masked(part):
        return part
    *outer, last = _entries(part)
    shape = (*part.shape[:-1], 2, part.shape[-1])
    return _placed(part, shape, (*outer, None, last))


def _without_pair(whole: Abstract) -> Abstract:
    """Describe [*E 2 H] as [*E H]."""
    if _is_masked(whole):
        return whole
    *outer, _, last = _entries(whole)
    return _placed(whole, (*whole.shape[:-2], whole.shape[-1]), (*outer, last))


def _entries(leaf: Abstract) -> list[Any]:
    """Return the spec's entry for each dim of a leaf; a spec may omit the last ones."""
    spec = leaf.sharding.spec
    return [*spec, *[None] * (len(leaf.shape) - len(spec))]


def _placed(like: Abstract, shape: tuple[int, ...], entries: tuple[Any, ...]) -> Abstract:
    sharding: NamedSharding = like.sharding.update(spec=PartitionSpec(*entries))
    return jax.ShapeDtypeStruct(shape, like.dtype, sharding=sharding)
