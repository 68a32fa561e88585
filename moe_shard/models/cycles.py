"""Group a model's layers into cycles of repeating kinds, each of which is one scan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from moe_shard.config.model_config import LayerKind, ModelConfig

PREDICTION = "mtp"
"""Name of the stack of MTP layers, which are no part of any cycle."""


@dataclass(frozen=True)
class Cycle:
    """Describe layers that run as one scan: a few kinds in sequence, repeated.

    Attributes:
        first: number of its first layer.
        kinds: kinds of the layers of one turn.
        turns: number of repetitions.
        alone: whether the model has no other cycle.
    """

    first: int
    kinds: tuple[LayerKind, ...]
    turns: int
    alone: bool = False

    @property
    def layers(self) -> int:
        """Count the layers of all turns."""
        return len(self.kinds) * self.turns

    @property
    def names(self) -> tuple[str, ...]:
        """Name the stack of each place after its first layer, `layers_1`.

        The only stack of a model is named `layers`.
        """
        if self.alone and len(self.kinds) == 1:
            return ("layers",)
        return tuple(f"layers_{self.first + place}" for place in range(len(self.kinds)))

    def numbers(self, place: int) -> range:
        """List the numbers of the layers at one place of the cycle, which share a stack."""
        step = len(self.kinds)
        return range(self.first + place, self.first + self.layers, step)


def cycles_of(kinds: Sequence[LayerKind]) -> tuple[Cycle, ...]:
    """Split a model's layers into cycles, each as long as possible; ties go to the shorter turn.

    One leading dense layer and 26 equal ones make two cycles of one kind; layers that alternate
    between two spans make one cycle of two kinds.
    """
    found = []
    first = 0
    while first < len(kinds):
        rest = tuple(kinds[first:])
        best = Cycle(first, rest[:1], 1)
        for period in range(1, len(rest) // 2 + 1):
            turns = _turns(rest, period)
            if turns > 1 and period * turns > best.layers:
                best = Cycle(first, rest[:period], turns)
        found.append(best)
        first += best.layers
    return (replace(found[0], alone=True),) if len(found) == 1 else tuple(found)


def stacks_of(kinds: Sequence[LayerKind]) -> Iterator[tuple[str, LayerKind, range]]:
    """Yield the stacks of a model's parameters: name, kind, and numbers of the layers in it."""
    for cycle in cycles_of(kinds):
        for place, (name, kind) in enumerate(zip(cycle.names, cycle.kinds, strict=True)):
            yield name, kind, cycle.numbers(place)


def all_stacks(config: ModelConfig) -> Iterator[tuple[str, LayerKind, range]]:
    """Yield the stacks of a model as `stacks_of`, then that of its MTP layers, if it has any."""
    yield from stacks_of(config.layer_kinds)
    if kinds := config.mtp_kinds:
        last = len(config.layer_kinds)
        yield PREDICTION, kinds[0], range(last, last + len(kinds))


def _turns(kinds: Sequence[LayerKind], period: int) -> int:
    turns = 1
    while kinds[turns * period : (turns + 1) * period] == kinds[:period]:
        turns += 1
    return turns
