"""Keeps what the compilers of absent accelerators say at start from a person's terminal.

With `.[targets]` installed on a machine without accelerators, jax and its plugins write a page of
warnings and two tracebacks to standard error, most of it from C++ static initializers that no
setting reaches. All of it says that there is no accelerator. Whatever else is written is passed on.
What XLA says before it ends the process would not be: flags that it does not know are found before.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_shard.errors import UserError

_NOISE = re.compile(
    r"^WARNING: All log messages before absl::InitializeLog"
    r"|^WARNING: Logging before InitGoogle"
    r"|cudart_stub\.cc"
    r"|^Failed to find host bounds for accelerator type: WARNING: could not determine"
    r"|INVALID_ARGUMENT: Error: unexpected worker hostname 'WARNING: could not determine"
    r"|^=== Source Location Trace"
    # Said of every sort, and of what the report's line on memory says better.
    r"|^W\d{4} .*\b(sort_rewriter|hlo_rematerialization)\.cc"
    r"|^To avoid this, compile with a GPU present, or add the deviceless CUB"
    r"|^learning/\S+libtpu_init_utils\.cc:\d+\s*$"
)
_KNOWN_FLAGS = ("--xla_force_host_platform_device_count=", "--xla_dump_to=", "--xla_dump_hlo_")
_UNKNOWN_FLAGS = re.compile(r"Unknown flags? in XLA_FLAGS: (.*)")
_NO_PLUGIN = re.compile(r"Jax plugin configuration error|cuda_plugin_extension is not found")
# The kernel drivers' own nodes: where one exists, a plugin that does not start is news.
_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/accel0", "/dev/vfio/0")


@contextmanager
def absent_accelerators_unsaid() -> Iterator[None]:
    """Within the block, standard error is held back, also that of C++; then the rest is printed.

    Raises:
        UserError: XLA_FLAGS holds a flag that XLA does not know.
    """
    _check_flags(os.environ.get("XLA_FLAGS", ""))
    if any(Path(driver).exists() for driver in _DRIVERS):
        yield
        return
    logger = logging.getLogger("jax._src.xla_bridge")
    sys.stderr.flush()
    saved = os.dup(2)
    news = _News()  # one of its own: a block within this one removes only its
    logger.addFilter(news)
    try:
        with tempfile.TemporaryFile() as held:
            os.dup2(held.fileno(), 2)
            try:
                yield
            finally:
                sys.stderr.flush()
                os.dup2(saved, 2)
                held.seek(0)
                for line in held.read().decode(errors="replace").splitlines():
                    if not _NOISE.search(line):
                        print(line, file=sys.stderr)
    finally:
        logger.removeFilter(news)
        os.close(saved)


@functools.cache
def _check_flags(flags: str) -> None:
    """Ask XLA for what it does not know, in a process that it may end."""
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
    """Lets through what is not about the absence of an accelerator."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is passed on."""
        return not _NO_PLUGIN.match(record.getMessage())
