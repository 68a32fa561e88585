"""Hide what the compilers of absent accelerators write at start from a person's terminal.

With `.[targets]` installed on a machine without accelerators, jax and its plugins write a page of
warnings and two tracebacks to standard error, most of it from C++ static initializers that no
setting controls. All of it reports that there is no accelerator. Everything else is printed when
the block ends. XLA ends the process at once when XLA_FLAGS has a flag that it does not know, and
the reason would be lost; such flags are therefore found first.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_shard.errors import UserError
from moe_shard.stderr import drop_lines

_NOISE = re.compile(
    r"^WARNING: All log messages before absl::InitializeLog"
    r"|^WARNING: Logging before InitGoogle"
    r"|cudart_stub\.cc"
    r"|^Failed to find host bounds for accelerator type: WARNING: could not determine"
    r"|INVALID_ARGUMENT: Error: unexpected worker hostname 'WARNING: could not determine"
    r"|^=== Source Location Trace"
    # Written for every sort, and for rematerialization, which the report covers more clearly.
    r"|^W\d{4} .*\b(sort_rewriter|hlo_rematerialization)\.cc"
    r"|^To avoid this, compile with a GPU present, or add the deviceless CUB"
    r"|^learning/\S+libtpu_init_utils\.cc:\d+\s*$"
)
_KNOWN_FLAGS = ("--xla_force_host_platform_device_count=", "--xla_dump_to=", "--xla_dump_hlo_")
_UNKNOWN_FLAGS = re.compile(r"Unknown flags? in XLA_FLAGS: (.*)")
_NO_PLUGIN = re.compile(r"Jax plugin configuration error|cuda_plugin_extension is not found")
# Device nodes of the kernel drivers: where one exists, a plugin that fails to start is a problem.
_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/accel0", "/dev/vfio/0")


@contextmanager
def hide_accelerator_warnings() -> Iterator[None]:
    """Hold back standard error while the block runs, also that of C++; then print the rest.

    Raises:
        UserError: XLA_FLAGS holds a flag that XLA does not know.
    """
    _check_flags(os.environ.get("XLA_FLAGS", ""))
    if any(Path(driver).exists() for driver in _DRIVERS):
        yield
        return
    logger = logging.getLogger("jax._src.xla_bridge")
    news = _News()  # a new one each time: a block within this one removes only its own
    logger.addFilter(news)
    try:
        with drop_lines(_NOISE):
            yield
    finally:
        logger.removeFilter(news)


@functools.cache
def _check_flags(flags: str) -> None:
    """Ask XLA which flags it does not know, in a process of its own, which XLA may end."""
    if all(flag.startswith(_KNOWN_FLAGS) for flag in flags.split()):
        return
    asking = [sys.executable, "-c", "from jaxlib import xla_client; xla_client.CompileOptions()"]
    done = subprocess.run(asking, capture_output=True, text=True, check=False)
    if found := _UNKNOWN_FLAGS.search(done.stderr):
        raise UserError(
            f"XLA_FLAGS: XLA does not know {found[1].strip()}\n"
            "fix: take it out; other versions of jax may know it"
        )


class _News(logging.Filter):
    """Drop log records about the absence of an accelerator."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is passed on."""
        return not _NO_PLUGIN.match(record.getMessage())
