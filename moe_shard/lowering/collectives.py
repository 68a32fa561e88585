"""Extract the collectives of a compiled program, each counted once per execution of the step.

Counted are the instructions that the entry computation reaches, times the trips of the loops around
them. The two halves of an async pair count once, and so do the copies that TPU's async collective
fusion leaves in the text. A collective that a compiler implements with another one is listed as the
one that runs, with what it implements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_shard.errors import UserError
from moe_shard.lowering.hlo import HloParseError, Module, parse_module
from moe_shard.lowering.mesh_axes import UNKNOWN_AXES, MeshAxes
from moe_shard.lowering.naming import dominant_op_names, named_instruction, stage_of_exchange
from moe_shard.lowering.op_names import classify
from moe_shard.lowering.program_mesh import ProgramMesh, program_mesh
from moe_shard.lowering.replica_groups import parse_groups, parse_pairs
from moe_shard.lowering.roles import EXPERT_AXIS, Roles
from moe_shard.lowering.shape_check import sizes_fit
from moe_shard.lowering.shapes import shape_bytes
from moe_shard.lowering.shardings import shardings_before_optimization
from moe_shard.lowering.sites import Site, find_sites, outputs
from moe_shard.lowering.spellings import (
    implemented_by_all_reduce,
    implements,
    is_unrolled,
)
from moe_shard.lowering.unlisted import unlisted
from moe_shard.lowering.walk import EXCHANGE_KINDS, OPCODES, Executions

# A cross-replica group without use_global_device_ids lists replicas, each with all its partitions.
_REPLICA_GROUPED = frozenset({"all-gather", "all-reduce", "reduce-scatter", "collective-broadcast"})
_BEFORE_OPTIMIZATION = (
    "this is the module before optimization: the partitioner has not run, so it lacks the"
    " collectives of the step; read Compiled.as_text() or *after_optimizations.txt"
)


@dataclass(frozen=True)
class Collective:
    """Describe one collective of the step.

    Attributes:
        kind: one of `walk.KINDS`.
        axes: the mesh axes it runs along; `("?",)` when its groups are those of no set of axes.
        scope: the stage of the model, see `op_names.SCOPES`; or "other".
        pass_: "forward", "backward", "optimizer" or "unknown".
        count: executions per step.
        bytes: output bytes per device of one execution.
        wire_bytes: bytes one device must send in one execution.
        is_async: whether other work can run while it is on the wire.
        spmd_generated: whether the partitioner inserted it; it is not in the source.
        op_name: its op_name, or that of the nearest producer when it has none of its own.
        source: "file:line", or None.
        group: devices that take part in one exchange; of a permute a sender and its receiver.
        implements: "all-gather" or "reduce-scatter" for a permute or an all-reduce that implements
            one, see `spellings`; else "".
        role: its purpose, one of `roles.ROLES`.
        parameter: paths of the parameters that it moves, or whose gradients it sums; None for data.
        of_experts: whether these are weights of experts, or it moves tokens of experts.
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
    group: tuple[int, ...]
    implements: str = ""
    role: str = "unknown"
    parameter: tuple[str, ...] | None = None
    of_experts: bool = False

    @property
    def group_size(self) -> int:
        """Return the number of devices that take part in one exchange."""
        return len(self.group)

    @property
    def label(self) -> str:
        """Return the kind for a person, with what it implements."""
        return f"{self.kind} ({self.implements})" if self.implements else self.kind

    def to_json(self) -> dict[str, Any]:
        """Return the keys and values of the JSON contract."""
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
            "role": self.role,
            "parameter": None if self.parameter is None else list(self.parameter),
        }


