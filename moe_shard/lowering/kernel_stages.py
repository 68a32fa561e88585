"""Tell of every kernel of a compiled program which stage of the model, and which pass, it is for.

A profile names kernels by the instructions they were compiled from. Their stages are read from the
program's own text: a collective's as in the report, a product's of experts by the dataflow, any
other's from its op_name, from what is fused into it, or from its neighbours.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from moe_shard.lowering.collectives import Collective, Extraction
from moe_shard.lowering.hlo import Computation, HloParseError, Instruction
from moe_shard.lowering.op_names import classify
from moe_shard.lowering.walk import ASYNC_CALLS, KINDS
from moe_shard.lowering.work import product_flops
from moe_shard.scopes import SCOPES

CASTS, COPIES, OTHER = "casts", "copies", "other"
STAGES = (*SCOPES, CASTS, COPIES, *KINDS, OTHER)
"""Every stage of a kernel, in the order of tables: those of the model, then changes of dtype and
layout, then collectives by kind."""

# They run other instructions, which a profile lists as well.
_CONTAINERS = frozenset({"while", "call", "conditional"})
_PALLAS = re.compile(r"(\w+)/pallas_call")
_HOPS = 3
"""How far away a neighbour's name still shows what an instruction without one is for."""
_MOVES = frozenset(
    {"parameter", "constant", "bitcast", "copy", "transpose", "reshape", "tuple", "convert"}
    | {"get-tuple-element", "copy-start", "copy-done"}
)


@dataclass(frozen=True)
class KernelStage:
    """Say what one instruction of the program is for.

    Attributes:
        stage: one of `STAGES`.
        pass_: "forward", "backward", "optimizer" or "unknown".
        op_name: the path in the traced program that shows it; "" where there is none.
        source: "file:line", or None.
        opcode: the instruction's.
    """

    stage: str
    pass_: str
    op_name: str
    source: str | None
    opcode: str

    @property
    def runs_others(self) -> bool:
        """Return whether it only runs other instructions, as a loop does."""
        return self.opcode in _CONTAINERS


