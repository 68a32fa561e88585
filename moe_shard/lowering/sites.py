"""Find the instructions that are collectives, each once: copies of asynchronous ones removed."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from moe_shard.lowering.hlo import Computation, HloParseError, Instruction, Module
from moe_shard.lowering.replica_groups import parse_groups
from moe_shard.lowering.shapes import tuple_elements
from moe_shard.lowering.spellings import is_middle_of_async, keeps_one_shard
from moe_shard.lowering.walk import OPCODES, Executions

_LAYOUT = re.compile(r"\{[^}]*\}")


@dataclass(frozen=True)
class Site:
    """Locate a collective instruction in its computation, and the instruction that calls that."""

    instruction: Instruction
    kind: str
    computation: Computation
    caller: tuple[Computation, Instruction] | None
    count: int
    is_async: bool


def find_sites(walk: Executions) -> list[Site]:
    """Find the collectives in the order of the text, copies of asynchronous ones removed."""
    found = [
        _site(walk, computation, computation.instruction(name))
        for computation in walk.order
        for name, opcode in computation.opcodes.items()
        if opcode in OPCODES and walk.counts[computation.name]
    ]
    kept = [site for site in found if site.computation.name not in walk.fused]
    kept += _without_copies([site for site in found if site.computation.name in walk.fused])
    return sorted(kept, key=lambda site: site.instruction.line_number)


def _site(walk: Executions, computation: Computation, instruction: Instruction) -> Site:
    kind = OPCODES[instruction.opcode]
    devices = "source_target_pairs" if kind == "collective-permute" else "replica_groups"
    if devices not in instruction.attributes:  # compilers always write it, even if it is {}
        raise instruction.damaged(f"without {devices}")
    if kind == "all-reduce" and computation.name in walk.fused:
        parts = _group_size(walk.module, instruction)
        if parts > 1 and keeps_one_shard(walk.module, computation, instruction, parts):
            kind = "reduce-scatter"  # TPU writes it as a fusion of an all-reduce and a slice
    return Site(
        instruction,
        kind,
        computation,
        walk.callers.get(computation.name),
        walk.counts[computation.name],
        instruction.opcode.endswith("-start") or computation.name in walk.asynchronous,
    )


def _group_size(module: Module, instruction: Instruction) -> int:
    try:
        text = instruction.attributes.get("replica_groups", "{}")
        return max(map(len, parse_groups(text, module.num_devices)))
    except HloParseError as error:
        raise HloParseError(f"HLO line {instruction.line_number}: {error}") from error


def _without_copies(sites: list[Site]) -> list[Site]:
    """Keep one site for each run of TPU's async collective fusion.

    Such a collective is started in one fusion, passed through others (also inside loops), and
    finished in another; each repeats the instruction. channel_id does not distinguish them from
    other collectives (shard_map gives all of its own channel 1), the start does.
    """
    families: dict[tuple[str, int | None, str, str], list[Site]] = {}
    for site in sites:
        instruction = site.instruction
        channel = instruction.integer("channel_id")
        # The copies differ in layout, which includes the memory space that they write to.
        shape = _LAYOUT.sub("", instruction.shape)
        key = (site.kind, channel, instruction.op_name, shape)
        families.setdefault(key, []).append(site)
    kept: list[Site] = []
    for family in families.values():
        parts = [(_async_part(site.computation), site) for site in family]
        # A collective outside async fusions may have the same key.
        kept += [site for part, site in parts if not part]
        copies = [site for part, site in parts if part]
        starts = [site for part, site in parts if part == "start"]
        if copies and not starts:
            starts = [min(copies, key=lambda site: site.count)]
        kept += [replace(site, is_async=True) for site in starts]
    return kept


def _async_part(computation: Computation) -> str:
    """Return what a fused computation is of an async collective: start, done, middle, or ""."""
    for name, opcode in computation.opcodes.items():
        if opcode == "custom-call":
            text = computation.instruction(name).attribute_text
            for part in ("Start", "Done"):
                if f'custom_call_target="AsyncCollective{part}"' in text:
                    return part.lower()
    return "middle" if is_middle_of_async(computation) else ""


def outputs(site: Site) -> str:
    """Return the shape of the output, a tuple where it is several arrays."""
    instruction = site.instruction
    if instruction.opcode.endswith("-start") and site.kind != "all-reduce":
        # The result of a start is (operands, outputs, ...); that of all-reduce-start the outputs.
        elements = tuple_elements(instruction.shape)
        return elements[1] if len(elements) > 1 else instruction.shape
    return instruction.shape
