"""Multiply by `tokamax.ragged_dot`, if installed: kernels for TPU and newer NVIDIA GPUs."""

from __future__ import annotations

import importlib
import importlib.util

from jaxtyping import Array, Float, Int

from moe_shard.errors import UserError
from moe_shard.moe.grouped.ragged_dot import only_groups

# tokamax's names of its own kernels; its "xla" is lax.ragged_dot, which is "ragged_dot" here.
_KERNELS = {"tpu": "mosaic_tpu", "cuda": "mosaic_gpu"}


def check(platform: str) -> None:
    """Check that tokamax can run.

    Raises:
        UserError: it has no kernel of its own for the platform, or it is not installed.
    """
    if platform not in _KERNELS:
        raise UserError(
            f"grouped_product: tokamax has no kernel for {platform}, only XLA's ragged_dot\n"
            "fix: auto, or ragged_dot for the same by its own name"
        )
    if importlib.util.find_spec("tokamax") is None:
        raise UserError("grouped_product: tokamax is not installed\nfix: pip install tokamax")


def tokamax_product(
    x: Float[Array, "N A"], w: Float[Array, "G A P"], group_sizes: Int[Array, "G"], *, platform: str
) -> Float[Array, "N P"]:
    """Multiply each row by its group's weights, of any sizes; rows past the groups give 0.

    Raises:
        UserError: tokamax has no kernel for the accelerator of this process, such as one before
            Hopper, or the accelerator is only compiled for: tokamax needs the device.
    """
    tokamax = importlib.import_module("tokamax")  # optional, and takes seconds
    try:
        y = tokamax.ragged_dot(x, w, group_sizes, implementation=_KERNELS[platform])
    except NotImplementedError as error:
        why = str(error).splitlines()[0][:100] if str(error) else "not implemented"
        raise UserError(
            f"grouped_product: tokamax has no kernel for this device ({why})\nfix: auto"
        ) from error
    return only_groups(y.astype(x.dtype), group_sizes)
