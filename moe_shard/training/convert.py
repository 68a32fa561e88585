"""States whose experts keep gate and up apart, made into states that keep them as one, and back.

A run may be continued with the other value of `prefuse_moe_weights`. Nothing but the experts' gate
and up differs, in the parameters and in each tree that an optimizer keeps of their like; so trees
are searched for experts, and what kind of tree it is does not matter. A model that is loaded to be
used is converted here too, once, and not in each call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.sharding import NamedSharding, PartitionSpec

from moe_shard.moe.weights import fuse, unfuse

Tree = TypeVar("Tree")
Abstract = jax.ShapeDtypeStruct
Experts = dict[str, Any]
"""`gate_up` or `gate` and `up`, and `down`: arrays, or what describes arrays."""

_EXPERTS = "experts"


def is_fused(tree: Any) -> bool | None:
    """Whether a tree keeps gate and up as one; None where it has no experts.

    Args:
        tree: parameters or what holds them, of leaves of any kind.
    """
    for node in jax.tree.leaves(tree, is_leaf=_has_experts):
        if _has_experts(node):
            return "gate_up" in node[_EXPERTS]
    return None


def other_layout(abstract: Tree) -> Tree:
    """Describe the same state in the other layout, each shard of it on the same device.

    Args:
        abstract: a tree of `ShapeDtypeStruct`s, all placed by `NamedSharding`s.
    """

    def change(experts: Experts) -> Experts:
        new = dict(experts)
        if "gate_up" in new:
            new["gate"] = new["up"] = _without_pair(new.pop("gate_up"))
        else:
            new["gate_up"] = _with_pair(new.pop("gate"))
            del new["up"]
        return new

    return _map_experts(change, abstract)


def to_layout(tree: Tree, wanted: Any) -> Tree:
    """Bring arrays into the layout that is wanted, bit for bit; those that fit it are untouched.

    The arrays that are converted are freed as soon as they have been read, so that beside the state
    no more than one tree's gate and up is held, not a second state.

    Args:
        tree: of arrays, in either layout.
        wanted: a tree of `ShapeDtypeStruct`s with shardings, in the layout to be had.
    """

    def change(experts: Experts, wanted: Experts) -> Experts:
        if ("gate_up" in experts) == ("gate_up" in wanted):
            return experts
        new = dict(experts)
        if "gate_up" in wanted:
            old = [new.pop("gate"), new.pop("up")]
            place = wanted["gate_up"].sharding
            new["gate_up"] = jax.jit(fuse, out_shardings=place)(*old)
        else:
            old = [new.pop("gate_up")]
            places = wanted["gate"].sharding, wanted["up"].sharding
            new["gate"], new["up"] = jax.jit(unfuse, out_shardings=places)(*old)
        assert all(array.shape == wanted[name].shape for name, array in new.items()), (new, wanted)
        # Donated, they would be kept, with a warning: no output has their shape.
        for array in old:
            array.delete()
        return new

    return _map_experts(change, tree, wanted)


def _map_experts(change: Callable[..., Experts], tree: Tree, *others: Any) -> Tree:
    """A tree with all its experts changed, wherever in it they are."""

    def at(node: Any, *nodes: Any) -> Any:
        if not _has_experts(node):
            return node
        changed = change(node[_EXPERTS], *(other[_EXPERTS] for other in nodes))
        return {**node, _EXPERTS: changed}

    mapped: Tree = jax.tree.map(at, tree, *others, is_leaf=_has_experts)
    return mapped


def _has_experts(node: Any) -> bool:
    return isinstance(node, dict) and _EXPERTS in node


def _with_pair(part: Abstract) -> Abstract:
    """[*E M H] to [*E M 2 H], the new dim whole on every device."""
    *outer, last = _entries(part)
    shape = (*part.shape[:-1], 2, part.shape[-1])
    return _placed(part, shape, (*outer, None, last))


def _without_pair(whole: Abstract) -> Abstract:
    """[*E M 2 H] to [*E M H]."""
    *outer, _, last = _entries(whole)
    return _placed(whole, (*whole.shape[:-2], whole.shape[-1]), (*outer, last))


def _entries(leaf: Abstract) -> list[Any]:
    """What a leaf's spec says of each dim; a spec may leave out the last ones."""
    spec = leaf.sharding.spec
    return [*spec, *[None] * (len(leaf.shape) - len(spec))]


def _placed(like: Abstract, shape: tuple[int, ...], entries: tuple[Any, ...]) -> Abstract:
    sharding: NamedSharding = like.sharding.update(spec=PartitionSpec(*entries))
    return jax.ShapeDtypeStruct(shape, like.dtype, sharding=sharding)