@dataclass(frozen=True)
class Extraction:
    """Hold the collectives of a module, and warnings about what could not be read.

    Attributes:
        module: the program.
        walk: how often each computation is executed.
        at: {(computation, instruction): the collective it starts}, in the order of the text.
        warnings: one sentence each.
        mesh: the program's mesh, and the source of its names.
        roles: what the program's values derive from.
        expert_axes: the mesh axes of the experts, those of size 1 left out.
    """

    module: Module
    walk: Executions
    at: dict[tuple[str, str], Collective]
    warnings: tuple[str, ...]
    mesh: ProgramMesh
    roles: Roles
    expert_axes: tuple[str, ...]

    @property
    def collectives(self) -> tuple[Collective, ...]:
        """Return the collectives in the order of the text."""
        return tuple(self.at.values())

    @property
    def along(self) -> dict[tuple[str, str], tuple[str, ...]]:
        """Return {collective: the mesh axes that it runs along}."""
        return {site: each.axes for site, each in self.at.items()}


def extract_collectives(
    text: str,
    mesh: Mapping[str, int] | None = None,
    device_ids: Sequence[int] | None = None,
    *,
    expert_axes: Sequence[str] | None = None,
    before: str | None = None,
    stages: Mapping[str, str] | None = None,
    count_further_rounds: bool = False,
) -> Extraction:
    """Read the collectives of an HLO module.

    Args:
        text: the HLO text after optimization.
        mesh: {axis: size} in the order in which the devices are laid out; without it, the mesh that
            the text names.
        device_ids: the device at each position of the mesh, where that is not 0, 1, 2, ...
        expert_axes: the mesh axes of the experts; without them, the axis called "expert", or, where
            there is none, those over which the experts' weights are split.
        before: the same module before optimization, which names the mesh where `text` does not.
        stages: {a word in a scope: the stage it stands for}, in addition to the known ones.
        count_further_rounds: count the loops of this package's further MoE exchanges, which run
            only where routing exceeds what one exchange holds, as running once.

    Raises:
        UserError: when the text is not one whole HLO module, or the mesh is not of its size.
    """
    module = parse_module(text)
    early = module.is_before_optimization
    # A traced program does not have its number of devices yet.
    placed = None if early and module.num_devices == 1 else mesh
    known = program_mesh(module, text, placed, device_ids, before)
    axes = MeshAxes(known.sizes, module.num_devices, known.device_ids)
    named = expert_axes
    if named is None:
        named = (EXPERT_AXIS,) if EXPERT_AXIS in known.sizes else None
    elif strangers := [axis for axis in named if axis not in known.sizes]:
        raise UserError(
            f"the mesh has no axis {', '.join(strangers)} for the experts\n"
            f"fix: name the axes of the experts among {', '.join(known.sizes)}"
        )
    shardings = shardings_before_optimization(before) if before is not None else None
    walk = Executions(module, count_further_rounds, stages)
    roles = Roles(module, axes, named or (), shardings)
    sites = find_sites(walk)
    rings = _rings(module, sites)
    found = {
        (site.computation.name, site.instruction.name): _collective(walk, site, axes, rings, roles)
        for site in sites
    }
    warnings = [_BEFORE_OPTIMIZATION] if early else []
    warnings += dict.fromkeys(walk.warnings)
    warnings += [
        f"HLO line {site.instruction.line_number}: the sizes of the operands and the result of"
        f" %{site.instruction.name} do not match; the text may be damaged"
        for site, each in zip(sites, found.values(), strict=True)
        if not _fits(site, len(each.group))
    ]
    if walk.further_rounds:
        warnings.append(
            f"{'counted once' if count_further_rounds else 'not counted'}: {walk.further_rounds}"
            " loops of further MoE exchanges, which run only where a router exceeds what one"
            " exchange holds"
        )
    warnings += unlisted(walk)
    if strange := sum(each.axes == UNKNOWN_AXES for each in found.values()):
        warnings.append(f"{strange} collectives run along no set of mesh axes (axis '?')")
    along = {site: each.axes for site, each in found.items()}
    axes_of_experts = roles.expert_axes(along) if named is None else named
    split = [axis for axis in axes_of_experts if known.sizes.get(axis, 1) > 1]
    return Extraction(module, walk, found, tuple(warnings), known, roles, tuple(split))


