"""Count how often a step executes each computation of a module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from moe_shard.lowering.hlo import Computation, HloParseError, Instruction, Module, bad_line
from moe_shard.lowering.loops import TripCounts
from moe_shard.lowering.op_names import merged_names
from moe_shard.scopes import FURTHER_ROUNDS

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
EXCHANGE_KINDS = ("all-to-all", "ragged-all-to-all")
"""The kinds that move tokens to their experts."""

OPCODES = {kind + suffix: kind for kind in KINDS for suffix in ("", "-start")}
"""Opcode of a collective, or of the first half of an async pair -> its kind."""

_FURTHER_ROUNDS = f"/{FURTHER_ROUNDS}/while"
"""The end of the op_name of a loop that runs only where routing exceeds what one exchange holds.
The loop's own name counts, not that of a scope around it."""

_WITH_CHANNEL = frozenset(
    {*OPCODES, *(f"{kind}{suffix}" for kind in KINDS for suffix in ("-update", "-done"))}
    | {"send", "send-done", "recv", "recv-done"}
)
"""Opcodes that may name a group of devices or a channel."""

_PASSES_ALL = frozenset({"fusion", "call", "while", "async-start", "call-start"})
"""Opcodes that call a computation with their operands as its parameters."""

ASYNC_CALLS = ("async-start", "call-start")
"""Opcodes that start a computation which runs concurrently with what follows."""


