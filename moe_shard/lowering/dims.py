"""Follow the dims of an array through changes of layout, and find the dims of products.

The dims of a value are a tuple with, for each dim, the dims of an ENTRY parameter that it holds:
`((1,), (), (2, 3))` for a value whose first dim is the parameter's dim 1, whose second is new, and
whose third holds the parameter's dims 2 and 3.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from moe_shard.lowering.hlo import Computation, Instruction
from moe_shard.lowering.shapes import array_dims, tuple_elements

Dims = tuple[tuple[int, ...], ...]

_LAYOUT = re.compile(r"\]\{([\d,]*)")
_LIBRARY_DIMS = re.compile(r'"(lhs|rhs)_(batch|contracting)_dimensions":\[([\d",]*)\]')
LIBRARY_PRODUCT = re.compile(r'custom_call_target="__(?:cublas|cudnn|onednn)[^"]*(?:gemm|matmul)')


def whole(rank: int) -> Dims:
    """Return the dims of an ENTRY parameter itself."""
    return tuple((dim,) for dim in range(rank))


def integers(text: str) -> list[int]:
    """Return the numbers in a text."""
    return [int(number) for number in re.findall(r"\d+", text)]


def minor_to_major(shape: str) -> list[int]:
    """Return the layout of an array: its dims, the one that is contiguous in memory first."""
    found = _LAYOUT.search(shape)
    rank = len(array_dims(shape))
    order = integers(found[1]) if found else []
    return order if len(order) == rank else list(range(rank))[::-1]


def transposed(dims: Dims, instruction: Instruction) -> Dims | None:
    """Return the dims after a `transpose`."""
    order = integers(instruction.attributes.get("dimensions", ""))
    if sorted(order) != list(range(len(dims))):
        return None
    return tuple(dims[dim] for dim in order)


def gathered(dims: Dims, instruction: Instruction) -> Dims | None:
    """Return the dims after a `gather`: a dim of picks holds the dims that are picked from."""
    named = instruction.attributes
    kept = integers(named.get("offset_dims", ""))
    dropped = integers(named.get("collapsed_slice_dims", ""))
    dropped += integers(named.get("operand_batching_dims", ""))
    picked = integers(named.get("start_index_map", ""))
    left = [dim for dim in range(len(dims)) if dim not in dropped]
    rank = len(array_dims(instruction.shape))
    if (
        len(kept) != len(left)
        or any(dim >= rank for dim in kept)
        or max(picked, default=0) >= len(dims)
    ):
        return None
    whole_dims = dict(zip(kept, left, strict=True))
    picks = tuple(sorted({each for dim in picked for each in dims[dim]}))
    return tuple(dims[whole_dims[at]] if at in whole_dims else picks for at in range(rank))


def broadcast(dims: Dims, instruction: Instruction) -> Dims | None:
    """Return the dims after a `broadcast`."""
    kept = integers(instruction.attributes.get("dimensions", ""))
    rank = len(array_dims(instruction.shape))
    if len(kept) != len(dims) or any(dim >= rank for dim in kept):
        return None
    result: list[tuple[int, ...]] = [()] * rank
    for place, dim in zip(kept, dims, strict=True):
        result[place] = dim
    return tuple(result)


def reduced(dims: Dims, instruction: Instruction) -> Dims:
    """Return the dims after a `reduce`."""
    gone = set(integers(instruction.attributes.get("dimensions", "")))
    return tuple(dim for at, dim in enumerate(dims) if at not in gone)


def reshaped(dims: Dims, before: str, after: str, *, in_memory: bool) -> Dims | None:
    """Return the dims after a `reshape`, or, in the order of memory, after a `bitcast`.

    Args:
        dims: the operand's dims.
        before: the operand's shape.
        after: the result's shape.
        in_memory: whether the bytes keep their places, as in a bitcast, rather than the order of
            the elements.

    Returns:
        None where the two shapes do not hold the same number of elements.
    """
    old, new = array_dims(before), array_dims(after)
    if len(old) != len(dims):
        return None
    old_order = minor_to_major(before)[::-1] if in_memory else list(range(len(old)))
    new_order = minor_to_major(after)[::-1] if in_memory else list(range(len(new)))
    result: list[tuple[int, ...]] = [()] * len(new)
    sources = [(old[at], dims[at]) for at in old_order if old[at] != 1]
    targets = [(new[at], at) for at in new_order if new[at] != 1]
    while sources and targets:
        (have, named), (size, place) = sources.pop(0), targets.pop(0)
        places = [place]
        while have != size:
            if have < size:
                if not sources:
                    return None
                more, name = sources.pop(0)
                have, named = have * more, named + name
            else:
                if not targets:
                    return None
                more, place = targets.pop(0)
                size *= more
                places.append(place)
        for each in places:
            result[each] = named
    if sources or targets:
        return None
    # Dims of size 1 go to dims of size 1, in order; where some were dropped, it is unknown which.
    ones = [dims[at] for at in old_order if old[at] == 1]
    free = [at for at in new_order if new[at] == 1]
    together = tuple(dim for name in ones for dim in name)
    for place, at in enumerate(free):
        if len(free) >= len(ones):
            result[at] = ones[place] if place < len(ones) else ()
        else:
            result[at] = together
    return tuple(result)


@dataclass(frozen=True)
class ProductDims:
    """List which dims of one operand of a product are batch dims, and which are contracted."""

    batch: tuple[int, ...]
    contracted: tuple[int, ...]


def product_dims(computation: Computation, instruction: Instruction, side: int) -> ProductDims:
    """Return the dims of operand 0 or 1 of a dot, a library's product, or a convolution.

    TPU writes a batched product as a convolution: a spatial dim that both operands and the result
    have is a batch dim; one that both operands have and the result does not is contracted.
    """
    name = ("lhs", "rhs")[side]
    if instruction.opcode == "convolution":
        return _convolution_dims(computation, instruction, side)
    if instruction.opcode == "custom-call":
        found = {
            (where, what): tuple(integers(text))
            for where, what, text in _LIBRARY_DIMS.findall(instruction.attribute_text)
        }
        return ProductDims(found.get((name, "batch"), ()), found.get((name, "contracting"), ()))
    attributes = instruction.attributes
    return ProductDims(
        tuple(integers(attributes.get(f"{name}_batch_dims", ""))),
        tuple(integers(attributes.get(f"{name}_contracting_dims", ""))),
    )


def _convolution_dims(computation: Computation, instruction: Instruction, side: int) -> ProductDims:
    labels = re.fullmatch(
        r"(\w+)_(\w+)->(\w+)", instruction.attributes.get("dim_labels", "").replace("?", "")
    )
    if labels is None:
        return ProductDims((), ())
    sizes: list[dict[str, int]] = []
    shapes = [computation.instruction(instruction.operand(at)).shape for at in (0, 1)]
    shapes.append(tuple_elements(instruction.shape)[0])
    for label, shape in zip(labels.groups(), shapes, strict=True):
        dims = array_dims(shape)
        if len(dims) != len(label):
            return ProductDims((), ())
        sizes.append(dict(zip(label, dims, strict=True)))
    lhs, rhs, out = sizes
    batch: list[int] = []
    contracted: list[int] = []
    for place, label in enumerate(labels[side + 1]):
        if label == ("f", "i")[side]:
            contracted.append(place)
        elif label.isdecimal() and lhs[label] > 1 and rhs[label] > 1:
            (batch if out[label] > 1 else contracted).append(place)
    return ProductDims(tuple(batch), tuple(contracted))


def free_dims(computation: Computation, instruction: Instruction, side: int) -> Dims | None:
    """Mark the dims of a product's result that are free dims of operand 0 or 1.

    Returns:
        For each dim of the result (-1,) where it is, () where it is not; None where the result's
        dims are unknown.
    """
    if instruction.opcode == "convolution":
        labels = re.fullmatch(
            r"(\w+)_(\w+)->(\w+)", instruction.attributes.get("dim_labels", "").replace("?", "")
        )
        free = ("b", "f")[side]
        return tuple((-1,) if label == free else () for label in labels[3]) if labels else None
    rank = len(array_dims(tuple_elements(instruction.shape)[0]))
    if instruction.opcode == "ragged-dot":
        return (*((),) * (rank - 1), (-1,))
    counts = []
    for at in (0, 1):
        dims = product_dims(computation, instruction, at)
        size = len(array_dims(computation.instruction(instruction.operand(at)).shape))
        counts.append(size - len(dims.batch) - len(dims.contracted))
    batch = rank - sum(counts)
    if batch < 0:
        return None
    first = [(-1,) if side == 0 else ()] * counts[0]
    second = [(-1,) if side == 1 else ()] * counts[1]
    return (*[()] * batch, *first, *second)