def _rings(module: Module, sites: list[Site]) -> dict[int, str]:
    """Return {line of an unrolled permute: what it implements}."""
    rings: dict[int, str] = {}
    of_family: dict[tuple[str, int], str] = {}
    unrolled = [
        site
        for site in sites
        if site.kind == "collective-permute" and is_unrolled(site.instruction)
    ]
    for site in unrolled:
        fate = implements(module, site.computation, site.instruction)
        rings[site.instruction.line_number] = fate
        if fate:
            of_family.setdefault(_family(site), fate)
    for site in unrolled:
        line = site.instruction.line_number
        rings[line] = rings[line] or of_family.get(_family(site), "all-gather")
    return rings


def _family(site: Site) -> tuple[str, int]:
    """Return what the permutes of one unrolled product have in common."""
    return site.instruction.op_name, _output_bytes(site, 2)


def _collective(
    walk: Executions, site: Site, axes: MeshAxes, rings: Mapping[int, str], roles: Roles
) -> Collective:
    module = walk.module
    instruction = site.instruction
    named = named_instruction(site)
    scope, pass_ = classify(dominant_op_names(named.op_name, site) if named else "", walk.stages)
    if named is not site.instruction and scope == "experts" and site.kind in EXCHANGE_KINDS:
        scope = stage_of_exchange(site, pass_)
    along, group = _groups(module, site, axes)
    size = _output_bytes(site, len(group))
    role = roles.of((site.computation.name, instruction.name), site.kind, _operand_shapes(site))
    if scope == "other":
        scope = role.stage(pass_)
    return Collective(
        kind=site.kind,
        axes=along,
        scope=scope,
        pass_=pass_,
        count=site.count,
        bytes=size,
        wire_bytes=wire_bytes(site.kind, _carried_bytes(site, size), len(group)),
        is_async=site.is_async,
        spmd_generated='is_spmd_generated="true"' in instruction.attribute_text,
        op_name=named.op_name if named else "",
        source=module.source(named or instruction),
        group=group,
        implements=rings.get(instruction.line_number, "") or _spelled(module, site, len(group)),
        role=role.name,
        parameter=roles.paths(role.parameters) or None,
        of_experts=role.of_experts,
    )


def _operand_shapes(site: Site) -> list[str]:
    return [site.computation.instruction(name).shape for name in site.instruction.operands]


def _spelled(module: Module, site: Site, group_size: int) -> str:
    if site.kind != "all-reduce" or group_size < 2:
        return ""
    inner = site.computation, site.instruction
    return implemented_by_all_reduce(module, inner, site.caller, group_size)


def _groups(module: Module, site: Site, axes: MeshAxes) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the axes and one group; for a permute, the pair that is farthest apart."""
    attributes = site.instruction.attributes
    devices = module.num_devices
    try:
        if site.kind == "collective-permute":
            pairs = parse_pairs(attributes.get("source_target_pairs", ""))
            farthest = max(pairs, key=lambda pair: abs(pair[0] - pair[1]), default=(0, 0))
            return axes.of_pairs(pairs), farthest
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
    return axes.of_groups(groups), max(map(tuple, groups), key=len)


def _output_bytes(site: Site, group_size: int) -> int:
    instruction = site.instruction
    if site.kind == "reduce-scatter" and instruction.opcode == "all-reduce":
        return shape_bytes(instruction.shape) // group_size
    return shape_bytes(outputs(site))


def _fits(site: Site, group_size: int) -> bool:
    kind = OPCODES[site.instruction.opcode]
    return sizes_fit(site.computation, site.instruction, kind, outputs(site), group_size)


def _carried_bytes(site: Site, size: int) -> int:
    """Return what can be on the wire: at most the smaller buffer of a ragged exchange.

    All devices together send what all together receive, so on average neither buffer is exceeded.
    """
    if site.kind != "ragged-all-to-all":
        return size
    operand = site.computation.instruction(site.instruction.operand(0))
    return min(size, shape_bytes(operand.shape))


def wire_bytes(kind: str, size: int, group_size: int) -> int:
    """Return the bytes one device must send for one execution, whatever the algorithm.

    Args:
        kind: one of `walk.KINDS`.
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
