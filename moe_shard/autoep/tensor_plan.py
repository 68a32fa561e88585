"""Plan which tensor of a Hugging Face checkpoint fills which part of which parameter.

A plan is data, made from the configuration and the headers alone. Its layouts are views: the one
that reads a tensor into a parameter also writes the parameter back into the tensor, so that what
was imported is exported bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

Take = tuple[slice, ...]
"""The part that is taken of a tensor: a slice for each of its first dims; empty: all of it."""


@dataclass(frozen=True)
class Layout:
    """How a tensor's elements are ordered in a parameter: a part of it, reshaped, transposed.

    Attributes:
        take: the part, a slice for each of the tensor's first dims; empty: all of it.
        split: the shape that the part is seen in; empty: its own.
        order: of the dims then, as in `numpy.transpose`; empty: as they are.
    """

    take: Take = ()
    split: tuple[int, ...] = ()
    order: tuple[int, ...] = ()

    @property
    def keeps_first(self) -> bool:
        """Return whether the tensor's first dim is the part's, all of it."""
        is_whole = self.take[:1] in ((), (slice(None),))
        return is_whole and not self.split and self.order[:1] in ((), (0,))

    def view(self, tensor: np.ndarray) -> np.ndarray:
        """View a tensor's elements in the order of the parameter, in the same memory.

        Raises:
            ValueError: the part cannot be reshaped without a copy.
        """
        return self.arrange(tensor[self.take])

    def arrange(self, part: np.ndarray) -> np.ndarray:
        """Do the same with elements that have been taken already.

        Raises:
            ValueError: they cannot be reshaped without a copy.
        """
        if self.split:
            part = part.reshape(self.split, copy=False)
        return part.transpose(self.order) if self.order else part


@dataclass(frozen=True)
class Piece:
    """One tensor, or a part of it, and the part of a parameter that it fills.

    Attributes:
        tensor: its name in the checkpoint.
        param: the parameter's path, such as ("layers_1", "mlp", "experts", "gate").
        index: of the part in the parameter's first dims: (layer of the stack,) or (layer, expert).
        layout: of the tensor's elements in that part.
    """

    tensor: str
    param: tuple[str, ...]
    index: tuple[int, ...] = ()
    layout: Layout = field(default_factory=Layout)


@dataclass(frozen=True)
class TensorPlan:
    """All of a checkpoint's tensors.

    Attributes:
        pieces: those that fill parameters; together they fill each, and use up each tensor.
        carried: names of tensors that no parameter takes and an export gives back as they were.
    """

    pieces: tuple[Piece, ...]
    carried: tuple[str, ...] = ()
