"""Set XLA:CPU's options to compile quickly in tests that are not about the machine code.

The partitioner, which most tests check, runs before any of these and is the same: a program's
collectives, their order and their bytes are those of XLA's defaults. LLVM's optimisation is a third
of the compile time. The fusion emitters, which compile each fusion through MLIR, are half of the
rest; without them XLA forms other fusions, so a test that reads fusions from compiled text asks
for the default. One module of machine code, not one a core, saves a tenth and half the memory maps.
`tests/test_train.py` runs with XLA's defaults, as users do.
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
