"""Hide what the compilers of absent accelerators write at start from a person's terminal.

With `.[targets]` installed on a machine without accelerators, jax and its plugins write a page of
warnings and two tracebacks to standard error, most of it from C++ static initializers that no
setting controls. All of it reports that there is no accelerator. Everything else is printed when
the block ends. XLA ends the process at once when XLA_FLAGS holds what it cannot read, and the
reason would be lost; that is therefore found first. What jax refuses in the environment while it is
imported is reported as well.
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

from moe_shard.errors import UserError, first_line
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
_KNOWN_FLAG = re.compile(
    r"--xla_force_host_platform_device_count=[1-9]\d{0,5}|--xla_dump_to=.*"
    r"|--xla_dump_hlo_as_(long_)?text(=(true|false))?|--xla_dump_hlo_(module|pass)_re=.*"
)
_UNKNOWN_FLAGS = re.compile(r"Unknown flags? in XLA_FLAGS: (.*)")
_BAD_FLAGS = re.compile(r"^[EF]\d{4} \S+ +\d+ [\w.]+:\d+\] (.*)$", re.MULTILINE)
_COUNT = re.compile(r"--xla_force_host_platform_device_count=(\S*)")
_NO_PLUGIN = re.compile(r"Jax plugin configuration error|cuda_plugin_extension is not found")
# Device nodes of the kernel drivers: where one exists, a plugin that fails to start is a problem.
_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/accel0", "/dev/vfio/0")


@contextmanager
def hide_accelerator_warnings() -> Iterator[None]:
    """Hold back standard error while the block runs, also that of C++; then print the rest.

    Raises:
        UserError: XLA_FLAGS holds what XLA cannot read, or a variable of jax what jax cannot.
    """
    _check_flags(os.environ.get("XLA_FLAGS", ""))
    try:
        with _hidden():
            yield
    except (ValueError, TypeError) as error:
        if _is_from_settings_of_jax(error):
            raise UserError(
                f"{_variables_in(str(error))}: jax refuses it: {first_line(error)}\n"
                "fix: take it out of the environment, or another value"
            ) from error
        raise


@contextmanager
def _hidden() -> Iterator[None]:
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
    """Ask XLA whether it can read the flags, in a process of its own, which XLA may end.

    Raises:
        UserError: it cannot, or the number of simulated devices is none.
    """
    if (count := _COUNT.search(flags)) and not re.fullmatch(r"[1-9]\d{0,5}", count[1]):
        raise UserError(f"XLA_FLAGS: {count[0]}: not a number of devices\nfix: 8, for example")
    if all(_KNOWN_FLAG.fullmatch(flag) for flag in flags.split()):
        return
    asking = [sys.executable, "-c", "from jaxlib import xla_client; xla_client.CompileOptions()"]
    done = subprocess.run(asking, capture_output=True, text=True, errors="replace", check=False)
    if found := _UNKNOWN_FLAGS.search(done.stderr):
        raise UserError(
            f"XLA_FLAGS: XLA does not know {found[1].strip()}\n"
            "fix: take it out; other versions of jax may know it"
        )
    if done.returncode and (said := _BAD_FLAGS.search(done.stderr)):
        raise UserError(f"XLA_FLAGS: XLA says: {said[1][:300]}\nfix: another value, or take it out")


def _is_from_settings_of_jax(error: BaseException) -> bool:
    """Return whether jax raised an error while it read the environment."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    path = Path(trace.tb_frame.f_code.co_filename) if trace is not None else Path()
    return path.parts[-3:] == ("jax", "_src", "config.py")


def _variables_in(message: str) -> str:
    """Name the variables of jax that an error is about: by name, or else by value."""
    values = {name: value for name, value in os.environ.items() if name.startswith("JAX_")}
    named = [name for name in values if name in message or name.lower() in message]
    found = named or [name for name, value in values.items() if value and value in message]
    return " or ".join(f"{name}={values[name]}" for name in found) or "the environment"


class _News(logging.Filter):
    """Drop log records about the absence of an accelerator."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is passed on."""
        return not _NO_PLUGIN.match(record.getMessage())