class Executions:
    """Visit what the entry reaches, callers before callees, adding up executions.

    Attributes:
        module: the module.
        stages: {a word in a scope: the stage it stands for}, in addition to the known ones.
        order: the computations the entry reaches, each after all that call it.
        counts: {name of a computation: executions per step}.
        asynchronous: names of those that run concurrently with other work.
        passed_over: names of those that only loops of further rounds run, and that are not counted.
        fused: names of those inside a fusion.
        callers: {name: the instruction that calls it, and where}, for fusions, calls and async
            starts.
        further_rounds: number of loops that run only where routing exceeds a bound.
        warnings: what is unknown, one sentence each.
    """

    def __init__(
        self,
        module: Module,
        count_further_rounds: bool = False,
        stages: Mapping[str, str] | None = None,
    ) -> None:
        """Visit a module.

        Args:
            module: the module.
            count_further_rounds: count the loops that run only where routing exceeds a bound as
                running once; otherwise as not running.
            stages: {a word in a scope: the stage it stands for}, in addition to the known ones.

        Raises:
            HloParseError: an opcode between devices is unknown, or the calls are inconsistent.
        """
        self.module = module
        self.stages = dict(stages or {})
        self.warnings: list[str] = []
        self.further_rounds = 0
        self._trips_of_further_rounds = int(count_further_rounds)
        self.counts = {module.entry.name: 1}
        self.asynchronous = set[str]()
        self.passed_over = set[str]()
        self.fused = set[str]()
        self.callers: dict[str, tuple[Computation, Instruction]] = {}
        self._trips = TripCounts(module)
        self._known_trips: dict[tuple[str, str], int | None] = {}
        self._holding: dict[str, bool] = {}
        self.order = list(self._callers_first())
        for name in module.computations:  # in the text, callees come before their callers
            self._holds_collective(name)
        self._check_opcodes()
        self._check_reached()
        self._check_arity()
        for computation in self.order:
            self._pass_on(computation)
        self.warnings += self._trips.contradictions

    def trips(self, computation: Computation, name: str) -> int | None:
        """Return the trips of the `while` instruction `name`; None where unknown."""
        key = computation.name, name
        if key not in self._known_trips:
            loop = computation.instruction(name)
            self._known_trips[key] = self._trips.of(computation, loop)
        return self._known_trips[key]

    def _callers_first(self) -> Iterator[Computation]:
        """Return the reached computations, each after all its callers (reverse post-order)."""
        done: dict[str, Computation] = {}
        on_path = {self.module.entry.name}
        stack = [(self.module.entry, self.module.entry.calls())]
        while stack:
            computation, calls = stack[-1]
            call = next(calls, None)
            if call is None:
                stack.pop()
                on_path.discard(computation.name)
                done[computation.name] = computation
            elif call.called in on_path:
                raise HloParseError(f"HLO computation %{call.called} calls itself")
            elif call.called not in done:
                called = self._computation(call.called)
                on_path.add(called.name)
                stack.append((called, called.calls()))
        return reversed(done.values())

    def _check_opcodes(self) -> None:
        """Refuse an unknown opcode that names devices or a channel."""
        for computation in self.module.computations.values():
            for number, line, opcode in computation.between_devices(_WITH_CHANNEL):
                raise bad_line(number, line, f"unknown opcode {opcode!r} that names devices")

    def _check_arity(self) -> None:
        """Refuse a call that passes a different number of operands than the callee has."""
        for computation in self.order:
            for call in computation.calls():
                if call.role in ("calls", "to_apply", "body", "condition"):
                    instruction = computation.instruction(call.instruction)
                    passed, taken = len(instruction.operands), self._computation(call.called).arity
                    if call.opcode in _PASSES_ALL and passed != taken:
                        problem = f"passes {passed} operands to %{call.called}, which takes {taken}"
                        raise instruction.damaged(problem)

    def _check_reached(self) -> None:
        """Refuse an unknown notation of a call: it would hide collectives."""
        reached = {computation.name for computation in self.order}
        hidden = [
            name
            for name in self.module.computations
            if name not in reached and self._holds_collective(name)
        ]
        for computation in self.order if hidden else ():
            for name, line in computation.mentions(hidden):
                raise HloParseError(
                    f"HLO line {line}: calls %{name}, which holds collectives, in an unknown way\n"
                    "fix: report the line; without it the counts would be wrong"
                )
        self.warnings += [
            f"not counted: the collectives of %{name}, which nothing calls" for name in hidden
        ]

    def _computation(self, name: str) -> Computation:
        if name not in self.module.computations:
            raise HloParseError(f"HLO computation %{name} is called but not defined")
        return self.module.computations[name]

    def _pass_on(self, computation: Computation) -> None:
        count = self.counts[computation.name]
        for call in computation.calls():
            times = count
            if call.opcode == "while" and call.role == "body":
                times *= self._trip_count(computation, call.instruction)
            if call.opcode == "conditional" and self._holds_collective(call.called):
                self.warnings.append(
                    f"%{call.called} is a branch of a conditional: its collectives are counted as"
                    " if every branch ran"
                )
            name = call.called
            if computation.name in self.passed_over or (
                call.role == "body" and self._is_passed_over(computation, call.instruction)
            ):
                self.passed_over.add(name)
            self.counts[name] = self.counts.get(name, 0) + times
            if call.opcode in ASYNC_CALLS or computation.name in self.asynchronous:
                self.asynchronous.add(name)
            if call.opcode == "fusion" or computation.name in self.fused:
                self.fused.add(name)
            if call.opcode in ("fusion", "call", *ASYNC_CALLS):
                self.callers[name] = (computation, computation.instruction(call.instruction))

    def times(self, computation: Computation, name: str) -> int:
        """Return how often the `while` instruction `name` is assumed to run its body."""
        trips = self.trips(computation, name)
        if trips is not None:
            return trips
        further = self._makes_further_rounds(computation.instruction(name))
        return self._trips_of_further_rounds if further else 1

    def _is_passed_over(self, computation: Computation, name: str) -> bool:
        if self._trips_of_further_rounds or self.trips(computation, name) is not None:
            return False
        return self._makes_further_rounds(computation.instruction(name))

    @staticmethod
    def _makes_further_rounds(loop: Instruction) -> bool:
        return any(f"/{each}".endswith(_FURTHER_ROUNDS) for each in merged_names(loop.op_name))

    def _trip_count(self, computation: Computation, name: str) -> int:
        times = self.times(computation, name)
        if self.trips(computation, name) is None:
            loop = computation.instruction(name)
            if not self._holds_collective(self.module.called_by(loop, "body").name):
                return times
            if self._makes_further_rounds(loop):
                self.further_rounds += 1
            else:
                self.warnings.append(
                    f"the trip count of loop %{name} (HLO line {loop.line_number}) is unknown:"
                    " its collectives are counted once"
                )
        return times

    def _holds_collective(self, name: str) -> bool:
        if name not in self._holding:
            computation = self._computation(name)
            self._holding[name] = False  # an unreachable computation may call itself
            self._holding[name] = not OPCODES.keys().isdisjoint(
                computation.opcodes.values()
            ) or any(self._holds_collective(call.called) for call in computation.calls())
        return self._holding[name]
