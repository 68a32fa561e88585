"""The collectives of a compiled program, each counted once per execution of the step.

What is counted: instructions that the entry computation reaches, times the trips of the loops
around them. What is not counted twice: the two halves of an async pair, and the copies that TPU's
async collective fusion leaves in the text. CPU never forms a reduce-scatter: there it is listed as
what runs, an all-reduce (and a slice).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moe_shard.lowering.hlo import Computation, HloParseError, Instruction, Module, parse_module
from moe_shard.lowering.loops import TripCounts
from moe_shard.lowering.mesh_axes import UNKNOWN_AXES, MeshAxes
from moe_shard.lowering.op_names import classify
from moe_shard.lowering.replica_groups import parse_groups, parse_pairs
from moe_shard.lowering.shapes import shape_bytes, tuple_elements

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_OPCODES = {kind + suffix: kind for kind in KINDS for suffix in ("", "-start")}
# A cross-replica group without use_global_device_ids lists replicas, each with all its partitions.
_REPLICA_GROUPED = frozenset({"all-gather", "all-reduce", "reduce-scatter", "collective-broadcast"})
_OP_NAME_HOPS = 6


@dataclass(frozen=True)
class Collective:
    """One collective of the step.

    Attributes:
        kind: one of `KINDS`.
        axes: the mesh axes it runs along; empty when no mesh was given, `("?",)` when its groups
            are those of no set of axes.
        scope: the stage of the model, see `op_names.SCOPES`; or "other".
        pass_: "forward", "backward", "optimizer" or "unknown".
        count: executions per step.
        bytes: output bytes per device of one execution.
        wire_bytes: bytes one device must send in one execution.
        is_async: other work can run while it is on the wire.
        spmd_generated: the partitioner put it in; nobody wrote it.
        op_name: its op_name, or that of the nearest producer when it has none of its own.
        source: "file:line", or None.
        group_size: devices that take part in one exchange.
    """

    kind: str
    axes: tuple[str, ...]
    scope: str
    pass_: str
    count: int
    bytes: int
    wire_bytes: int
    is_async: bool
    spmd_generated: bool
    op_name: str
    source: str | None
    group_size: int

    def to_json(self) -> dict[str, Any]:
        """The keys and values of the JSON contract."""
        return {
            "kind": self.kind,
            "axes": list(self.axes),
            "scope": self.scope,
            "pass": self.pass_,
            "count": self.count,
            "bytes": self.bytes,
            "wire_bytes": self.wire_bytes,
            "async": self.is_async,
            "spmd_generated": self.spmd_generated,
            "op_name": self.op_name,
            "source": self.source,
        }


@dataclass(frozen=True)
class Extraction:
    """The collectives of a module and what could not be told about them."""

    module: Module
    collectives: tuple[Collective, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Site:
    """A collective instruction in its computation, and the instruction that calls that."""

    instruction: Instruction
    kind: str
    computation: Computation
    caller: tuple[Computation, Instruction] | None
    count: int
    is_async: bool


def extract_collectives(
    text: str, mesh: Mapping[str, int] | None = None, device_ids: Sequence[int] | None = None
) -> Extraction:
    """Read the collectives of an HLO module.

    Args:
        text: the HLO text after optimization.
        mesh: {axis: size} in the order in which the devices are laid out; without it the axes of
            the collectives stay empty.
        device_ids: the device at each position of the mesh, where that is not 0, 1, 2, ...

    Raises:
        UserError: when the text is not one whole HLO module, or the mesh is not of its size.
    """
    module = parse_module(text)
    axes = None if mesh is None else MeshAxes(mesh, module.num_devices, device_ids)
    walk = _Walk(module)
    found = [_collective(module, site, axes) for site in walk.sites()]
    warnings = list(dict.fromkeys(walk.warnings))
    if strange := sum(each.axes == UNKNOWN_AXES for each in found):
        warnings.append(f"{strange} collectives run along no set of mesh axes (shown as '?')")
    return Extraction(module, tuple(found), tuple(warnings))


class _Walk:
    """Visits what the entry reaches, callers before the called, adding up executions."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.warnings: list[str] = []
        self._trips = TripCounts(module)
        self._counts = {module.entry.name: 1}
        self._holding: dict[str, bool] = {}
        self._async = set[str]()
        self._fused = set[str]()
        self._caller: dict[str, tuple[Computation, Instruction]] = {}
        self._order = list(self._callers_first())
        for computation in self._order:
            self._pass_on(computation)

    def _callers_first(self) -> Iterator[Computation]:
        """The reached computations, each after all that call it (a depth-first post-order)."""
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

    def _computation(self, name: str) -> Computation:
        if name not in self.module.computations:
            raise HloParseError(f"HLO computation %{name} is called but not defined")
        return self.module.computations[name]

    def _pass_on(self, computation: Computation) -> None:
        count = self._counts[computation.name]
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
            self._counts[name] = self._counts.get(name, 0) + times
            if call.opcode == "async-start" or computation.name in self._async:
                self._async.add(name)
            if call.opcode == "fusion" or computation.name in self._fused:
                self._fused.add(name)
            if call.opcode in ("fusion", "async-start", "call"):
                self._caller[name] = (computation, computation.instruction(call.instruction))

    def _trip_count(self, computation: Computation, name: str) -> int:
        loop = computation.instruction(name)
        trips = self._trips.of(computation, loop)
        if trips is None and self._holds_collective(self.module.called_by(loop, "body").name):
            self.warnings.append(
                f"the trip count of loop %{name} (HLO line {loop.line_number}) cannot be told:"
                " its collectives are counted once"
            )
        return 1 if trips is None else trips

    def _holds_collective(self, name: str) -> bool:
        if name not in self._holding:
            computation = self._computation(name)
            self._holding[name] = not _OPCODES.keys().isdisjoint(
                computation.opcodes.values()
            ) or any(self._holds_collective(call.called) for call in computation.calls())
        return self._holding[name]

    def sites(self) -> list[_Site]:
        """The collectives, async copies removed, in the order of the text."""
        found = []
        sends = 0
        for computation in self._order:
            for name, opcode in computation.opcodes.items():
                sends += opcode == "send"
                if opcode in _OPCODES and self._counts[computation.name]:
                    found.append(self._site(computation, computation.instruction(name)))
        if sends:
            self.warnings.append(f"{sends} point-to-point sends are not listed")
        kept = [site for site in found if site.computation.name not in self._fused]
        kept += self._without_copies([s for s in found if s.computation.name in self._fused])
        return sorted(kept, key=lambda site: site.instruction.line_number)

    def _site(self, computation: Computation, instruction: Instruction) -> _Site:
        kind = _OPCODES[instruction.opcode]
        if kind == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # how TPU spells it: a fusion of an all-reduce and a slice
        return _Site(
            instruction,
            kind,
            computation,
            self._caller.get(computation.name),
            self._counts[computation.name],
            instruction.opcode.endswith("-start") or computation.name in self._async,
        )

    def _without_copies(self, sites: list[_Site]) -> list[_Site]:
        """One site for each run of TPU's async collective fusion.

        Such a collective is started in one fusion, carried through others (also inside loops), and
        finished in one more; each of them repeats the instruction. channel_id does not tell them
        apart from others (shard_map gives all its collectives channel 1), the start does.
        """
        families: dict[tuple[str, int | None, str, str], list[_Site]] = {}
        for site in sites:
            instruction = site.instruction
            channel = instruction.integer("channel_id")
            key = (site.kind, channel, instruction.op_name, instruction.shape)
            families.setdefault(key, []).append(site)
        kept: list[_Site] = []
        for family in families.values():
            parts = [(_async_part(site.computation), site) for site in family]
            # Under one key may also stand a collective that no async fusion touches.
            kept += [site for part, site in parts if not part]
            copies = [site for part, site in parts if part]
            starts = [site for part, site in parts if part == "start"]
            if copies and not starts:
                starts = [min(copies, key=lambda site: site.count)]
            kept += [replace(site, is_async=True) for site in starts]
        return kept


