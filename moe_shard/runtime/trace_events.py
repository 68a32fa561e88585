"""Read the kernels that ran from a profile of jax, on CPU, GPU or TPU.

A profile is a file of planes (devices, the host), of lines (streams, threads), of events. GPUs have
a plane each whose lines are streams, and name the instruction of a kernel beside it. TPUs have a
plane each with a line of instructions and one of programs. On CPU all devices are in the host's
plane, each event with the number of its device.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from moe_shard.errors import UserError, first_line
from moe_shard.files import find_below
from moe_shard.lowering.kernel_sums import KernelEvent

SUFFIX = ".xplane.pb"
_DEVICE = re.compile(r"/device:(?:GPU|TPU|\w+):\d+")
# A TPU's event is called by the whole text of its instruction.
_INSTRUCTION = re.compile(r"%?([\w.\-]+)(?: = .*)?", re.S)
_FINGERPRINT = re.compile(r"\(\d+\)$")


def newest_profile(folder: Path) -> list[Path]:
    """Return the files of the newest profile below a folder, one of each host.

    Raises:
        UserError: there is none.
    """
    found = sorted(find_below(folder, f"*{SUFFIX}"), key=lambda file: file.stat().st_mtime)
    if not found:
        raise UserError(
            f"{folder} holds no profile (*{SUFFIX})\n"
            "fix: train with profile=true, and more steps than skip_first_n_steps_for_profiler"
        )
    return [file for file in found if file.parent == found[-1].parent]


def read_events(folder: Path) -> list[KernelEvent]:
    """Read the kernels of the newest profile below a folder.

    Raises:
        UserError: there is no profile, or it cannot be read.
    """
    files = newest_profile(folder)
    events: list[KernelEvent] = []
    for file in files:
        try:
            profile = jax.profiler.ProfileData.from_file(str(file))
            host = f"{file.name.removesuffix(SUFFIX)} " if len(files) > 1 else ""
            for plane in profile.planes:
                events += plane_events(plane, host)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"cannot read {file}: {first_line(error)}") from error
    return events


def plane_events(plane: Any, host: str = "") -> Iterator[KernelEvent]:
    """Yield the kernels of one plane of a `ProfileData`; none for a plane that has none.

    Args:
        plane: has a `name` and `lines`, of `name` and `events`, of `name`, `start_ns`,
            `duration_ns` and `stats`, pairs of a name and a value.
        host: a prefix of the devices' names.
    """
    if not _DEVICE.search(plane.name):
        if plane.name.startswith("/host:"):
            yield from _of_host(plane, host)
        return
    lines = {line.name: line for line in plane.lines}
    device = host + plane.name.rpartition("/device:")[2]
    if "XLA Ops" in lines and not any(name.startswith("Stream") for name in lines):
        yield from _of_tpu(lines, device)
        return
    for name, line in lines.items():
        if name.startswith("Stream"):
            for event in line.events:
                stats = dict(event.stats)
                yield KernelEvent(
                    device,
                    name,
                    event.name,
                    event.start_ns,
                    event.duration_ns,
                    str(stats.get("hlo_op", "")),
                    str(stats.get("hlo_module", "")),
                )


def _of_tpu(lines: dict[str, Any], device: str) -> Iterator[KernelEvent]:
    programs = sorted(
        (event.start_ns, event.start_ns + event.duration_ns, _FINGERPRINT.sub("", event.name))
        for event in (lines["XLA Modules"].events if "XLA Modules" in lines else ())
    )
    for event in lines["XLA Ops"].events:
        at = bisect.bisect_right(programs, event.start_ns, key=lambda each: each[0]) - 1
        inside = at >= 0 and event.start_ns < programs[at][1]
        named = _INSTRUCTION.fullmatch(event.name)
        yield KernelEvent(
            device,
            "XLA Ops",
            event.name,
            event.start_ns,
            event.duration_ns,
            named[1] if named else event.name,
            programs[at][2] if inside else "",
        )


def _of_host(plane: Any, host: str) -> Iterator[KernelEvent]:
    for line in plane.lines:
        for event in line.events:
            if event.name.startswith(("$", "Threadpool", "end: ")):
                continue  # most events, and none of them a kernel
            stats = dict(event.stats)
            if "hlo_op" in stats:
                yield KernelEvent(
                    f"{host}CPU:{stats.get('device_ordinal', 0)}",
                    line.name,
                    event.name,
                    event.start_ns,
                    event.duration_ns,
                    str(stats["hlo_op"]),
                    str(stats.get("hlo_module", "")),
                )
