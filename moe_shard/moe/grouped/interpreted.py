"""Run Pallas's interpreter inside `jax.shard_map(check_vma=True)`, which refuses it otherwise.

The interpreter evaluates a kernel on arrays that vary over mesh axes and on indices of its own that
do not, and the check refuses to mix them. Exported first, the kernel is a program without a mesh;
its results are then declared to vary. It is for checking numbers where the accelerator is absent,
so the time of an export does not matter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
from jax import export
from jaxtyping import Array

from moe_shard.sharding.varying import vary_over, varying_axes

Results = TypeVar("Results")
"""An array, or a tuple of them."""


def interpreted(kernel: Callable[..., Results]) -> Callable[..., Results]:
    """Return a kernel that may be called inside any shard_map.

    Args:
        kernel: a function of arrays, with `interpret=True` and results declared to vary over no
            mesh axis.
    """

    def call(*operands: Array) -> Results:
        axes = varying_axes(*operands)
        if not axes:
            return kernel(*operands)
        shapes = [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in operands]
        exported = export.export(jax.jit(kernel), platforms=["cpu"])(*shapes)
        results: Results = jax.tree.map(
            lambda each: vary_over(each, axes), exported.call(*operands)
        )
        return results

    return call
