"""Count the arithmetic and the memory traffic of HLO instructions.

FLOPs are those of products (dot, convolution, ragged dot, library calls, kernels of grouped
products and of attention), where a transformer spends them: 2 for each multiply-add. Of attention
half of all pairs of tokens are counted; any other Pallas kernel counts what it states itself, which
on GPU is nothing. Memory traffic is what an instruction reads and writes once: values inside a
fusion are not counted, and of an operand that a fusion only slices, only the slice is.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from moe_shard.lowering.attention_kernels import attention_kernel_flops
from moe_shard.lowering.flow.evaluation import Flow
from moe_shard.lowering.hlo import Computation, Instruction, Module
from moe_shard.lowering.op_names import classify
from moe_shard.lowering.shapes import array_dims, shape_bytes, tuple_elements
from moe_shard.lowering.walk import OPCODES, Executions

_LIBRARY_PRODUCT = re.compile(r'custom_call_target="__(?:cublas|cudnn)[^"]*(?:gemm|matmul)')
_LIBRARY_CONTRACTED = re.compile(r'"lhs_contracting_dimensions":\[([\d",]*)\]')
# The kernels of `moe.grouped` on GPU: each token copy is multiplied with the weights of one group.
# "gated" multiplies the same rows by two weights, "gated_dx" two arrays of rows by one each.
_GROUPED_KERNEL = re.compile(r"grouped_(forward|gated|dx|gated_dx|dw)/pallas_call")
_COST_ESTIMATE = re.compile(r'"cost_estimate":\{"flops":"(\d+)"')
_KERNEL = re.compile(
    r'custom_call_target="(?:tpu_custom_call|__gpu\$xla\.gpu\.triton|mosaic_gpu\w*)"'
)
UNKNOWN = "unknown"
"""The stage of work that has no name, and whose neighbours have none."""
_PRODUCTS = frozenset({"dot", "convolution", "ragged-dot", "custom-call"})
# These move nothing themselves, or are counted elsewhere.
_FREE = frozenset(
    {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "while", "call"}
    | {
        "conditional",
        "partition-id",
        "replica-id",
        "opt-barrier",
        "async-start",
        "call-start",
    }
    | {"async-update", "async-done", "copy-start", "copy-done", "iota"}
)
_SLICES = frozenset({"dynamic-slice", "slice", "gather"})
# Arrays outside the device's main memory: on the TPU chip, or on the host.
_ELSEWHERE = re.compile(r"\w+\[[^\]]*\]\{[^}]*S\([1-9]\d*\)\}")
_SAME = frozenset({"bitcast", "reshape"})


def product_flops(computation: Computation, instruction: Instruction) -> int:
    """Return the FLOPs of one product; 0 for any other instruction.

    Raises:
        HloParseError: the instruction is damaged.
    """
    opcode = instruction.opcode
    if opcode == "convolution":
        return _convolution_flops(computation, instruction)
    if opcode == "custom-call" and not _LIBRARY_PRODUCT.search(instruction.attribute_text):
        return _kernel_flops(computation, instruction)
    if opcode not in _PRODUCTS:
        return 0
    lhs = array_dims(computation.instruction(instruction.operand(0)).shape)
    contracted = math.prod(lhs[dim] for dim in _contracted(instruction, len(lhs)))
    result = array_dims(tuple_elements(instruction.shape)[0])
    return 2 * math.prod(result) * contracted


def _kernel_flops(computation: Computation, instruction: Instruction) -> int:
    """Return the FLOPs of a kernel: stated by the kernel (TPU), or known by its name.

    Slots of a buffer that no group covers are counted, though a kernel may skip them.
    """
    if 'custom_call_target="tpu_custom_call"' in instruction.attribute_text:
        stated = _COST_ESTIMATE.search(instruction.attribute_text)
        return int(stated[1]) if stated else attention_kernel_flops(computation, instruction)
    kernel = _GROUPED_KERNEL.search(instruction.op_name)
    if "triton" not in instruction.attribute_text:
        return 0
    if kernel is None:
        return attention_kernel_flops(computation, instruction)
    rows, other = (
        array_dims(computation.instruction(instruction.operand(at)).shape) for at in (0, 1)
    )
    if kernel[1] == "dw":
        return 2 * math.prod(rows) * other[1]
    products = 2 if "gated" in kernel[1] else 1
    return products * 2 * math.prod(array_dims(tuple_elements(instruction.shape)[0])) * rows[1]


def _contracted(instruction: Instruction, rank: int) -> list[int]:
    if instruction.opcode == "custom-call":
        found = _LIBRARY_CONTRACTED.search(instruction.attribute_text)
        text = found[1] if found else ""
    else:
        text = instruction.attributes.get("lhs_contracting_dims", "")
    dims = [int(dim) for dim in re.findall(r"\d+", text)]
    if any(dim >= rank for dim in dims):
        raise instruction.damaged("a contracted dim that its operand does not have")
    return dims


@dataclass(frozen=True)
class _Window:
    """Describe one spatial dim of a convolution."""

    size: int
    stride: int = 1
    before: int = 0
    lhs_dilate: int = 1
    rhs_dilate: int = 1

    def pairs(self, inputs: int, outputs: int) -> int:
        """Count the (output, window position) pairs that meet an existing input."""
        met = 0
        for position in range(self.size):
            offset = position * self.rhs_dilate - self.before
            if self.lhs_dilate == 1:
                first = max(0, -(offset // self.stride))
                last = min(outputs - 1, (inputs - 1 - offset) // self.stride)
                met += max(0, last - first + 1)
                continue
            for output in range(outputs):
                at, rest = divmod(output * self.stride + offset, self.lhs_dilate)
                met += rest == 0 and 0 <= at < inputs
        return met


def _convolution_flops(computation: Computation, instruction: Instruction) -> int:
    """Count as XLA's own cost analysis; TPU writes every product of more than two dims so."""
    labels = re.fullmatch(
        r"(\w+)_(\w+)->(\w+)", instruction.attributes.get("dim_labels", "").replace("?", "")
    )
    if labels is None:
        raise instruction.damaged("a convolution without dim_labels")
    operands = (computation.instruction(instruction.operand(at)).shape for at in (0, 1))
    shapes = [*operands, tuple_elements(instruction.shape)[0]]
    sizes = []
    for label, shape in zip(labels.groups(), shapes, strict=True):
        dims = array_dims(shape)
        if len(dims) != len(label):
            raise instruction.damaged(f"dim_labels do not fit {shape[:40]}")
        sizes.append(dict(zip(label, dims, strict=True)))
    lhs, rhs, out = sizes
    groups = instruction.integer("feature_group_count") or 1
    batch_groups = instruction.integer("batch_group_count") or 1
    spatial = [label for label in labels[1] if label.isdecimal()]
    met = math.prod(
        window.pairs(lhs[label], out[label])
        for label, window in zip(sorted(spatial), _windows(instruction, len(spatial)), strict=True)
    )
    return 2 * (lhs["f"] // groups) * rhs["o"] * (lhs["b"] // batch_groups) * met


def _windows(instruction: Instruction, rank: int) -> list[_Window]:
    text = instruction.attributes.get("window", "")
    fields = dict(re.findall(r"(\w+)=([\w\-]+)", text))

    def numbers(key: str, default: int) -> list[int]:
        values = (
            [int(each.split("_")[0]) for each in fields[key].split("x")] if key in fields else []
        )
        return values or [default] * rank

    columns = [
        numbers(key, default)
        for key, default in (
            ("size", 1),
            ("stride", 1),
            ("pad", 0),
            ("lhs_dilate", 1),
            ("rhs_dilate", 1),
        )
    ]
    if any(len(column) != rank for column in columns):
        raise instruction.damaged("a window of another rank than its dim_labels")
    return [_Window(*row) for row in zip(*columns, strict=True)]


def flops(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Return the FLOPs of one execution of an instruction, including those inside a fusion."""
    if instruction.opcode == "fusion":
        fused = module.called_by(instruction, "calls")
        return sum(flops(module, fused, each) for each in _with_products(fused))
    return product_flops(computation, instruction)


def _with_products(fused: Computation) -> list[Instruction]:
    wanted = _PRODUCTS | {"fusion"}
    return [fused.instruction(name) for name, opcode in fused.opcodes.items() if opcode in wanted]


def scope_of(walk: Executions, computation: Computation, instruction: Instruction) -> str:
    """Return the stage of the model of an instruction; that of its neighbours if it has no name.

    CPU's compiler drops the names of the products that it replaces by library calls.
    """
    while not instruction.op_name and computation.name in walk.callers:
        computation, instruction = walk.callers[computation.name]
    if instruction.op_name:
        return classify(instruction.op_name, walk.stages)[0]
    around = (*instruction.operands, *computation.users(instruction.name))
    names = ";".join(filter(None, (computation.instruction(name).op_name for name in around)))
    return classify(names, walk.stages)[0] if names else UNKNOWN


def flops_by_scope(walk: Executions, flow: Flow | None = None) -> Counter[str]:
    """Return the FLOPs per step and device by stage of the model.

    Args:
        walk: the program.
        flow: the origins of its values; a product of experts counts as theirs in any scope.

    Returns:
        FLOPs by `op_names.SCOPES`; "other" for names of no stage, `UNKNOWN` where there is none.
    """
    done = Counter[str]()
    experts = set[tuple[str, str]]() if flow is None else flow.gradients | flow.products.keys()
    counts = _executions(walk)
    for computation in walk.order:
        times = counts[computation.name]
        for name, opcode in computation.opcodes.items():
            if opcode in _PRODUCTS and times:
                instruction = computation.instruction(name)
                if count := product_flops(computation, instruction):
                    is_experts = (computation.name, name) in experts
                    scope = "experts" if is_experts else scope_of(walk, computation, instruction)
                    done[scope] += times * count
    return done


def _executions(walk: Executions) -> Mapping[str, int]:
    """Return how often each computation runs in a step, of a conditional the largest branch alone.

    One branch runs: the one with the most products is counted. `walk.counts` has all of them, since
    their collectives are counted as if every branch ran.
    """
    if all("conditional" not in each.opcodes.values() for each in walk.order):
        return walk.counts
    flops: dict[str, int] = {}
    for computation in reversed(walk.order):  # what is called comes before its callers
        products = (name for name, opcode in computation.opcodes.items() if opcode in _PRODUCTS)
        own = sum(product_flops(computation, computation.instruction(name)) for name in products)
        called = _calls(walk, computation, flops)
        flops[computation.name] = own + sum(times * flops[name] for name, times in called)
    counts = dict.fromkeys(flops, 0) | {walk.module.entry.name: 1}
    for computation in walk.order:
        for name, times in _calls(walk, computation, flops):
            counts[name] += times * counts[computation.name]
    return counts


def _calls(
    walk: Executions, computation: Computation, flops: Mapping[str, int]
) -> Iterator[tuple[str, int]]:
    """Yield what a computation calls and how often, of a conditional the largest branch alone."""
    branches: dict[str, list[str]] = {}
    for call in computation.calls():
        if call.opcode == "conditional":
            branches.setdefault(call.instruction, []).append(call.called)
        elif call.opcode == "while" and call.role == "body":
            yield call.called, walk.times(computation, call.instruction)
        else:
            yield call.called, 1
    for names in branches.values():
        yield max(names, key=lambda name: flops[name]), 1


def memory_bytes(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Return the bytes that one execution of an instruction reads and writes."""
    opcode = instruction.opcode
    if opcode in OPCODES or opcode.endswith("-done"):
        return 0  # it is counted as on the wire
    if opcode in _FREE or 'custom_call_target="AllocateBuffer"' in instruction.attribute_text:
        return 0
    operands = instruction.operands
    if opcode == "fusion":
        fused = module.called_by(instruction, "calls")
        read = sum(
            _read_of(fused, parameter)
            for parameter in fused.parameters()
            if _bytes(computation.instruction(operands[parameter.parameter_number]).shape)
        )
        return read + (_written(fused, fused.root) if _bytes(instruction.shape) else 0)
    if opcode in _SLICES:
        return 2 * _bytes(instruction.shape)
    if opcode == "dynamic-update-slice":
        return 2 * shape_bytes(computation.instruction(instruction.operand(1)).shape)
    read = sum(_bytes(computation.instruction(name).shape) for name in dict.fromkeys(operands))
    return read + _bytes(instruction.shape)


def memory_by_scope(walk: Executions) -> Counter[str]:
    """Return the bytes a step reads and writes per device, by stage of the model."""
    moved = Counter[str]()
    counts = _executions(walk)
    for computation in walk.order:
        times = counts[computation.name]
        if not times or computation.name in walk.fused or computation.name in walk.asynchronous:
            continue
        for instruction in map(computation.instruction, computation.opcodes):
            if size := memory_bytes(walk.module, computation, instruction):
                moved[scope_of(walk, computation, instruction)] += times * size
    return moved


def _read_of(fused: Computation, value: Instruction) -> int:
    """Return the bytes that a fusion reads of one of its parameters."""
    read = 0
    for user in map(fused.instruction, fused.users(value.name)):
        if user.opcode in _SLICES and user.operand(0) == value.name:
            read += shape_bytes(user.shape)
        elif user.opcode in _SAME:
            read += _read_of(fused, user)
        elif user.opcode != "dynamic-update-slice" or user.operand(0) != value.name:
            return _bytes(value.shape)
    return min(read, _bytes(value.shape))


def _written(fused: Computation, name: str) -> int:
    """Return the bytes a fusion writes; of a buffer updated in place, only the update."""
    result = fused.instruction(name)
    if result.opcode == "tuple":
        return sum(_written(fused, each) for each in result.operands)
    if result.opcode in _SAME:
        return _written(fused, result.operand(0))
    if result.opcode == "dynamic-update-slice":
        return _bytes(fused.instruction(result.operand(1)).shape)
    return _bytes(result.shape)


def _bytes(shape: str) -> int:
    here = _ELSEWHERE.sub("", shape)
    return shape_bytes(here) if "[" in here else 0
