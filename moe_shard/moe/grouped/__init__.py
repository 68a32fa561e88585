"""Compute grouped products: each row of a matrix times the weights of its own group.

Dims, in this package's shapes:

    N  rows, those of a group one after another    A  elements of an input row
    G  groups (the experts of one device)          P  elements of an output row

A routine may need groups to start at multiples of a number of rows; `choose` returns it, and the
caller adds rows of zeros after each group that does not fill its last block.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moe_shard.config.model_config import GatingConfig
from moe_shard.config.moe_config import GroupedProductName
from moe_shard.errors import UserError
from moe_shard.moe.grouped import ragged_dot, tokamax_
from moe_shard.moe.grouped.blocked import Blocked
from moe_shard.moe.grouped.blocks import Routine, product
from moe_shard.moe.grouped.gated import GatedRoutine, GroupedMLP, fused_mlp
from moe_shard.moe.grouped.tiles import ESTIMATED, SMALLEST_TILE, Tiling, tiling
from moe_shard.moe.grouped.triton_kernel import Triton
from moe_shard.sharding.varying import vary_alike

_AUTO = {"cpu": "blocked", "tpu": "ragged_dot", "cuda": "pallas", "rocm": "pallas"}
_WASTE = "multiplies every row by every group's weights"
_REASONS = {
    ("ragged_dot", "tpu"): "TPU's own grouped kernel, and one of this package for dw",
    ("ragged_dot", "cpu"): f"by name; CPU's {_WASTE}",
    ("ragged_dot", "cuda"): f"by name; NVIDIA's {_WASTE}",
    ("ragged_dot", "rocm"): f"by name; AMD's {_WASTE}",
    ("pallas", "cuda"): f"a grouped kernel, where XLA's ragged_dot {_WASTE}",
    ("pallas", "rocm"): f"a grouped kernel, where XLA's ragged_dot {_WASTE}",
    ("pallas", "cpu"): "by name; CPU runs the kernel in an interpreter, very slowly",
    ("blocked", "cpu"): f"CPU's ragged_dot {_WASTE}",
    ("tokamax", "tpu"): "by name; tokamax's kernel",
    ("tokamax", "cuda"): "by name; tokamax's kernel",
}
_NOT_GATED = {
    "single": "each is one plain product",
    "ragged_dot": "lax.ragged_dot multiplies by one array of weights",
    "tokamax": "tokamax multiplies by one array of weights",
}
_SMALLEST_BLOCK = 8
_LARGEST_BLOCK = 128
_TPU_TILE = 512


_NOT_IN_KERNELS = ("gelu_exact",)
"""Activations that Triton cannot lower: it has no error function."""


@dataclass(frozen=True)
class GroupedProduct:
    """Describe a routine, as chosen for one shape on one platform.

    Attributes:
        name: "single", "ragged_dot", "tokamax", "pallas" or "blocked".
        alignment: groups start at multiples of this many rows.
        reason: why it was chosen, a clause for a printed record.
        multiple: the number of all rows should be a multiple of this. TPU's ragged_dot multiplies
            every row by every group's weights if its tiles do not divide the rows.
        tiling: tiles of the kernels "pallas".
        fuse: whether gate and up together are faster than two products, of those that can.
    """

    name: str
    alignment: int
    reason: str
    multiple: int = 1
    tiling: Tiling = ESTIMATED
    fuse: bool = True

    @property
    def why_not_gated(self) -> str:
        """Return why gate and up are two products; empty where a routine computes both at once."""
        return _NOT_GATED.get(self.name, "" if self.fuse else "two products were faster, measured")


def can_fuse(using: GroupedProduct, gating: GatingConfig) -> bool:
    """Return whether a routine computes gate, up and this activation at once."""
    if not gating.has_gate or (using.name == "pallas" and gating.activation in _NOT_IN_KERNELS):
        return False
    return not using.why_not_gated


def choose(
    requested: GroupedProductName,
    *,
    platform: str,
    groups: int,
    rows: int,
    dtype: DTypeLike,
    dims: tuple[int, int] | None = None,
    device: jax.Device | None = None,
) -> GroupedProduct:
    """Choose the routine for a grouped product, and how its groups are aligned.

    Args:
        requested: name of a routine; "auto": the best on the platform.
        platform: "cpu", "tpu", "cuda" or "rocm"; on "unknown", where nothing will run, every
            routine is accepted.
        groups: G, number of groups.
        rows: expected number of rows of all groups together; sizes the blocks.
        dtype: dtype of rows and weights.
        dims: elements of an input and of an output row of the first product, by which the reason
            names tiles; None: it names none.
        device: the device, there or compiled for, by which tiles are chosen; None where there is
            none: those for any of its platform.

    Raises:
        UserError: the requested routine does not run on the platform, or the user's own table of
            tiles is damaged.
    """
    name: str = _AUTO.get(platform, "ragged_dot") if requested == "auto" else requested
    if requested == "auto" and groups == 1:
        return GroupedProduct("single", 1, "one group is one plain product")
    if name == "tokamax" and platform in _AUTO:
        tokamax_.check(platform)
    if name == "pallas" and platform == "tpu":
        raise UserError(
            "grouped_product: pallas is a kernel for GPUs, this is tpu\nfix: auto or ragged_dot"
        )
    if name == "pallas" and jnp.dtype(dtype).itemsize > 4:
        raise UserError(f"grouped_product: pallas takes float32 and narrower, not {dtype}")
    other = "what runs anywhere" if requested == "auto" else "by name; auto takes another there"
    reason = _REASONS.get((name, platform), other)
    if name == "pallas":
        tiles = tiling(platform, jnp.dtype(dtype).itemsize, device)
        shape = (groups, rows, *(dims or (4096, 4096)))
        block = _block_on_gpu(tiles.entry("forward", shape).tile.rows, groups, rows)
        reason += f"; blocks of {block} rows, {groups * block / max(rows, 1):.0%} more at most"
        if dims is not None and platform != "cpu":
            reason += f"; {tiles.words(shape)}"
        fuse = tiles.entry("gated", shape).fuse
        return GroupedProduct(name, block, reason, tiling=tiles, fuse=fuse)
    alignment = _block_on_cpu(groups, rows) if name == "blocked" else 1
    multiple = _TPU_TILE if (name, platform) == ("ragged_dot", "tpu") else 1
    return GroupedProduct(name, alignment, reason, multiple)


def _block_on_cpu(groups: int, rows: int) -> int:
    """Return the largest block whose padding, half a block a group, is under 1/16 of the rows."""
    block = _LARGEST_BLOCK
    while block > _SMALLEST_BLOCK and groups * block * 8 > rows:
        block //= 2
    return block


def _block_on_gpu(block: int, groups: int, rows: int) -> int:
    """Return the tile's rows, but less than those of an average group.

    Tall blocks are faster in spite of their padding: with 256 rows a group, 128 rows took two
    thirds of the time of 32 (NVIDIA H100). Below that nothing was measured; blocks of an average
    group would double the rows of the buffer.
    """
    while block > SMALLEST_TILE and groups * block >= rows:
        block //= 2
    return block


def grouped_product(
    x: Float[Array, "N A"],
    w: Float[Array, "G A P"],
    group_sizes: Int[Array, "G"],
    *,
    using: GroupedProduct,
    platform: str,
) -> Float[Array, "N P"]:
    """Multiply each row by its group's weights, summed in float32, in the dtype of the rows.

    The gradients of `x` and `w` use the same routine. Inside `jax.shard_map` each device multiplies
    what it holds; with `check_vma=False` shard_map sums `w`'s gradient over axes on which `w` is
    equal, as for any product.

    Args:
        x: rows. Groups follow each other from row 0; rows that pad a group's last block are zero;
            rows past the last group have any finite values.
        w: weights of each group, in `x`'s dtype.
        group_sizes: rows of each group, padding included: multiples of `using.alignment`, as is N.
            Their sum is at most N; any may be 0.
        using: the routine, from `choose`.
        platform: the platform that it was chosen for.

    Returns:
        The products; rows past the last group are zero.
    """
    _check_dtypes(x, w)
    assert x.shape[0] % using.alignment == 0, (x.shape, using)
    x, w, group_sizes = vary_alike(x, w, group_sizes)
    match using.name:
        case "single":
            return ragged_dot.only_groups(x, group_sizes) @ w[0]
        case "ragged_dot" if platform == "tpu":
            routine: Routine = ragged_dot.OnTpu()
        case "ragged_dot":
            return ragged_dot.ragged_product(x, w, group_sizes)
        case "tokamax":
            return tokamax_.tokamax_product(x, w, group_sizes, platform=platform)
        case "blocked":
            routine = Blocked(using.alignment)
        case "pallas":
            routine = Triton(using.alignment, platform, using.tiling)
        case name:
            raise AssertionError(name)
    return product(x, w, group_sizes, routine)


def grouped_mlp(
    x: Float[Array, "N A"],
    weights: GroupedMLP,
    group_sizes: Int[Array, "G"],
    *,
    gating: GatingConfig,
    using: GroupedProduct,
    platform: str,
) -> Float[Array, "N A"]:
    """Apply each group's gated MLP to its rows, gate and up as one grouped product.

    Args:
        x: rows, as of `grouped_product`.
        weights: of each group, in `x`'s dtype.
        group_sizes: as of `grouped_product`.
        gating: activation, clamps and offset.
        using: the routine, from `choose`; one whose `why_not_gated` is empty.
        platform: the platform that it was chosen for.

    Returns:
        The outputs; rows past the last group are zero. Rows that pad a group are not where there
        are biases.
    """
    _check_dtypes(x, weights.gate)
    assert x.shape[0] % using.alignment == 0, (x.shape, using)
    leaves, tree = jax.tree.flatten((x, weights, group_sizes))
    x, weights, group_sizes = jax.tree.unflatten(tree, vary_alike(*leaves))
    routine: GatedRoutine
    match using.name:
        case "blocked":
            routine = Blocked(using.alignment)
        case "pallas":
            routine = Triton(using.alignment, platform, using.tiling)
        case name:
            raise AssertionError(name)
    return fused_mlp(x, weights, group_sizes, routine, gating)


def _check_dtypes(x: Float[Array, "N A"], w: Float[Array, "G A P"]) -> None:
    if x.dtype != w.dtype:
        raise UserError(
            f"grouped_product: token copies are {x.dtype} and the experts' weights {w.dtype}\n"
            f"fix: x.astype({w.dtype}) before the layer, or MoELayer(dtype={x.dtype})"
        )
