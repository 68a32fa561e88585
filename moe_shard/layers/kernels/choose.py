"""Choose the implementation of a layer's attention, and say why not another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

from moe_shard.config.attention_config import AttentionName
from moe_shard.errors import UserError
from moe_shard.layers.kernels import blockwise, cudnn, dot_product, splash, triton_attention
from moe_shard.layers.kernels.ring import ring_attend
from moe_shard.layers.kernels.rule import AttentionCase

Attend = Callable[..., Any]
"""The function `attend` of an implementation, see this package."""

SHORT = 128
"""Tokens up to which one array of all scores is no larger than what blocks need, nor slower."""


class _Implementation(NamedTuple):
    """Hold an implementation that `attention` can name.

    Attributes:
        unsupported: why it cannot compute a case, or None.
        attend: returns the function that computes a case.
        reason: why `autoselected` takes it, where it does.
        check_vma: whether it can be mapped with JAX's check that values declared equal on devices
            are equal, which kernels of others and Pallas's interpreter are not made for.
        by_name_only: why `autoselected` passes it over for a case that it can compute, or None.
    """

    unsupported: Callable[[AttentionCase], str | None]
    attend: Callable[[AttentionCase], Attend]
    reason: str
    check_vma: Callable[[AttentionCase], bool] = lambda _case: True
    by_name_only: Callable[[AttentionCase], str | None] = lambda _case: None


def _too_long(case: AttentionCase) -> str | None:
    if max(case.queries, case.keys) <= SHORT:
        return None
    return f"an array of {case.queries} x {case.keys} scores for each head"


def _largest_block(case: AttentionCase) -> int:
    return blockwise.CPU_BLOCK if case.platform == "cpu" else blockwise.OTHER_BLOCK


def _blockwise(case: AttentionCase) -> Attend:
    return partial(blockwise.attend, largest_block=_largest_block(case))


def _flash_unsupported(case: AttentionCase) -> str | None:
    kernels = splash if case.platform == "tpu" else triton_attention
    return kernels.unsupported(case)


def _flash(case: AttentionCase) -> Attend:
    if case.platform == "tpu":
        return splash.attend
    return partial(triton_attention.attend, platform=case.platform)


_IMPLEMENTATIONS: Mapping[str, _Implementation] = MappingProxyType(
    {
        "dot_product": _Implementation(
            dot_product.unsupported,
            lambda _case: dot_product.attend,
            f"at most {SHORT} tokens, whose scores are one block",
            by_name_only=_too_long,
        ),
        "flash": _Implementation(
            _flash_unsupported,
            _flash,
            "a kernel that keeps scores on the chip",
            check_vma=lambda case: case.platform in ("cuda", "rocm"),
        ),
        "cudnn_flash_jax": _Implementation(
            cudnn.unsupported,
            lambda _case: cudnn.attend,
            "cuDNN's kernel",
            by_name_only=lambda case: f"documents as a mask of {case.queries} x {case.keys}",
        ),
        "blockwise": _Implementation(
            blockwise.unsupported, _blockwise, "runs anywhere, without an array of all scores"
        ),
    }
)
_ORDER: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "cpu": ("dot_product", "blockwise"),
        "tpu": ("dot_product", "flash", "blockwise"),
        "cuda": ("dot_product", "cudnn_flash_jax", "flash", "blockwise"),
        "rocm": ("dot_product", "flash", "blockwise"),
        "unknown": ("dot_product", "blockwise"),
    }
)
"""Platform -> what `autoselected` tries, the fastest first."""


@dataclass(frozen=True)
class AttentionKernel:
    """Name the implementation chosen for a case.

    Attributes:
        name: a value of `attention`, without "autoselected".
        reason: why it was chosen, a clause for a printed record.
        refused: (name, why not) of those that `autoselected` would have preferred.
        attend: the function that computes it.
        check_vma: whether to map it with `jax.shard_map`'s check of that name.
    """

    name: str
    reason: str
    refused: tuple[tuple[str, str], ...]
    attend: Attend
    check_vma: bool = True


def choose_attention(requested: AttentionName, case: AttentionCase) -> AttentionKernel:
    """Choose the implementation of attention.

    Args:
        requested: the value of `attention`; "autoselected": the fastest on the platform.
        case: what is to be computed.

    Raises:
        UserError: the requested implementation cannot compute the case.
    """
    if requested != "autoselected":
        chosen = _IMPLEMENTATIONS[requested]
        if why := chosen.unsupported(case):
            raise UserError(
                f"attention={requested}: {why}\nfix: attention=autoselected, which takes another"
            )
        return AttentionKernel(
            requested, _by_name(requested, case), (), chosen.attend(case), chosen.check_vma(case)
        )
    refused: list[tuple[str, str]] = []
    for name in _ORDER.get(case.platform, _ORDER["unknown"]):
        each = _IMPLEMENTATIONS[name]
        why_not = each.by_name_only(case) or each.unsupported(case)
        if why_not is None:
            return AttentionKernel(
                name, each.reason, tuple(refused), each.attend(case), each.check_vma(case)
            )
        refused.append((name, why_not))
    raise AssertionError("blockwise computes every case")


def choose_for_ring(requested: AttentionName, case: AttentionCase) -> AttentionKernel:
    """Return the implementation that attends round a ring, which is blockwise.

    Args:
        requested: the value of `attention`.
        case: what is to be computed.

    Raises:
        UserError: another implementation is requested.
    """
    if requested not in {"autoselected", "blockwise"}:
        raise UserError(
            f"attention={requested} with context_parallel_strategy=ring: the ring merges results "
            "of blockwise\nfix: attention=autoselected, or context_parallel_strategy=all_gather"
        )
    ring = partial(ring_attend, largest_block=_largest_block(case))
    return AttentionKernel("blockwise", "its results can be merged, as the ring needs", (), ring)


def _by_name(name: str, case: AttentionCase) -> str:
    if name == "flash" and case.platform == "cpu":
        return "by name; CPU runs the GPU kernels in an interpreter, very slowly"
    return "by name"
