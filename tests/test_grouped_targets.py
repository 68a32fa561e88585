"""Compile the grouped products for absent accelerators, and check FLOPs and memory there.

This needs the compilers of `make targets`: run `make test-targets`. A missing one is a failure.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_shard.config.moe_config import GroupedProductName
from moe_shard.lowering.collectives import extract_collectives
from moe_shard.lowering.work import product_flops
from moe_shard.moe.grouped import choose, grouped_product
from moe_shard.runtime.targets.target import devices_for, parse_target

pytestmark = pytest.mark.targets

DEVICES = 8
ROWS, IN, HIDDEN, GROUPS = 16384, 1024, 2048, 16
ONE_PRODUCT = 2 * ROWS * IN * HIDDEN
# Bytes of the hidden rows. Two such arrays are needed besides arguments and results: the output
# of the up product, for the derivative of the activation, and the output of the activation.
HIDDEN_ROWS = ROWS * HIDDEN * 2
GPUS = ["h100:8", "mi355x:8"]
TPUS = ["v5e:2x4", "v6e:2x4"]


def two_products(
    target: str,
    requested: GroupedProductName = "auto",
    *,
    check_vma: bool = True,
    dims: tuple[int, int] = (IN, HIDDEN),
    rows: int = ROWS,
    dtype: str = "bfloat16",
) -> Any:
    """Compile an MLP of two grouped products and its gradients, 16 experts on each of 8 devices."""
    parsed = parse_target(target)
    devices = np.array(devices_for(parsed))
    assert devices.size == DEVICES
    mesh = Mesh(devices.reshape(-1), ("expert",), axis_types=(AxisType.Auto,))
    into, hidden = dims
    using = choose(
        requested,
        platform=parsed.platform,
        groups=GROUPS,
        rows=rows,
        dtype=dtype,
    )

    def on_device(x: jax.Array, up: jax.Array, down: jax.Array, sizes: jax.Array) -> jax.Array:
        h = grouped_product(x, up, sizes, using=using, platform=parsed.platform)
        h = jax.nn.silu(h)
        y = grouped_product(h, down, sizes, using=using, platform=parsed.platform)
        return jax.lax.psum(jnp.sum(y.astype(jnp.float32) ** 2), "expert")

    loss = jax.shard_map(
        on_device, mesh=mesh, in_specs=(P("expert"),) * 4, out_specs=P(), check_vma=check_vma
    )
    shapes = [
        ((DEVICES * rows, into), dtype),
        ((DEVICES * GROUPS, into, hidden), dtype),
        ((DEVICES * GROUPS, hidden, into), dtype),
        ((DEVICES * GROUPS,), "int32"),
    ]
    split = NamedSharding(mesh, P("expert"))
    arguments = [jax.ShapeDtypeStruct(*each, sharding=split) for each in shapes]
    return jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arguments).compile()


def most_flops(program: Any) -> int:
    """Return the FLOPs of the largest product that XLA itself computes, in any computation."""
    module = extract_collectives(program.as_text()).walk.module
    products = [
        product_flops(computation, computation.instruction(name))
        for computation in module.computations.values()
        for name, opcode in computation.opcodes.items()
        if opcode in ("dot", "convolution")
    ]
    return max(products, default=0)


def kernels(program: Any) -> list[str]:
    calls = re.findall(r"custom-call\(.*op_name=\"([^\"]*)\"", program.as_text())
    names = [re.search(r"grouped_(?:forward|dx|dw)|ragged-dot-none", each) for each in calls]
    return sorted(name[0] for name in names if name)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("target", GPUS)
def test_a_gpu_multiplies_in_six_kernels_and_no_more(target: str, check_vma: bool) -> None:
    program = two_products(target, check_vma=check_vma)
    assert kernels(program) == ["grouped_dw"] * 2 + ["grouped_dx"] * 2 + ["grouped_forward"] * 2
    # No product is XLA's own, in particular none with 16 times the FLOPs.
    assert most_flops(program) == 0
    assert program.memory_analysis().temp_size_in_bytes <= 1.2 * 2 * HIDDEN_ROWS


@pytest.mark.parametrize("target", GPUS)
def test_ragged_dot_by_name_is_what_the_kernels_avoid(target: str) -> None:
    program = two_products(target, "ragged_dot")
    assert most_flops(program) >= GROUPS * ONE_PRODUCT
    assert program.memory_analysis().temp_size_in_bytes > 8 * HIDDEN_ROWS


@pytest.mark.parametrize("target", TPUS)
def test_a_tpu_multiplies_each_row_once_in_the_gradient_too(target: str) -> None:
    program = two_products(target)
    # Without this package's kernel the two gradients of weights are convolutions of 16 times that.
    assert most_flops(program) == 0
    assert kernels(program) == ["grouped_dw"] * 2 + ["ragged-dot-none"] * 4
    told = re.findall(r'"cost_estimate":\{"flops":"(\d+)"', program.as_text())
    assert [int(each) for each in told] == [ONE_PRODUCT] * 6
    # On TPU the gradient of the output rows is live at that point too.
    needed = 2 * HIDDEN_ROWS + ROWS * IN * 2
    assert program.memory_analysis().temp_size_in_bytes <= 1.2 * needed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("target", [*GPUS, *TPUS])
def test_dims_that_fill_no_tile_compile(target: str, dtype: str) -> None:
    program = two_products(target, dims=(96, 200), rows=4096, dtype=dtype)
    assert len(kernels(program)) == 6


@pytest.mark.parametrize("target", ["a100:8", "b200:8", "mi300x:8"])
def test_other_gpus_have_the_shared_memory(target: str) -> None:
    for dtype in ("bfloat16", "float32"):
        assert len(kernels(two_products(target, dims=(512, 768), dtype=dtype))) == 6
