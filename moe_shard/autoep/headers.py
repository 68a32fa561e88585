"""Where each tensor of a safetensors file lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TensorEntry:
    """One tensor, not read.

    Attributes:
        file: that holds it.
        dtype: as safetensors calls it, such as "BF16".
        shape: of the tensor.
        begin: of its bytes, from the start of the file.
        end: after its last byte.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