class KernelStages:
    """Look up stages by the names of instructions.

    Args:
        extraction: the program, see `extract_collectives`.
    """

    def __init__(self, extraction: Extraction) -> None:
        self._extraction = extraction
        self._module, self._walk = extraction.module, extraction.walk
        flow = extraction.roles.flow
        self._experts = flow.gradients | flow.products.keys()
        self._homes: dict[str, Computation] = {}
        for computation in self._walk.order:
            if computation.name not in self._walk.fused:
                for name in computation.opcodes:
                    self._homes.setdefault(name, computation)
        self._loops = {
            call.called: computation.instruction(call.instruction)
            for computation in self._walk.order
            for call in computation.calls()
            if call.opcode == "while"
        }
        self._known: dict[str, KernelStage | None] = {}

    @property
    def program(self) -> str:
        """Return the name of the module."""
        return self._module.name

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the instructions that kernels are compiled from."""
        return tuple(self._homes)

    @property
    def pallas_kernels(self) -> dict[str, str]:
        """Return {name of a Pallas kernel: an instruction that runs it}."""
        found: dict[str, str] = {}
        for name, home in self._homes.items():
            if home.opcodes[name] == "custom-call":
                kernel = _PALLAS.search(home.instruction(name).op_name)
                if kernel:
                    found.setdefault(kernel[1], name)
        return found

    @property
    def once(self) -> frozenset[str]:
        """Return the names of the instructions that a step executes once."""
        entry = self._module.entry
        return frozenset(name for name, home in self._homes.items() if home is entry)

    def of(self, instruction: str) -> KernelStage | None:
        """Return the stage of an instruction; None where the program has none of that name."""
        if instruction not in self._known:
            home = self._homes.get(instruction)
            self._known[instruction] = self._find(home, instruction) if home else None
        return self._known[instruction]

    def _find(self, home: Computation, name: str) -> KernelStage:
        instruction = home.instruction(name)
        collective = self._collective(home, instruction)
        if collective is not None:
            return KernelStage(
                collective.kind,
                collective.pass_,
                collective.op_name,
                collective.source,
                instruction.opcode,
            )
        shown_by, op_name = self._named(home, instruction)
        scope, pass_ = classify(op_name, self._walk.stages)
        moved = self._moves(instruction)
        if self._is_of_experts(home, instruction):
            stage = "experts"
        elif moved == CASTS or (moved and scope == OTHER):
            stage = moved
        else:
            stage = scope
        try:
            source = self._module.source(shown_by)
        except HloParseError:  # a frame that the tables lack: the time counts all the same
            source = None
        return KernelStage(stage, pass_, op_name, source, instruction.opcode)

    def _collective(self, home: Computation, instruction: Instruction) -> Collective | None:
        """Return the collective that an instruction is, starts, contains or completes."""
        first = instruction
        while first.opcode.endswith(("-done", "-update")) and first.operands:
            first = home.instruction(first.operand(0))
        found = self._extraction.at.get((home.name, first.name))
        if found is not None or first.opcode not in ("fusion", *ASYNC_CALLS):
            return found
        called = self._called(first)
        inside = (self._extraction.at.get((called.name, name)) for name in called.opcodes)
        return next(filter(None, inside), None)

    def _called(self, instruction: Instruction) -> Computation:
        return self._module.called_by(instruction, "calls", "called_computations", "to_apply")

    def _inside(self, home: Computation, instruction: Instruction) -> list[tuple[Computation, str]]:
        """List an instruction, or those that are fused into it, each with its computation."""
        if instruction.opcode != "fusion":
            return [(home, instruction.name)]
        called = self._called(instruction)
        return [
            each
            for name in called.opcodes
            for each in self._inside(called, called.instruction(name))
        ]

    def _is_of_experts(self, home: Computation, instruction: Instruction) -> bool:
        inside = self._inside(home, instruction)
        return any((computation.name, name) in self._experts for computation, name in inside)

    def _moves(self, instruction: Instruction) -> str:
        """Return "casts" or "copies" for what does no arithmetic; else ""."""
        opcodes = {instruction.opcode}
        if instruction.opcode == "fusion":
            opcodes = set(self._called(instruction).opcodes.values())
        if not opcodes <= _MOVES:
            return ""
        return CASTS if "convert" in opcodes else COPIES

    def _named(self, home: Computation, instruction: Instruction) -> tuple[Instruction, str]:
        """Return the op_name that shows what an instruction is for, and who has it."""
        own = instruction
        for names in self._candidates(home, instruction):
            named = [each for each in names if each.op_name]
            op_name = ";".join(dict.fromkeys(each.op_name for each in named))
            if op_name and classify(op_name, self._walk.stages)[0] != OTHER:
                return named[0], op_name
            if op_name and not own.op_name:
                own = named[0]
        return own, own.op_name

    def _candidates(
        self, home: Computation, instruction: Instruction
    ) -> Iterator[list[Instruction]]:
        """Yield whose names may show it: the product in a fusion, itself, the rest, neighbours."""
        inside = [
            computation.instruction(name) for computation, name in self._inside(home, instruction)
        ]
        if instruction.opcode == "fusion":
            fused = self._inside(home, instruction)
            yield [
                product
                for computation, name in fused
                if product_flops(computation, product := computation.instruction(name))
            ]
        yield [instruction]
        yield inside
        if any(each.op_name for each in (instruction, *inside)):
            return  # a name of no stage is an answer too
        if (caller := self._walk.callers.get(home.name)) is not None:
            yield [caller[1]]
        yield from self._around(home, instruction)
        if home.name in self._loops:  # which pass it is, at least
            yield [self._loops[home.name]]

    @staticmethod
    def _around(home: Computation, instruction: Instruction) -> Iterator[list[Instruction]]:
        """Yield the neighbours, each a hop farther; a user of a result before what made it."""
        for next_to in (
            lambda each: home.users(each.name),
            lambda each: each.operands,
        ):
            found = [instruction]
            for _ in range(_HOPS):
                names = dict.fromkeys(name for each in found for name in next_to(each))
                found = [home.instruction(name) for name in names]
                found = [each for each in found if each.opcode not in _CONTAINERS]
                yield found