def _async_part(computation: Computation) -> str:
    """The part a fused computation plays in an async collective: start, done, middle, or ""."""
    for name, opcode in computation.opcodes.items():
        if opcode == "custom-call":
            text = computation.instruction(name).attribute_text
            for part in ("Start", "Done"):
                if f'custom_call_target="AsyncCollective{part}"' in text:
                    return part.lower()
    return "middle" if computation.name.startswith("async_collective_fusion") else ""


def _collective(module: Module, site: _Site, axes: MeshAxes | None) -> Collective:
    instruction = site.instruction
    named = _named(site)
    scope, pass_ = classify(named.op_name if named else "")
    along, group_size = _groups(module, site, axes)
    size = _output_bytes(site, group_size)
    return Collective(
        kind=site.kind,
        axes=along,
        scope=scope,
        pass_=pass_,
        count=site.count,
        bytes=size,
        wire_bytes=wire_bytes(site.kind, size, group_size),
        is_async=site.is_async,
        spmd_generated='is_spmd_generated="true"' in instruction.attribute_text,
        op_name=named.op_name if named else "",
        source=module.source(named or instruction),
        group_size=group_size,
    )


def _groups(module: Module, site: _Site, axes: MeshAxes | None) -> tuple[tuple[str, ...], int]:
    attributes = site.instruction.attributes
    devices = module.num_devices
    try:
        if site.kind == "collective-permute":
            pairs = parse_pairs(attributes.get("source_target_pairs", ""))
            return (axes.of_pairs(pairs) if axes else ()), 2
        groups = parse_groups(attributes.get("replica_groups", "{}"), devices)
    except HloParseError as error:
        raise HloParseError(f"HLO line {site.instruction.line_number}: {error}") from error
    over_replicas = (
        site.kind in _REPLICA_GROUPED
        and module.num_partitions > 1
        and attributes.get("use_global_device_ids") != "true"
        and max(map(max, groups)) < module.replica_count
    )
    if over_replicas and "channel_id" in attributes:
        width = module.num_partitions
        groups = [[r * width + p for r in group for p in range(width)] for group in groups]
    return (axes.of_groups(groups) if axes else ()), max(map(len, groups))


