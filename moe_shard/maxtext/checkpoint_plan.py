"""Plan which part of a MaxText checkpoint fills which part of which parameter.

A plan is made from names and shapes. Only the names tell how a checkpoint was made: layer by layer,
in a scan over layers, or in a scan over turns of a cycle of layers. A plan uses each tensor and
fills each parameter; anything else is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from moe_shard.autoep.param_shapes import EXPERTS, Slot, slots_of
from moe_shard.config.keys import shown
from moe_shard.config.model_config import ModelConfig
from moe_shard.errors import UserError
from moe_shard.maxtext.tensor_paths import (
    OUTER,
    STACKS,
    Candidate,
    Selection,
    Weight,
    candidates,
    weight,
)
from moe_shard.models.cycles import stacks_of

Path = tuple[str, ...]
Shape = tuple[int, ...]
_QUERY = ("query", "query_bias")


class Part(NamedTuple):
    """Describe what fills a parameter, for one layer of its stack or as a whole.

    Attributes:
        tensor: path of the tensor in the checkpoint.
        axis: the tensor's dim of layers; None: it belongs to one layer.
        at: index along that dim.
        take: the part of the other dims; empty: all of them.
    """

    tensor: str
    axis: int | None
    at: int
    take: Selection


@dataclass(frozen=True)
class CheckpointPlan:
    """Hold the plan of all weights of a checkpoint.

    Attributes:
        parts: path of a parameter -> its part for each layer of its stack.
        outer: paths of the parameters outside the layers, which have one part and no dim of layers.
        factors: path of a parameter -> factor of its tensors, where that is not 1.
        lines: notes for people on how it is read.
    """

    parts: Mapping[Path, tuple[Part, ...]]
    outer: frozenset[Path]
    factors: Mapping[Path, float]
    lines: tuple[str, ...]


class _Stored(NamedTuple):
    """Describe a tensor of layers.

    Attributes:
        path: its path in the checkpoint.
        shape: its whole shape.
        at: index of the layer along the dim of layers; None: the tensor has one layer only.
        layers: number of layers along that dim.
        variable: see `tensor_paths.Weight`.
    """

    path: str
    shape: Shape
    at: int | None
    layers: int
    variable: bool


def make_plan(tensors: Mapping[str, Shape], model: ModelConfig, where: str) -> CheckpointPlan:
    """Find the tensors that fill every parameter.

    Args:
        tensors: path in the checkpoint, parts joined by "/" -> shape.
        model: the model that has the parameters.
        where: the checkpoint, for messages.

    Raises:
        UserError: a tensor is missing, has another shape, or fills no parameter.
    """
    return _Planner(tensors, model, where).plan()


class _Planner:
    def __init__(self, tensors: Mapping[str, Shape], model: ModelConfig, where: str) -> None:
        self.tensors, self.model, self.where = tensors, model, where
        self.weights: dict[str, tuple[str, Weight]] = {}
        self.unread = 0
        for path in sorted(tensors):
            found = weight(path)
            if found is None:
                self.unread += 1
                continue
            if found.name in self.weights:
                raise self._error(
                    f"both {self.weights[found.name][0]} and {path} are {found.name}",
                    "a checkpoint with one of the two",
                )
            self.weights[found.name] = path, found
        self.used: set[str] = set()
        self.axes: dict[str, set[int]] = {}

    def plan(self) -> CheckpointPlan:
        if self.model.mtp_kinds:
            raise self._error(
                "layers of multi-token prediction are not read from MaxText's checkpoints",
                "mtp_num_layers=0 for a checkpoint without them",
            )
        layers = self._by_layer()
        slots = slots_of(self.model)
        found = {
            tuple(role.split(".")): [self._outer(role, slot)] for role, slot in slots.outer.items()
        }
        outer = frozenset(found)
        for stack, _, numbers in stacks_of(self.model.layer_kinds):
            for role, slot in slots.layers[stack].items():
                path = (stack, *role.split("."))
                found[path] = [self._inner(role, slot, n, layers[n]) for n in numbers]
        self._refuse_the_rest()
        axis = self._axis()
        parts = {
            path: tuple(self._part(stored, place, axis) for stored, place in each)
            for path, each in found.items()
        }
        factors, lines = self._query_factors(found)
        return CheckpointPlan(parts, outer, factors, (*self._lines(axis), *lines))

    # ------------------------------------------------------------ layers

    def _by_layer(self) -> list[dict[str, _Stored]]:
        """Return the tensors of each layer, by their names within it."""
        matches = {name: STACKS.fullmatch(name) for name in self.weights}
        cycle = 1 + max((int(m["place"]) for m in matches.values() if m and m["place"]), default=0)
        kinds = self.model.layer_kinds
        dense = next((n for n, kind in enumerate(kinds) if kind.moe), len(kinds))
        spans = {
            "layers": range(len(kinds)),
            "dense_layers": range(dense),
            "moe_layers": range(dense, len(kinds)),
        }
        table: list[dict[str, _Stored]] = [{} for _ in kinds]
        for name, match in matches.items():
            if match is None:
                continue
            path, found = self.weights[name]
            span = spans[match["stack"]]
            if match["number"] is not None:
                number = int(match["number"])
                if number >= len(span):
                    raise self._other_count(path, f"layer {number}", len(span), match["stack"])
                stored = _Stored(path, self.tensors[path], None, 1, found.variable)
                table[span[number]][match["rest"]] = stored
                continue
            step = cycle if match["place"] else 1
            if len(span) % step:
                raise self._other_count(path, f"turns of {step} layers", len(span), match["stack"])
            first, turns = int(match["place"] or 0), len(span) // step
            for turn in range(turns):
                layer = span[first + turn * step]
                stored = _Stored(path, self.tensors[path], turn, turns, found.variable)
                table[layer][match["rest"]] = stored
        return table

    def _other_count(self, path: str, there: str, here: int, stack: str) -> UserError:
        kinds = {"dense_layers": "dense ", "moe_layers": "MoE "}
        return self._error(
            f"{path} is of {there}; this model has {here} {kinds.get(stack, '')}layers",
            "the model's own file, or base_num_decoder_layers and first_num_dense_layers as there",
        )

    # ------------------------------------------------------------ one parameter

    def _outer(self, role: str, slot: Slot) -> tuple[_Stored, Candidate]:
        name = OUTER.get(role)
        if name is None or name not in self.weights:
            raise self._missing(role, [name] if name else [])
        path, found = self.weights[name]
        stored = _Stored(path, self.tensors[path], None, 1, found.variable)
        self._check(stored, Candidate(name, slot.shape), slot)
        return stored, Candidate(name, slot.shape)

    def _inner(
        self, role: str, slot: Slot, layer: int, table: Mapping[str, _Stored]
    ) -> tuple[_Stored, Candidate]:
        shape = slot.shape
        if role.startswith(EXPERTS):
            shape = (self.model.num_experts, *shape)
            slot = slot._replace(keys=("num_experts", *slot.keys))
        known = list(candidates(role, shape, self.model))
        place = next((place for place in known if place.name in table), None)
        if place is None:
            raise self._missing(f"{role} of layer {layer}", [place.name for place in known])
        stored = table[place.name]
        self._check(stored, place, slot)
        return stored, place

    def _check(self, stored: _Stored, place: Candidate, slot: Slot) -> None:
        self.used.add(stored.path)
        if stored.at is None:
            if stored.shape != place.shape:
                raise self._other_shape(stored, place.shape, slot, "")
            return
        fits = {
            axis
            for axis in (0, 1)
            if axis <= len(place.shape)
            and stored.shape == (*place.shape[:axis], stored.layers, *place.shape[axis:])
        }
        if not fits:
            one = [self._without(stored.shape, axis) for axis in (1, 0)]
            if place.shape in one:
                axis = (1, 0)[one.index(place.shape)]
                raise self._error(
                    f"{stored.path} has {stored.shape[axis]} layers along dim {axis}, "
                    f"this model {stored.layers} there",
                    "the model's own file, or base_num_decoder_layers and "
                    "first_num_dense_layers as there",
                )
            wanted = (place.shape[0], stored.layers, *place.shape[1:])
            raise self._other_shape(stored, wanted, slot, ", the layers along dim 1")
        if not stored.variable:
            self.axes[stored.path] = fits

    @staticmethod
    def _without(shape: Shape, axis: int) -> Shape:
        return (*shape[:axis], *shape[axis + 1 :])

    def _axis(self) -> int:
        """Return the dim along which layers are stacked; MaxText's default is 1."""
        common = set.intersection({0, 1}, *self.axes.values())
        if common:
            return max(common)
        odd = {axis: next(p for p, axes in self.axes.items() if axes == {axis}) for axis in (0, 1)}
        raise self._error(
            f"layers are stacked along dim 0 in {odd[0]} and along dim 1 in {odd[1]}",
            "one param_scan_axis for all",
        )

    def _part(self, stored: _Stored, place: Candidate, axis: int) -> Part:
        if stored.at is None:
            return Part(stored.path, None, 0, place.take)
        if stored.variable:
            along = 0
        elif axis not in self.axes[stored.path]:
            (along,) = self.axes[stored.path]
        else:
            along = axis
        return Part(stored.path, along, stored.at, place.take)

    # ------------------------------------------------------------ the factor of the scores

    def _query_factors(
        self, found: Mapping[Path, list[tuple[_Stored, Candidate]]]
    ) -> tuple[dict[Path, float], list[str]]:
        """Return the factors of queries, where MaxText's scores have another factor.

        MaxText's Llama-2, Mistral and Mixtral blocks do not scale scores: one over the root of a
        head's size is part of the query's weights. Here the factor is `attention_scale`.
        """
        attention = self.model.attention
        usual = 1 / math.sqrt(attention.head_dim)
        here = usual if attention.attention_scale == -1 else attention.attention_scale
        if (
            attention.attention_type == "mla"
            or attention.use_qk_norm
            or not self._factor_in_query()
        ):
            return {}, []
        if here == 1:
            return {}, []
        paths = [path for path in found if path[1:] in {("attention", name) for name in _QUERY}]
        line = (
            "MaxText gives this block's scores no factor: its queries are read times "
            f"{1 / here:g} (attention_scale=1 takes them as they are)"
        )
        return dict.fromkeys(paths, 1 / here), [line]

    def _factor_in_query(self) -> bool:
        """Return whether the block's query weights include the factor."""
        rests = {match["rest"] for name in self.weights if (match := STACKS.fullmatch(name))}
        experts = any(rest.startswith("MoeBlock_0/") for rest in rests)
        others = any("Block_0/" in rest or rest.startswith("moe_block/") for rest in rests)
        bias = any(rest.endswith(("query/bias", "qkv_proj/bias", "sinks")) for rest in rests)
        return experts or not (others or bias)

    # ------------------------------------------------------------ what is reported

    def _lines(self, axis: int) -> Iterator[str]:
        if self.axes:
            yield f"layers are stacked along dim {axis} there (MaxText's param_scan_axis)"
        if self.unread:
            yield (
                f"{self.unread} arrays of the optimizer, the step and random numbers are not read"
            )

    def _refuse_the_rest(self) -> None:
        rest = sorted(path for path, _ in self.weights.values() if path not in self.used)
        if rest:
            more = f" (and {len(rest) - 1} more)" if len(rest) > 1 else ""
            raise self._error(
                f"{rest[0]}, of shape {shown(self.tensors[rest[0]])}, is no parameter of this "
                f"model{more}",
                "the model's own file; what is not built here cannot be left out",
            )

    def _missing(self, what: str, names: list[str]) -> UserError:
        called = (
            f"which MaxText calls\n{' or '.join(names)}" if names else "and MaxText has none either"
        )
        fix = "the model's own file"
        if "router.correction_bias" in what:
            fix = "the whole training state: what MaxText saves of parameters alone lacks it"
        return self._error(f"no tensor for {what}, {called}", fix)

    def _other_shape(self, stored: _Stored, wanted: Shape, slot: Slot, how: str) -> UserError:
        return self._error(
            f"{stored.path} has shape {shown(stored.shape)}, not {shown(wanted)}{how}",
            f"{', '.join(slot.keys)} as there",
        )

    def _error(self, what: str, fix: str) -> UserError:
        return UserError(f"{self.where}: {what}\nfix: {fix}")
