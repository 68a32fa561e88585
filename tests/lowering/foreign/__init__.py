"""Hold programs that moe_shard had no part in: written as other people write them, without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.lowering.foreign import annotated, dense, explicit, linen_moe, nnx_moe

PROGRAMS: dict[str, Callable[..., Any]] = {
    "annotated": annotated.program,
    "dense": dense.program,
    "explicit": explicit.program,
    "linen": linen_moe.program,
    "nnx": nnx_moe.program,
}
