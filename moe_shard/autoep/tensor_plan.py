"""Plan which tensor of a Hugging Face checkpoint fills which part of which parameter.

A plan is data, made from the configuration and the headers alone. Its layouts are views: the one
that reads a tensor into a parameter also writes the parameter back into the tensor, so that what
was imported is exported bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

Take = tuple[slice, ...]
"""A part of a tensor: a slice for each of its leading dims; empty: all of it."""


@dataclass(frozen=True)
class Layout:
    """Describe how a tensor's elements are ordered in a parameter: a part, reshaped, transposed.

    Where a part is found only in the reshaped tensor, `inside` is what becomes of that.

    Attributes:
        take: the part, a slice for each of the tensor's leading dims; empty: all of it.
        split: the shape that the part is reshaped to; empty: its own.
        order: the order of these dims, as in `numpy.transpose`; empty: unchanged.
        inside: the layout of the result in the parameter; None: it is the parameter's part.
    """

    take: Take = ()
    split: tuple[int, ...] = ()
    order: tuple[int, ...] = ()
    inside: Layout | None = None

    @property
    def keeps_first(self) -> bool:
        """Return whether the whole first dim of the tensor is the first dim of the part."""
        is_whole = self.take[:1] in ((), (slice(None),))
        plain = not self.split and self.inside is None
        return is_whole and plain and self.order[:1] in ((), (0,))

    def view(self, tensor: np.ndarray) -> np.ndarray:
        """View a tensor's elements in the order of the parameter, in the same memory.

        Raises:
            ValueError: the part cannot be reshaped without a copy.
        """
        return self.arrange(tensor[self.take])

    def arrange(self, part: np.ndarray) -> np.ndarray:
        """Reorder elements of a part that is already selected.

        Raises:
            ValueError: they cannot be reshaped without a copy.
        """
        if self.split:
            part = part.reshape(self.split, copy=False)
        if self.order:
            part = part.transpose(self.order)
        return part if self.inside is None else self.inside.view(part)


@dataclass(frozen=True)
class Piece:
    """Describe one tensor, or a part of it, and the part of a parameter that it fills.

    Attributes:
        tensor: its name in the checkpoint.
        param: the parameter's path, such as ("layers_1", "mlp", "experts", "gate").
        index: indices of the part in the parameter's leading dims: (layer of the stack,) or (layer,
            expert).
        layout: order of the tensor's elements in that part.
    """

    tensor: str
    param: tuple[str, ...]
    index: tuple[int, ...] = ()
    layout: Layout = field(default_factory=Layout)


@dataclass(frozen=True)
class TensorPlan:
    """Hold the plan of all tensors of a checkpoint.

    Attributes:
        pieces: pieces that together fill each parameter, and use up each tensor not carried.
        carried: names of tensors that are exported unchanged, but for the parts that pieces take.
        copies: pieces of tensors that repeat what another one has, as a head the embedding: they
            are not read, and an export writes them like the other.
    """

    pieces: tuple[Piece, ...]
    carried: tuple[str, ...] = ()
    copies: tuple[Piece, ...] = ()
