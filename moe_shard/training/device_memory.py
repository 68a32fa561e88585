"""Read how much memory a process uses: that of its devices, or of the host."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import jax


def memory_in_use() -> dict[str, Any]:
    """Return the memory in use now and its peak.

    Returns:
        `of` ("device", or "host" where the backend tells nothing of its devices, as on CPU),
        `in_use_bytes` and `peak_bytes`; of a device also `limit_bytes`. Of the devices of this
        process it is the one with the highest peak; of the host, the process's resident size.
        Empty where nothing is known.
    """
    found = [stats for device in jax.local_devices() if (stats := _stats(device))]
    if found:
        most = max(found, key=lambda stats: stats.get("peak_bytes_in_use", stats["bytes_in_use"]))
        known = {
            "in_use_bytes": most["bytes_in_use"],
            "peak_bytes": most.get("peak_bytes_in_use"),
            "limit_bytes": most.get("bytes_limit"),
        }
        return {"of": "device", **{name: x for name, x in known.items() if x is not None}}
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return {}
    # Linux counts the peak in units of 1,024 bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    in_use = pages * resource.getpagesize()
    return {"of": "host", "in_use_bytes": in_use, "peak_bytes": max(peak, in_use)}


def _stats(device: jax.Device) -> dict[str, int] | None:
    """Return what a backend says of a device's memory, if it does."""
    try:
        stats = device.memory_stats()
    except (NotImplementedError, jax.errors.JaxRuntimeError):
        return None
    return stats if stats and "bytes_in_use" in stats else None
