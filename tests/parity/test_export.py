"""Import and export a directory of transformers: same bytes, and transformers reads it."""

from __future__ import annotations

import filecmp
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moe_shard.autoep.directory import read_hf_source
from tests.parity import weights
from tests.parity.families import SHAPES, Shape, each_shape
from tests.parity.package import open_model, overwrite

pytestmark = pytest.mark.parity

NATIVE_NAMES = ("ernie4_5_vl_moe", "kimi_k25", "qwen3_omni_moe_thinker")
"""Families whose tensors transformers names otherwise inside than in any file that is published."""


@each_shape()
def test_there_and_back(shape: Shape, reference: Callable[[Shape], Any], tmp_path: Path) -> None:
    from rich.console import Console

    from moe_shard.checkpoints.imported import export_model, import_model
    from tests.parity.reference import forward, load

    known, quiet = reference(shape), Console(quiet=True)
    opened = open_model(known.directory, 8)
    imported, exported = tmp_path / "imported", tmp_path / "exported"
    import_model(known.directory, imported, opened.config, opened.model.specs, console=quiet)
    export_model(imported, exported, console=quiet)
    names = {path.name for path in known.directory.iterdir()}
    assert names == {path.name for path in exported.iterdir()}
    _, different, _ = filecmp.cmpfiles(known.directory, exported, names, shallow=False)
    assert not different
    answer = forward(shape, load(shape, exported), known.inputs, known.targets)
    np.testing.assert_array_equal(answer["logits"].detach().numpy(), known.logits)


@each_shape(shape for shape in SHAPES if shape.family not in NATIVE_NAMES)
def test_stacked_experts_are_the_same_model(
    shape: Shape, reference: Callable[[Shape], Any], tmp_path: Path
) -> None:
    """Import what `save_original_format=False` writes as equal parameters, and export it back."""
    known = reference(shape)
    one_by_one, stacked = (open_model(at, 4) for at in (known.directory, known.fused))
    jax.tree.map(np.testing.assert_array_equal, one_by_one.params, stacked.params)
    (path,) = known.fused.glob("*.safetensors")
    tensors = weights.read(known.fused)
    shutil.copytree(known.fused, tmp_path, dirs_exist_ok=True)
    weights.write(tmp_path / path.name, {name: np.zeros_like(a) for name, a in tensors.items()})
    overwrite(tmp_path, one_by_one.params)
    carried = read_hf_source(known.fused).plan.carried
    for name, values in weights.read(tmp_path).items():
        np.testing.assert_array_equal(values, 0 if name in carried else tensors[name])
