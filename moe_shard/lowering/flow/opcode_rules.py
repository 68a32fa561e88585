"""Gather all rules by opcode, with the rule of collectives, and evaluate a module with them."""

from __future__ import annotations

from collections.abc import Mapping

from moe_shard.lowering import dims as following
from moe_shard.lowering.flow import arithmetic, indexing, kernels, layout, products
from moe_shard.lowering.flow.arithmetic import elementwise
from moe_shard.lowering.flow.evaluation import Assumption, Evaluation, Flow, OpcodeRule
from moe_shard.lowering.flow.products import mapped
from moe_shard.lowering.flow.states import CONSTANT, ROUTED, State, Value, flat, join
from moe_shard.lowering.hlo import Computation, Instruction, Module
from moe_shard.lowering.shapes import tuple_elements
from moe_shard.lowering.walk import EXCHANGE_KINDS, OPCODES


def evaluate(
    module: Module,
    assumed: Assumption | None = None,
    shardings: Mapping[int, str] | None = None,
) -> Flow:
    """Evaluate a module (see `flow`).

    Args:
        module: the program.
        assumed: which dims count experts, for a program without a router; with None, products of
            experts are those of routed data.
        shardings: shardings of the ENTRY parameters by position, where the text has none.

    Raises:
        HloParseError: the text is damaged.
    """
    return Evaluation(module, _RULES, elementwise, assumed, shardings).run()


def _collective(
    run: Evaluation, computation: Computation, instruction: Instruction, operands: list[Value]
) -> Value:
    kind = OPCODES[instruction.opcode]
    site = (computation.name, instruction.name)
    states = [flat(each) for each in operands]
    if kind == "ragged-all-to-all":
        states = states[:1]  # the others are its output buffer, offsets and sizes
    run.flow.sites[site] = states
    bit = run.flow.bit(site)
    if kind in EXCHANGE_KINDS:
        run.flow.exchanges |= bit
    results: list[State] = []
    for state in states if kind != "all-to-all" else [join(states)] * len(states):
        marks = state.marks
        if kind == "ragged-all-to-all":
            marks |= ROUTED
        results.append(state._replace(marks=marks, via=state.via | bit))
        _note_gather(run, site, kind, instruction, state)
    shape = instruction.shape
    is_start = instruction.opcode.endswith("-start") and kind != "all-reduce"
    value: Value
    if is_start:
        result = tuple_elements(shape)[1] if shape.startswith("(") else shape
        value = list(results) if result.startswith("(") else results[0]
        return [list(operands), value, CONSTANT]
    if shape.startswith("("):
        count = len(tuple_elements(shape))
        return [results[min(at, len(results) - 1)] for at in range(count)]
    return results[0] if results else CONSTANT


def _note_gather(
    run: Evaluation, site: tuple[str, str], kind: str, instruction: Instruction, state: State
) -> None:
    """Record along which dim of a parameter it is gathered: there it is split."""
    if kind == "all-gather" and state.origin is not None and state.origin.dims is not None:
        places = following.integers(instruction.attributes.get("dimensions", ""))
        run.flow.gathered[site] = {(state.origin.main, dim) for dim in mapped(state, tuple(places))}


_RULES: dict[str, OpcodeRule] = {
    **layout.LAYOUT_RULES,
    **arithmetic.ARITHMETIC_RULES,
    **indexing.INDEXING_RULES,
    **products.PRODUCT_RULES,
    **kernels.KERNEL_RULES,
    **dict.fromkeys(OPCODES, _collective),
}
