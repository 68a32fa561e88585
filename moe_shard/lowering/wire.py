"""Model the wire of an estimate: one collective at a time, overlapped with the device's work.

Every second of a collective is counted once: as overlapped with the work that the device does
meanwhile, or as waiting, when it does none. Waiting for a collective that is queued behind another
means waiting for both; each counts its own time on the wire.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

WireKey = tuple[str, str]
"""A computation and an instruction in it."""


@dataclass
class TimeSums:
    """Add up one execution of a computation, in seconds, including what it calls.

    Attributes:
        seconds: time from its beginning to its end.
        work: {stage: seconds of the device's own work}.
        on_wire: seconds on the wire of each collective.
        waited: the part of these in which the device was idle.
        overlapped: {stage: the part in which the device worked on it}, for each collective.
        cycles: the compiler's own estimate.
    """

    seconds: float = 0.0
    work: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    on_wire: dict[WireKey, float] = field(default_factory=lambda: defaultdict(float))
    waited: dict[WireKey, float] = field(default_factory=lambda: defaultdict(float))
    overlapped: dict[WireKey, dict[str, float]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(float))
    )
    cycles: int = 0

    @property
    def computing(self) -> float:
        """Return the seconds of the device's own work."""
        return sum(self.work.values())

    @property
    def exchanges(self) -> bool:
        """Return whether anything is on the wire."""
        return bool(self.on_wire)

    def add(self, other: TimeSums, times: int) -> None:
        """Add so many executions of another computation; `seconds` is unchanged."""
        self.cycles += times * other.cycles
        for scope, seconds in other.work.items():
            self.work[scope] += times * seconds
        for key, seconds in other.on_wire.items():
            self.on_wire[key] += times * seconds
        for key, seconds in other.waited.items():
            self.waited[key] += times * seconds
        for key, overlapped in other.overlapped.items():
            for scope, seconds in overlapped.items():
                self.overlapped[key][scope] += times * seconds


@dataclass
class Flight:
    """Describe a collective on the wire from `begins` to `lands`, `left` of it still to come."""

    key: WireKey
    begins: float
    lands: float
    left: float


class Wire:
    """Keep a clock, the collectives in flight, and the sums so far.

    Attributes:
        now: seconds since the beginning.
        sums: the sums up to now.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.sums = TimeSums()
        self._flights: deque[Flight] = (
            deque()
        )  # queued in order; those that have landed are removed

    @property
    def is_busy(self) -> bool:
        """Return whether a collective is in flight."""
        return bool(self._flights)

    def send(self, key: WireKey, seconds: float) -> Flight:
        """Put a collective on the wire, behind those in flight."""
        begins = self._flights[-1].lands if self._flights else self.now
        flight = Flight(key, begins, begins + seconds, seconds)
        self.sums.on_wire[key] += seconds
        self._flights.append(flight)
        return flight

    def wait_for(self, flight: Flight) -> None:
        """Wait until a collective has landed."""
        for each, seconds in self._pass(flight.lands):
            self.sums.waited[each.key] += seconds

    def work(self, scopes: Mapping[str, float]) -> None:
        """Work for some seconds, given as {stage: seconds}, in no order."""
        total = sum(scopes.values())
        if not total:
            return
        for scope, seconds in scopes.items():
            self.sums.work[scope] += seconds
        for each, seconds in self._pass(self.now + total):
            for scope, part in scopes.items():
                self.sums.overlapped[each.key][scope] += seconds * part / total

    def repeat(self, once: TimeSums, times: int) -> None:
        """Execute a computation `times` times, given the sums of one execution.

        The wire must be idle, unless nothing is exchanged.
        """
        if self.is_busy and not once.exchanges:
            self.sums.cycles += times * once.cycles
            self.work({scope: times * seconds for scope, seconds in once.work.items()})
            return
        self.sums.add(once, times)
        self.now += times * once.seconds

    def _pass(self, until: float) -> list[tuple[Flight, float]]:
        """Advance the clock; return what was on the wire meanwhile, and for how long."""
        passed = []
        while self._flights and self._flights[0].begins < until:
            flight = self._flights[0]
            if flight.lands > until:
                part = min(until - max(flight.begins, self.now), flight.left)
                flight.left -= part
                passed.append((flight, part))
                break
            # All that is left of it, not a difference of times, which would lose a small one in
            # rounding.
            passed.append((flight, flight.left))
            self._flights.popleft()
        self.now = max(self.now, until)
        return passed
