"""Find the module before optimization next to an optimized one, by XLA's file names."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_shard.lowering.sources import before_optimization, file_before


# As dumped by jax 0.10.2 for the CPU, for H100 and for TPU v5e; the last from jax's own cache.
@pytest.mark.parametrize(
    ("after", "before"),
    [
        ("module_0003.jit_f.cpu_after_optimizations.txt", "module_0003.jit_f."),
        ("module_0001.jit_f.sm_9.0a_gpu_after_optimizations.txt", "module_0001.jit_f."),
        ("module_0000.jit_f.cl_93.after_optimizations.txt", "module_0000.jit_f.cl_93."),
        ("module_0002.jit_f.after_optimizations.txt", None),
    ],
)
def test_it_is_found(tmp_path: Path, after: str, before: str | None) -> None:
    for module in ("module_0000.jit_f.", "module_0001.jit_f.", "module_0003.jit_f."):
        (tmp_path / f"{module}before_optimizations.txt").write_text(module)
    (tmp_path / "module_0000.jit_f.cl_93.before_optimizations.txt").write_text(
        "module_0000.jit_f.cl_93."
    )
    assert before_optimization(tmp_path / after) == before
    found = file_before(tmp_path / after)
    assert (found is None) == (before is None)


def test_of_other_files_there_is_none(tmp_path: Path) -> None:
    assert before_optimization(None) is None
    assert before_optimization(tmp_path / "step.txt") is None
    assert before_optimization(tmp_path / "after_optimizations.txt") is None
