"""Find the tensor that fills each parameter, and check its shape."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from moe_shard.autoep.family import Family
from moe_shard.autoep.fused import Fused, read_fused
from moe_shard.autoep.headers import TensorHeader
from moe_shard.autoep.param_shapes import TAPS, Slot, slots_of
from moe_shard.autoep.tensor_names import (
    FUSED,
    LISTED,
    Names,
    Place,
    expected,
    named_roles,
    switch_of,
)
from moe_shard.autoep.tensor_plan import Layout, Piece
from moe_shard.config.keys import shown
from moe_shard.config.model_config import ModelConfig
from moe_shard.errors import UserError
from moe_shard.models.cycles import all_stacks

_FUSED, _WITHOUT_GATE = ("gate_up", "down"), ("up", "down")
_BLOCK_NORM, _NORMS = "block_norm.scale", ("attention_norm.scale", "mlp_norm.scale")
_ROUTER, _CHOICE_BIAS = "mlp.router.kernel", "mlp.router.correction_bias"
_OF_HEADS = ("attention.", "delta.", "mamba.")
"""Prefixes of parameters whose vectors have dims of heads, which tensors flatten."""


class _Joined(NamedTuple):
    """Describe a tensor whose rows are the outputs of several parameters.

    Attributes:
        parts: the parameters.
        by_head: whether all parts of one head come before those of the next; else all heads of
            one part come before the next part.
    """

    parts: tuple[str, ...]
    by_head: bool = False


_DELTA_QKV = ("delta.query", "delta.key", "delta.value")
_JOINED = {
    "attention.query_key_value": _Joined(("attention.query", "attention.key", "attention.value")),
    "attention.query_gate": _Joined(("attention.query", "attention.gate"), by_head=True),
    "delta.query_key_value": _Joined(_DELTA_QKV),
    "delta.query_key_value_gate": _Joined((*_DELTA_QKV, "delta.gate"), by_head=True),
    "delta.rate_decay": _Joined(("delta.rate", "delta.decay"), by_head=True),
    "delta.conv": _Joined(tuple(f"{name}_conv" for name in _DELTA_QKV)),
    "convolution.in": _Joined(
        tuple(f"convolution.{part}" for part in ("input_gate", "output_gate", "value"))
    ),
    "mamba.in": _Joined(
        tuple(f"mamba.{part}" for part in ("gate", "value", "key", "query", "step"))
    ),
    "mamba.taps": _Joined(tuple(f"mamba.{part}_conv" for part in ("value", "key", "query"))),
    "mlp.gate_up": _Joined(("mlp.gate", "mlp.up")),
    "mlp.shared.gate_up": _Joined(("mlp.shared.gate", "mlp.shared.up")),
    f"{LISTED}gate_up": _Joined((f"{LISTED}gate", f"{LISTED}up")),
}
"""Role of a tensor -> the parameters whose outputs are its rows."""
_WHOLES: dict[str, list[str]] = defaultdict(list)
"""Parameter -> roles of the tensors that it may be a part of."""
for _whole, _joined in [*_JOINED.items()]:
    _biases = tuple(f"{part}_bias" for part in _joined.parts)
    _JOINED[f"{_whole}_bias"] = _joined._replace(parts=_biases)
for _whole, _joined in _JOINED.items():
    for _part in _joined.parts:
        _WHOLES[_part].append(_whole)

Explain = Callable[[tuple[str, ...]], str]
"""Maps settings to the attributes of `config.json` behind them, as `name=value, ...`."""


class Pieces:
    """Find the tensor of every parameter of one model.

    Args:
        model: the model that has the parameters.
        family: names and patterns.
        names: the tensors by role, sorted.
        headers: the tensors' headers.
        where: the directory, for messages.
        explain: names the attributes behind settings, for messages about sizes.
        beside: experts of a layer that are carried, after the model's.
    """

    def __init__(
        self,
        *,
        model: ModelConfig,
        family: Family,
        names: Names,
        headers: Mapping[str, TensorHeader],
        where: Path,
        explain: Explain,
        beside: int = 0,
    ) -> None:
        self.model, self.family, self.names = model, family, names
        self.headers, self.where, self.explain = headers, where, explain
        self.beside = beside
        self._named = named_roles(family)
        self.fused: Fused | None = None
        """How experts of the last layer seen are stored if fused; None: one by one."""
        self.partly: set[str] = set()
        """Tensors seen so far of which a part is carried."""

    def find(self) -> Iterator[Piece]:
        """Yield a piece for each part of each parameter.

        Raises:
            UserError: a tensor is missing, or its shape or the number of experts differs.
        """
        slots = slots_of(self.model)
        for role in slots.outer:
            yield self._piece(role, (), slots.outer, tuple(role.split(".")), ())
        for stack, _, numbers in all_stacks(self.model):
            for index, layer in enumerate(numbers):
                yield from self._layer(layer, slots.layers[stack], stack, index)

    def _layer(
        self, layer: int, slots: Mapping[str, Slot], stack: str, index: int
    ) -> Iterator[Piece]:
        experts = {role: slot for role, slot in slots.items() if role.startswith(LISTED)}
        for role in slots:
            if role not in experts:
                yield self._piece(role, (layer,), slots, (stack, *role.split(".")), (index,))
        if not experts:
            return
        fused = _FUSED if self.model.gating.has_gate else _WITHOUT_GATE
        is_fused = any((layer,) in self.names.roles.get(f"{FUSED}{part}", {}) for part in fused)
        if is_fused and self.names.experts(layer):
            raise UserError(
                f"{self.where}: layer {layer} has experts one by one and all in one tensor\n"
                "fix: remove one of the two"
            )
        find = self._fused if is_fused else self._listed
        yield from find(layer, experts, stack, index)

    def _fused(
        self, layer: int, slots: Mapping[str, Slot], stack: str, index: int
    ) -> Iterator[Piece]:
        """Yield the pieces of experts that are one tensor for gate and up and one for down."""
        gate = self.model.gating.has_gate
        both, back = _FUSED if gate else _WITHOUT_GATE
        inward, outward = (self._tensor(f"{FUSED}{part}", (layer,)) for part in (both, back))
        shapes = self.headers[inward].shape, self.headers[outward].shape
        self.fused = fused = read_fused(
            *shapes,
            interleaved=self.family.expert_gate_up_interleaved,
            gate=gate,
            where=f"{self.where}: {shown(inward)} and {shown(outward)}",
        )
        self._check_count(fused.experts, f"{shown(inward)} has {fused.experts} experts")
        dims, keys = slots[f"{LISTED}up"].shape, slots[f"{LISTED}up"].keys
        if dims != (fused.model_dim, fused.hidden_dim):
            layouts = "[E 2H M] or [E M 2H]" if gate else "[E H M] or [E M H]"
            raise self._other_shape(inward, keys, f"{layouts} with M, H = {shown(dims)}")
        for role in slots:
            part = role.removeprefix(LISTED)
            name = part.removesuffix("_bias")
            path = (stack, *role.split("."))
            if name == part:
                tensor = outward if name == "down" else inward
                yield Piece(tensor, path, (index,), fused.layout(name))
                continue
            tensor = self._tensor(f"{FUSED}{back if name == 'down' else both}_bias", (layer,))
            size = fused.model_dim if name == "down" else (1 + gate) * fused.hidden_dim
            if self.headers[tensor].shape != (fused.experts, size):
                raise self._other_shape(tensor, slots[role].keys, f"[{fused.experts}, {size}]")
            yield Piece(tensor, path, (index,), fused.bias_layout(name))

    def _listed(
        self, layer: int, slots: Mapping[str, Slot], stack: str, index: int
    ) -> Iterator[Piece]:
        """Yield the pieces of a layer whose experts are stored one by one."""
        found = self.names.experts(layer)
        if found:
            count = max(found) + 1
            self._check_count(count, f"layer {layer} has experts 0 to {count - 1}", self.beside)
        for expert in range(self.model.num_experts):
            place = (layer, expert)
            for role in slots:
                yield self._piece(role, place, slots, (stack, *role.split(".")), (index, expert))

    def _piece(
        self,
        role: str,
        place: Place,
        slots: Mapping[str, Slot],
        path: tuple[str, ...],
        index: Place,
    ) -> Piece:
        """Return the piece of a tensor that fills a parameter, or a layer's or expert's part."""
        slot = slots[role]
        if whole := self._whole(role, place):
            return self._part(role, whole, place, slots, path, index)
        # A layer that is one block has one of the norms, whose name says nothing of the block.
        is_block = role in _NORMS and _BLOCK_NORM in self._named
        tensor = self._tensor(_BLOCK_NORM if is_block else role, place)
        stored = self.headers[tensor].shape
        if role == _ROUTER and self.family.router_transposed:
            if stored != slot.shape:
                raise self._other_shape(tensor, slot.keys, shown(slot.shape))
            return Piece(tensor, path, index)
        allowed = _stored(role, slot)
        if role == _CHOICE_BIAS and self.beside and stored == (2, *allowed):
            self.partly.add(tensor)
            return Piece(tensor, path, index, Layout(take=(slice(1),), split=allowed))
        # Vectors of some routers and gates have a leading dim of size 1.
        if stored != allowed and not (len(allowed) == 1 and stored == (1, *allowed)):
            raise self._other_shape(tensor, slot.keys, shown(allowed))
        return Piece(tensor, path, index, _layout(slot, stored))

    def _whole(self, role: str, place: Place) -> str:
        """Return the role of the tensor that a parameter is a part of; empty where it is alone."""
        wholes = _WHOLES.get(role, [])
        there = [whole for whole in wholes if place in self.names.roles.get(whole, {})]
        if not there and role not in self._named:
            # The family has a name for what holds several parameters alone.
            there = [whole for whole in wholes if whole in self._named]
        return next(iter(there), "")

    def _part(
        self,
        role: str,
        whole: str,
        place: Place,
        slots: Mapping[str, Slot],
        path: tuple[str, ...],
        index: Place,
    ) -> Piece:
        """Return the piece of a parameter that is a part of a tensor."""
        slot, joined, tensor = slots[role], _JOINED[whole], self._tensor(whole, place)
        rows = [_stored(each, slots[each])[0] for each in joined.parts]
        stored = (sum(rows), *_stored(role, slot)[1:])
        if self.headers[tensor].shape != stored:
            keys = dict.fromkeys(key for each in joined.parts for key in slots[each].keys)
            raise self._other_shape(tensor, tuple(keys), shown(stored))
        heads = slot.shape[slot.inputs] if joined.by_head else 1
        at = joined.parts.index(role)
        end, own = sum(rows[: at + 1]) // heads, rows[at] // heads
        take = (slice(end - own, end),)
        if not joined.by_head:
            layout = replace(_layout(slot, (own, *stored[1:])), take=take)
        else:
            of_head = _layout(slot, (heads, own, *stored[1:]))
            split = (heads, stored[0] // heads, *stored[1:])
            layout = Layout(split=split, inside=replace(of_head, take=(slice(None), *take)))
        return Piece(tensor, path, index, layout)

    def _tensor(self, role: str, place: Place) -> str:
        tensor = self.names.roles.get(role, {}).get(place)
        if tensor is None:
            words = zip(("layer", "expert"), place, strict=False)
            of = "".join(f" of {word} {number}" for word, number in words)
            switch = switch_of(role)
            raise UserError(
                f"{self.where}: no tensor for {role}{of}, which family {self.family.name} calls\n"
                f"{expected(role, self.family, place)}\n"
                "fix: the rest of the files, or another config.json or hf_family"
                + (f", or {switch} in its settings" if switch else "")
            )
        return tensor

    def _check_count(self, found: int, what: str, beside: int = 0) -> None:
        if found not in (self.model.num_experts, self.model.num_experts + beside):
            known = self.explain(("num_experts",))
            known += f" and {beside} beside them" if beside else ""
            raise UserError(
                f"{self.where}: {what}, but config.json has {known}\n"
                "fix: the config.json of these tensors"
            )

    def _other_shape(self, tensor: str, keys: tuple[str, ...], expected_shape: str) -> UserError:
        return UserError(
            f"{self.where}: {shown(tensor)} has shape {shown(self.headers[tensor].shape)}, not "
            f"{expected_shape}\nas config.json has it: {self.explain(keys)}\n"
            "fix: the config.json of these tensors"
        )


def _stored(role: str, slot: Slot) -> tuple[int, ...]:
    """Return the shape in a checkpoint: [out, in] for a matrix, [out, 1, in] for taps."""
    ins, outs = slot.shape[: slot.inputs], slot.shape[slot.inputs :]
    if role.endswith(TAPS):
        return math.prod(outs), 1, math.prod(ins)
    if slot.inputs:
        return math.prod(outs), math.prod(ins)
    return (math.prod(outs),) if role.startswith(_OF_HEADS) else outs


def _layout(slot: Slot, stored: tuple[int, ...]) -> Layout:
    """Return the layout of a tensor that fills a slot: [out..., in...] flattened, or a vector."""
    if not slot.inputs:
        return Layout() if stored == slot.shape else Layout(split=slot.shape)
    ins, outs = slot.shape[: slot.inputs], slot.shape[slot.inputs :]
    split = (*outs, *ins)
    order = (*range(len(outs), len(split)), *range(len(outs)))
    return Layout(split=() if split == stored else split, order=order)
