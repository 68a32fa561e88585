"""How the tests let XLA:CPU compile: quickly, where no test is about the machine code.

The partitioner, on trial in most tests, runs before any of these and is the same: a program's
collectives, their order and their bytes are those of XLA's defaults. LLVM's optimisation is a third
of the time to compile. The fusion emitters, which take each fusion through MLIR, are half of the
rest; without them XLA forms other fusions, so a test that reads those from the compiled text asks
for the default. One piece of machine code, not one a core, is a tenth, and half of the memory maps.
What a person runs, with XLA's defaults, is what `tests/test_train.py` runs.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any, Final

QUICK: Final[dict[str, Any]] = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_parallel_codegen_split_count": 1,
}
if version("jaxlib").startswith("0.10."):  # XLA:CPU of jax 0.12 has fusion emitters only
    QUICK["xla_cpu_use_fusion_emitters"] = False
"""Compiler options for one program."""

FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in QUICK.items())
"""The same as XLA_FLAGS, for all programs of a process."""
