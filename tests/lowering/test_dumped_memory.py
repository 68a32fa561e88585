"""Compare the memory in XLA's dump files with that of the executable."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from moe_shard.cli.report import main
from moe_shard.lowering.differences import compare, load
from moe_shard.lowering.memory import memory_from_compiled
from moe_shard.lowering.sources import dumped_memory
from tests.lowering.fixtures_hand_counted import FOLDER

# As XLA writes them for a TPU: color 1 is on the chip, color 2 holds semaphores.
USAGE = """\
Memory Space: default (color=0)
Total bytes: 377344 (368.5KiB)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list
  ------------------------------------------------------------
   256.0KiB(100%);   256.0KiB;            0;                1; f32[256,256]

Memory Space: vmem (color=1)
Total bytes: 999999 (976.6KiB)
"""
ASSIGNMENT = """\
BufferAssignment:
allocation 0: size 32768, parameter 0, shape |f32[64,128]| at ShapeIndex {}:
 value: <12 param.2 @0> (size=32768,offset=0): f32[64,128]{1,0:T(8,128)}
allocation 1: size 262144, parameter 1, shape |f32[256,256]| at ShapeIndex {}:
allocation 2: size 65536, output shape is |f32[256,64]|, maybe-live-out:
allocation 3: size 376832, color 1, preallocated-temp:
allocation 4: size 16896, preallocated-temp:
allocation 5: size 8, color 2, preallocated-temp:
"""


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """Dump a program that reuses an argument; return the module and its memory."""
    folder = tmp_path_factory.mktemp("dump")

    def step(a: jax.Array, b: jax.Array, c: jax.Array) -> tuple[jax.Array, jax.Array]:
        return a + b @ c, (b @ c).sum()

    shape = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    lowered = jax.jit(step, donate_argnums=0).lower(shape, shape, shape)
    compiled = lowered.compile(compiler_options={"xla_dump_to": str(folder)})
    memory = memory_from_compiled(compiled)
    assert memory is not None
    (module,) = folder.glob("*after_optimizations.txt")
    return module, memory


def test_the_parts_are_those_that_the_compiler_states(dump: tuple[Path, dict[str, int]]) -> None:
    module, memory = dump
    found = dumped_memory(module)
    assert found is not None
    assert memory["alias_bytes"] == 64 * 64 * 4
    for part in ("argument_bytes", "output_bytes", "temp_bytes", "alias_bytes"):
        assert found[part] == memory[part]
    # The allocations add up; those of constants and of single threads come on top.
    assert 0 <= found["total_bytes"] - memory["total_bytes"] < 200


def test_without_the_assignment_only_the_total_is_told(
    dump: tuple[Path, dict[str, int]], tmp_path: Path
) -> None:
    module, _ = dump
    shutil.copy(module, tmp_path / "m.txt")
    assert dumped_memory(tmp_path / "m.txt") is None
    report = module.with_name(f"{module.stem}-memory-usage-report.txt")
    shutil.copy(report, tmp_path / "m-memory-usage-report.txt")
    found, whole = dumped_memory(tmp_path / "m.txt"), dumped_memory(module)
    assert found is not None
    assert whole is not None
    assert found == {"total_bytes": whole["total_bytes"]}


def test_only_the_main_memory_counts(tmp_path: Path) -> None:
    (tmp_path / "m-memory-usage-report.txt").write_text(USAGE)
    (tmp_path / "m-buffer-assignment.txt").write_text(ASSIGNMENT)
    assert dumped_memory(tmp_path / "m.txt") == {
        "argument_bytes": 32768 + 262144,
        "output_bytes": 65536,
        "temp_bytes": 16896,
        "alias_bytes": 0,
        "total_bytes": 377344,
    }


def test_a_report_that_is_not_finished_tells_nothing(tmp_path: Path) -> None:
    (tmp_path / "m-memory-usage-report.txt").write_text(USAGE[:40])
    assert dumped_memory(tmp_path / "m.txt") is None
    assert dumped_memory(None) is None


def test_commands_show_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = tmp_path / "module_0001.jit_step.cpu_after_optimizations.txt"
    shutil.copy(FOLDER / "cpu_moe.txt", module)
    module.with_name(f"{module.stem}-memory-usage-report.txt").write_text(USAGE)
    module.with_name(f"{module.stem}-buffer-assignment.txt").write_text(ASSIGNMENT)
    mesh = ("--mesh", "data=1,fsdp=1,expert=8")
    assert main([str(tmp_path), *mesh]) == 0
    assert "memory per device: argument 295 kB, output 65.5 kB" in capsys.readouterr().out
    assert main([str(tmp_path), "--json", *mesh]) == 0
    memory = json.loads(capsys.readouterr().out)["memory"]
    assert memory["total_bytes"] == 377344
    side = load(str(module), {"expert": 8})
    assert side.memory == memory
    other = load(str(FOLDER / "cpu_moe.txt"), {"expert": 8})
    assert compare(side, other).same  # a text alone knows nothing of memory
