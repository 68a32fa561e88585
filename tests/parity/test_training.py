"""Compare every parameter's gradient, and a few updates of plain SGD."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_shard.autoep.directory import read_hf_source
from tests.parity.families import SHAPES, TRAINED, Shape, each_shape
from tests.parity.package import gradients, open_model, train

pytestmark = pytest.mark.parity

TRAINED_SHAPES = [shape for shape in SHAPES if shape.family in TRAINED]


@each_shape(TRAINED_SHAPES, also=(1, 2, 4, 8), quick=(4, 8))
def test_gradients(
    shape: Shape,
    experts: int,
    reference: Callable[[Shape], Any],
    tmp_path: Path,
    attention: str,
) -> None:
    """Compare to 1e-5 of each gradient's norm; if it is only rounding, of all gradients' norm."""
    # The texts are so short that attention needs no blocks; half of the meshes use them.
    attention = "blockwise" if experts in {2, 8} else attention
    known = reference(shape)
    directory = tmp_path / "gradients"
    shutil.copytree(known.directory, directory)
    opened = open_model(known.directory, experts, f"attention={attention}")
    loss, found = gradients(opened, known.inputs, known.targets, directory)
    np.testing.assert_allclose(loss, known.loss, rtol=1e-5)
    assert found.keys() == known.gradients.keys()
    carried = read_hf_source(known.directory).plan.carried
    # Text reaches no encoder of images or sound.
    assert not any(known.gradients[name].any() for name in carried)
    norms = {name: np.linalg.norm(gradient) for name, gradient in known.gradients.items()}
    least = 1e-3 * np.sqrt(sum(norm**2 for norm in norms.values()))
    wrong = {
        name: error
        for name, gradient in known.gradients.items()
        if name not in carried
        and not (error := np.linalg.norm(found[name] - gradient) / max(norms[name], least)) <= 1e-5
    }
    assert not wrong


@each_shape(TRAINED_SHAPES)
def test_updates(shape: Shape, reference: Callable[[Shape], Any]) -> None:
    """Run the training step itself, with 8-way expert parallelism."""
    known = reference(shape)
    losses = train(open_model(known.directory, 8), known.inputs, known.targets)
    assert known.losses[-1] < known.losses[0] - 0.1
    np.testing.assert_allclose(losses, known.losses, rtol=1e-5)