def _output_bytes(site: _Site, group_size: int) -> int:
    instruction = site.instruction
    if site.kind == "reduce-scatter" and instruction.opcode == "all-reduce":
        return shape_bytes(instruction.shape) // group_size
    if instruction.opcode.endswith("-start") and site.kind != "all-reduce":
        # The result of a start is (operands, outputs, ...); that of all-reduce-start the outputs.
        elements = tuple_elements(instruction.shape)
        return shape_bytes(elements[1] if len(elements) > 1 else instruction.shape)
    return shape_bytes(instruction.shape)


def wire_bytes(kind: str, size: int, group_size: int) -> int:
    """Bytes one device must send for one execution, however the exchange is done.

    Args:
        kind: one of `KINDS`.
        size: output bytes of one device.
        group_size: devices that exchange with each other.
    """
    others = group_size - 1
    if kind == "collective-permute":
        return size
    if kind == "reduce-scatter":
        return size * others
    if kind == "all-reduce":
        return 2 * size * others // group_size
    return size * others // group_size


def _named(site: _Site) -> Instruction | None:
    """The nearest instruction with an op_name: itself, the caller's, or a producer's.

    XLA drops the op_name of collectives that it merges or moves; GPU does so for reduce-scatters.
    """
    if site.instruction.op_name:
        return site.instruction
    if site.caller is not None and site.caller[1].op_name:
        return site.caller[1]
    starts = [(site.computation, site.instruction)]
    if site.caller is not None:
        starts.append(site.caller)
    for computation, first in starts:
        producers = [first]
        for _ in range(_OP_NAME_HOPS):
            names = dict.fromkeys(name for each in producers for name in each.operands)
            producers = [computation.instruction(name) for name in names]
            traced = [each for each in producers if each.opcode != "constant" and each.op_name]
            if traced:
                return traced[0]
    return None
