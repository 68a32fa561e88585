"""Estimate a step's time from the compiler's schedule and the peaks of the hardware.

The instructions run in the order of the schedule. Each takes as long as its FLOPs at peak, or as
its bytes at the full bandwidth of the memory, whichever is longer. Collectives run one after the
other on the wire, each as long as its bytes take on the links; an asynchronous one is overlapped
with what the schedule puts between its start and its end, any other runs alone (see `wire`). There
is no latency, no contention and no kernel below peak: the estimate is a lower bound for the step,
with the cost of its wire and how much of that is overlapped. It is not a measurement.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe_shard.lowering.collectives import Collective, Extraction
from moe_shard.lowering.hlo import Computation, Instruction, Module
from moe_shard.lowering.op_names import classify
from moe_shard.lowering.walk import ASYNC_CALLS
from moe_shard.lowering.wire import Flight, TimeSums, Wire, WireKey
from moe_shard.lowering.work import flops, memory_bytes
from moe_shard.units import human_seconds

ASSUMPTIONS = (
    "an estimate, nothing was run: every product at peak, memory and links at full bandwidth, "
    "no latency"
)
_ROUND_THE_RING = frozenset({"all-gather", "reduce-scatter", "all-reduce"})
_CYCLES = '"estimated_cycles":"'
_UNKNOWN_CYCLES = 2**62  # the compiler's largest number means "unknown"
_SHOWN = 0.002
"""Stages whose collectives take less of the step than this have no line of their own."""
_NAMED = 0.005
"""Work that overlaps less of them than this is not named: it would be 0 %."""


@dataclass(frozen=True)
class Rates:
    """Hold what one device can do at most, per second.

    Attributes:
        flops: operations.
        memory: bytes of its own memory.
        link: bytes it sends to devices of its slice or host.
        network: bytes it sends to other hosts; None where every device is on the links.
        host: devices of a host, from 0 on; only with `network`.
    """

    flops: float
    memory: float
    link: float
    network: float | None = None
    host: int = 8

    def exchange(self, collective: Collective) -> float:
        """Return the seconds that one execution of a collective is on the wire."""
        sent, group = collective.wire_bytes, collective.group
        on_links = sent / self.link
        if self.network is None or len(group) < 2:
            return on_links
        per_host = Counter(device // self.host for device in group)
        together = max(per_host.values())
        leaving = sent * (len(group) - together) / (len(group) - 1)
        if collective.kind in _ROUND_THE_RING:  # the devices of a host share what leaves it
            leaving /= together
        return max(on_links, leaving / self.network)


@dataclass(frozen=True)
class Exchange:
    """Sum up the executions of one collective of the text in a step.

    Attributes:
        collective: the collective.
        seconds: time on the wire, in seconds.
        waited: the part of it in which nothing else ran.
        overlapped: {stage: seconds of its work that ran meanwhile}, the most first; with `waited`
            they add up to `seconds`.
    """

    collective: Collective
    seconds: float
    waited: float
    overlapped: dict[str, float]


@dataclass(frozen=True)
class Timeline:
    """Describe one step of one device in time.

    Attributes:
        seconds: time of the step, computing and waiting.
        computing: the part of it in the device's own work.
        exchanges: the collectives, in the order of the schedule.
        cycles: the sum of the TPU compiler's own estimates; None where it made none.
    """

    seconds: float
    computing: float
    exchanges: tuple[Exchange, ...]
    cycles: int | None

    @property
    def on_wire(self) -> float:
        """Return the seconds of all collectives."""
        return sum(each.seconds for each in self.exchanges)

    @property
    def waited(self) -> float:
        """Return the seconds of collectives that nothing overlaps."""
        return sum(each.waited for each in self.exchanges)

    def lines(self, tokens: int) -> list[str]:
        """Write the estimate for a person.

        Args:
            tokens: tokens of one device and step.
        """
        lines = [
            f"estimate: {human_seconds(self.seconds)} per step, "
            f"{tokens / self.seconds:,.0f} tokens/s per device; "
            f"{human_seconds(self.on_wire)} on the wire, {self._overlapped()}",
            f"  ({ASSUMPTIONS})",
        ]
        small = small_waited = 0.0
        for scope, seconds, waited, overlapped in self._stages():
            if seconds <= _SHOWN * self.seconds:
                small, small_waited = small + seconds, small_waited + waited
            else:
                named = [name for name, part in overlapped.items() if part >= _NAMED * seconds]
                work = f" with {', '.join(named[:3])}" if named else ""
                hidden = f"{_fraction(waited, seconds):.0%} overlapped{work}"
                lines.append(f"  {scope}: {human_seconds(seconds)} on the wire, {hidden}")
        if small > _SHOWN * self.seconds:
            part = f"{_fraction(small_waited, small):.0%} overlapped"
            lines.append(f"  other stages: {human_seconds(small)} on the wire, {part}")
        if self.cycles is not None:
            lines.append(
                f"  the TPU compiler's own estimate: {self.cycles / 1e6:,.1f} million cycles of "
                "kernels per step"
            )
        return lines

    def _overlapped(self) -> str:
        if not self.on_wire:
            return "nothing to overlap"
        return f"{_fraction(self.waited, self.on_wire):.0%} overlapped"

    def _stages(self) -> list[tuple[str, float, float, dict[str, float]]]:
        stages: dict[str, list[Exchange]] = {}
        for each in self.exchanges:
            stages.setdefault(each.collective.scope, []).append(each)
        rows = []
        for scope, exchanges in stages.items():
            overlapped: dict[str, float] = defaultdict(float)
            for each in exchanges:
                for other, seconds in each.overlapped.items():
                    overlapped[other] += seconds
            seconds = sum(each.seconds for each in exchanges)
            rows.append(
                (scope, seconds, sum(each.waited for each in exchanges), _by_size(overlapped))
            )
        return sorted(rows, key=lambda row: -row[1])

    def to_json(self) -> dict[str, Any]:
        """Return the estimate for machines; times in seconds of one step."""
        return {
            "assumptions": ASSUMPTIONS,
            "step_s": self.seconds,
            "compute_s": self.computing,
            "wire_s": self.on_wire,
            "exposed_wire_s": self.waited,
            "tpu_estimated_cycles": self.cycles,
            "stages": {
                scope: {"wire_s": seconds, "exposed_wire_s": waited, "beside_s": overlapped}
                for scope, seconds, waited, overlapped in self._stages()
            },
        }


def _fraction(waited: float, seconds: float) -> float:
    """Return the fraction of a time that was overlapped; rounding in long sums is clipped."""
    return max(0.0, 1 - waited / seconds)


def _by_size(seconds: Mapping[str, float]) -> dict[str, float]:
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def timeline(extraction: Extraction, rates: Rates) -> Timeline:
    """Lay a scheduled program out in time."""
    sums = _Run(extraction, rates).alone(extraction.module.entry)
    return Timeline(
        sums.seconds,
        sums.computing,
        tuple(
            Exchange(each, sums.on_wire[key], sums.waited[key], _by_size(sums.overlapped[key]))
            for key, each in extraction.at.items()
        ),
        sums.cycles or None,
    )


class _Run:
    """Go through the schedule at given rates."""

    def __init__(self, extraction: Extraction, rates: Rates) -> None:
        self._extraction = extraction
        self._module: Module = extraction.module
        self._rates = rates
        self._alone: dict[str, TimeSums] = {}

    def alone(self, computation: Computation) -> TimeSums:
        """Time one execution that begins with an idle wire."""
        if computation.name not in self._alone:
            wire = Wire()
            self._run(computation, wire)
            wire.sums.seconds = wire.now
            self._alone[computation.name] = wire.sums
        return self._alone[computation.name]

    def _run(self, computation: Computation, wire: Wire) -> None:
        """Execute once, overlapped with what is on the wire."""
        flights: dict[str, Flight] = {}
        for name in computation.opcodes:
            instruction = computation.instruction(name)
            key = self._starts(computation, instruction)
            lands = self._lands(computation, instruction, flights)
            if lands is not None:
                wire.wait_for(flights.pop(lands))
                continue
            if key is not None:
                collective = self._extraction.at[key]
                flight = wire.send(key, self._rates.exchange(collective))
                if collective.is_async:
                    flights[name] = flight
                else:
                    wire.wait_for(flight)
                if instruction.opcode != "fusion":
                    continue
            self._spend(computation, instruction, wire)
        for flight in flights.values():
            wire.wait_for(flight)

    def _spend(self, computation: Computation, instruction: Instruction, wire: Wire) -> None:
        """Pass the time of an instruction's own work, including the computations it calls."""
        opcode = instruction.opcode
        if opcode == "while":
            times = self._extraction.walk.times(computation, instruction.name)
            self._repeat(self._module.called_by(instruction, "body"), times, wire)
        elif opcode == "call":
            self._repeat(self._module.called_by(instruction, "to_apply"), 1, wire)
        elif opcode == "conditional":
            for branch in self._branches(instruction):
                self._repeat(branch, 1, wire)
        else:
            self._work(computation, instruction, wire)

    def _branches(self, conditional: Instruction) -> list[Computation]:
        """Return the branches that count: those that exchange, and the longest of the others.

        One branch runs. But collectives are counted as if every branch ran.
        """
        branches = [self._module.computations[name] for name in conditional.branches()]
        exchanging = [each for each in branches if self.alone(each).exchanges]
        others = [each for each in branches if each not in exchanging]
        others.sort(key=lambda each: self.alone(each).seconds)
        return exchanging + others[-1:]

    def _repeat(self, computation: Computation, times: int, wire: Wire) -> None:
        """Execute so many times, each alike but the first, which overlaps what is on the wire."""
        if not times:
            return
        once = self.alone(computation)
        if wire.is_busy and once.exchanges:
            self._run(computation, wire)
            times -= 1
        wire.repeat(once, times)

    def _work(self, computation: Computation, instruction: Instruction, wire: Wire) -> None:
        spent = max(
            flops(self._module, computation, instruction) / self._rates.flops,
            memory_bytes(self._module, computation, instruction) / self._rates.memory,
        )
        _, mark, rest = instruction.attribute_text.partition(_CYCLES)
        if mark and 0 < (cycles := int(rest[: rest.index('"')])) < _UNKNOWN_CYCLES:
            wire.sums.cycles += cycles
        wire.work({classify(instruction.op_name)[0]: spent})

    def _starts(self, computation: Computation, instruction: Instruction) -> WireKey | None:
        """Return the collective that an instruction is, or that starts in what it calls."""
        found = self._extraction.at
        if (computation.name, instruction.name) in found:
            return computation.name, instruction.name
        if instruction.opcode not in ("fusion", *ASYNC_CALLS):
            return None
        called = self._module.called_by(instruction, "calls", "called_computations", "to_apply")
        return next(
            ((called.name, name) for name in called.opcodes if (called.name, name) in found), None
        )

    def _lands(
        self, computation: Computation, instruction: Instruction, flights: dict[str, Flight]
    ) -> str | None:
        """Return the name of the start that an instruction completes."""
        if instruction.opcode.endswith("-done"):
            first = instruction.operand(0)
            while first not in flights and computation.opcodes.get(first) == "async-update":
                first = computation.instruction(first).operand(0)
            return first if first in flights else None
        if instruction.opcode != "fusion" or not flights:
            return None
        called = self._module.called_by(instruction, "calls")
        if not any(
            opcode == "custom-call"
            and '"AsyncCollectiveDone"' in called.instruction(name).attribute_text
            for name, opcode in called.opcodes.items()
        ):
            return None
        ended = {
            (called.opcodes[name], called.instruction(name).op_name) for name in called.opcodes
        }
        for start, flight in flights.items():
            collective = self._extraction.at[flight.key]
            if (collective.kind, collective.op_name) in ended:
                return start
        return None
