"""Compile the grouped products for absent accelerators, and check FLOPs and memory there.

This needs the compilers of `make targets`: run `make test-targets`. A missing one is a failure.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_shard.config.model_config import GatingConfig
from moe_shard.config.moe_config import GroupedProductName
from moe_shard.layers.activation import ACTIVATIONS, gated
from moe_shard.lowering.collectives import extract_collectives
from moe_shard.lowering.work import flops_by_scope, memory_by_scope, product_flops
from moe_shard.moe.grouped import choose, grouped_mlp, grouped_product
from moe_shard.moe.grouped.gated import GroupedMLP
from moe_shard.runtime.targets.target import devices_for, parse_target

pytestmark = pytest.mark.targets

DEVICES = 8
ROWS, IN, HIDDEN, GROUPS = 16384, 1024, 2048, 16
ONE_PRODUCT = 2 * ROWS * IN * HIDDEN
# Bytes of the hidden rows. Two such arrays are needed besides arguments and results: the output
# of the up product, for the derivative of the activation, and the output of the activation.
HIDDEN_ROWS = ROWS * HIDDEN * 2
GATING = GatingConfig()
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
        dims=dims,
        device=devices[0],
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


def gated_mlp(
    target: str,
    *,
    gating: GatingConfig = GATING,
    dtype: str = "bfloat16",
    together: bool = True,
    policy: Any = jax.checkpoint_policies.everything_saveable,
) -> Any:
    """Compile the gradients of a gated MLP, 16 experts on each of 8 devices."""
    parsed = parse_target(target)
    devices = np.array(devices_for(parsed))
    mesh = Mesh(devices.reshape(-1), ("expert",), axis_types=(AxisType.Auto,))
    using = choose(
        "auto", platform=parsed.platform, groups=GROUPS, rows=ROWS, dtype=dtype, device=devices[0]
    )
    platform = parsed.platform

    def apply(x: Any, weights: Any, biases: Any, down: Any, sizes: Any) -> jax.Array:
        if together:
            each = GroupedMLP(weights[0], weights[1], down, biases)
            return grouped_mlp(x, each, sizes, gating=gating, using=using, platform=platform)
        gate, up = (grouped_product(x, w, sizes, using=using, platform=platform) for w in weights)
        h = gated(gate, up, gating)
        return grouped_product(h, down, sizes, using=using, platform=platform)

    def on_device(x: Any, weights: Any, biases: Any, down: Any, sizes: Any) -> jax.Array:
        y = jax.checkpoint(apply, policy=policy)(x, weights, biases, down, sizes)
        return jax.lax.psum(jnp.sum(y.astype(jnp.float32) ** 2), "expert")

    def loss(x: Any, weights: Any, biases: Any, down: Any, sizes: Any) -> Any:
        return jax.shard_map(on_device, mesh=mesh, in_specs=(P("expert"),) * 5, out_specs=P())(
            x, weights, biases, down, sizes
        )

    split = NamedSharding(mesh, P("expert"))

    def array(*shape: int, dtype: Any = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((DEVICES * shape[0], *shape[1:]), dtype, sharding=split)

    inward = array(GROUPS, IN, HIDDEN)
    biases = (array(GROUPS, HIDDEN),) * 2 if gating.mlp_bias else ()
    arguments = (array(ROWS, IN), (inward, inward), biases, array(GROUPS, HIDDEN, IN))
    step = jax.jit(jax.grad(loss, (0, 1, 2, 3)))
    return step.lower(*arguments, array(GROUPS, dtype=jnp.int32)).compile()


@pytest.mark.parametrize("target", GPUS)
def test_gate_and_up_are_one_kernel(target: str) -> None:
    one, two = gated_mlp(target), gated_mlp(target, together=False)
    names = Counter(re.findall(r"grouped_\w+(?=/pallas_call)", one.as_text()))
    assert {*names} == {
        *("grouped_gated", "grouped_gated_dx", "grouped_forward", "grouped_dx", "grouped_dw")
    }
    done, separate = (flops_by_scope(extract_collectives(p.as_text()).walk) for p in (one, two))
    # Nine products; blocks that no group covers are counted.
    assert sum(done.values()) == sum(separate.values()) == 9 * ONE_PRODUCT
    # Arrays of one kernel are not put where the program's results will be; of several they are.
    more = one.memory_analysis().temp_size_in_bytes - two.memory_analysis().temp_size_in_bytes
    assert more <= HIDDEN_ROWS + 1000
    moved, by_two = (memory_by_scope(extract_collectives(p.as_text()).walk) for p in (one, two))
    # Gate and up are not read again forward: two arrays of hidden rows, and the rows themselves
    # once less; backward the gradients of the rows are added up in the kernel.
    saved = sum(by_two.values()) - sum(moved.values())
    assert saved >= 2 * HIDDEN_ROWS + ROWS * IN * 2


POLICIES = jax.checkpoint_policies


@pytest.mark.parametrize(
    ("policy", "products"),
    [
        (POLICIES.nothing_saveable, 11),
        (POLICIES.save_only_these_names("moe_mlpwi_0", "moe_mlpwi_1"), 9),
    ],
)
def test_a_policy_that_keeps_gate_and_up_repeats_no_product(policy: Any, products: int) -> None:
    program = gated_mlp("h100:8", policy=policy)
    done = flops_by_scope(extract_collectives(program.as_text()).walk)
    assert sum(done.values()) == products * ONE_PRODUCT


@pytest.mark.parametrize("activation", sorted({*ACTIVATIONS} - {"gelu_exact"}))
@pytest.mark.parametrize("target", GPUS)
def test_every_activation_compiles_in_the_kernel(target: str, activation: str) -> None:
    gating = GatingConfig(
        mlp_activations=(activation, "linear"),
        mlp_activations_limit=7.0,
        mlp_linear_offset=1.0,
        mlp_bias=True,
    )
    assert "grouped_gated" in gated_mlp(target, gating=gating).as_text()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("target", ["a100:8", "b200:8", "h200:8", "mi300x:8"])
def test_other_gpus_have_the_shared_memory_for_both(target: str, dtype: str) -> None:
    assert "grouped_gated" in gated_mlp(target, dtype=dtype).as_text()
