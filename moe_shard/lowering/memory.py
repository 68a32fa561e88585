"""Read the memory of a compiled program from the executable."""

from __future__ import annotations

from typing import Any


def memory_from_compiled(compiled: Any) -> dict[str, int] | None:
    """Return the bytes per device of a `jax.stages.Compiled`; None where the backend has none.

    `total_bytes` is what the step holds at most: arguments, outputs and temporaries, less the
    outputs that reuse a donated argument. `peak_bytes`, where the backend reports it, is what is
    live at once, arguments included. On TPU, whose temporaries count space that is used twice, the
    peak is what the compiler itself compares with the memory of the device.
    """
    stats = compiled.memory_analysis()
    if stats is None:
        return None
    memory = {
        f"{part}_bytes": int(getattr(stats, f"{part}_size_in_bytes"))
        for part in ("argument", "output", "temp", "alias")
    }
    used = memory["argument_bytes"] + memory["output_bytes"] + memory["temp_bytes"]
    memory["total_bytes"] = used - memory["alias_bytes"]
    if peak := int(getattr(stats, "peak_memory_in_bytes", 0)):
        memory["peak_bytes"] = peak
    return memory
