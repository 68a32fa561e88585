"""Measure how far transformers' gradients in float32 are from its own in float64.

    python -m tests.parity.float64 qwen3_next-interval qwen3_5_moe-interval

Its modules cast to float32 by name in many places. While one computes in float64 that name means
float64, in the family's own file.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity.families import SHAPES, Shape
from tests.parity.reference import forward, load, write


class _Wider:
    """Be torch, but for its names of float32."""

    def __getattr__(self, name: str) -> Any:
        return torch.float64 if name in ("float32", "float") else getattr(torch, name)


def error_of_gradients(shape: Shape, folder: Path) -> float:
    """Return the largest error of a gradient's norm in float32, as `test_gradients` weighs it."""
    write(shape, folder)
    tokens = shape.tokens()
    narrow, wide = (_model(shape, folder, double=double) for double in (False, True))
    forward(shape, narrow, tokens[:, :-1], tokens[:, 1:])["loss"].backward()
    module = importlib.import_module(f"transformers.models.{shape.family}.modeling_{shape.family}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "torch", _Wider())
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        forward(shape, wide, tokens[:, :-1], tokens[:, 1:])["loss"].backward()
    known = {name: each.grad for name, each in wide.named_parameters() if each.grad is not None}
    assert all(each.dtype == torch.float64 for each in known.values())
    found = dict(narrow.named_parameters())
    least = 1e-3 * torch.stack([each.norm() for each in known.values()]).norm()
    return max(
        float((found[name].grad.double() - each).norm() / torch.maximum(each.norm(), least))
        for name, each in known.items()
    )


def _model(shape: Shape, folder: Path, *, double: bool) -> Any:
    model = load(shape, folder)
    model.set_experts_implementation("eager")  # the grouped one is of narrower dtypes alone
    return model.double() if double else model


if __name__ == "__main__":
    for name in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as here:
            error = error_of_gradients(next(s for s in SHAPES if s.id == name), Path(here))
        print(f"{name}: {error:.1e}")
