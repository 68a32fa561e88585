"""Choose the implementation of a layer's attention, and say why not another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

from moe_shard.config.attention_config import AttentionName
from moe_shard.errors import UserError
from moe_shard.layers.kernels import blockwise, dot_product
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
    """

    unsupported: Callable[[AttentionCase], str | None]
    attend: Callable[[AttentionCase], Attend]
    reason: str


def _blockwise(case: AttentionCase) -> Attend:
    size = blockwise.CPU_BLOCK if case.platform == "cpu" else blockwise.OTHER_BLOCK
    return partial(blockwise.attend, largest_block=size)


_IMPLEMENTATIONS: Mapping[str, _Implementation] = MappingProxyType(
    {
        "dot_product": _Implementation(
            dot_product.unsupported,
            lambda _case: dot_product.attend,
            f"at most {SHORT} tokens, whose scores are one block",
        ),
        "blockwise": _Implementation(
            blockwise.unsupported, _blockwise, "runs anywhere, without an array of all scores"
        ),
    }
)
_ORDER: Mapping[str, tuple[str, ...]] = MappingProxyType(
    dict.fromkeys(("cpu", "tpu", "cuda", "rocm", "unknown"), ("dot_product", "blockwise"))
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
    """

    name: str
    reason: str
    refused: tuple[tuple[str, str], ...]
    attend: Attend


def choose_attention(requested: AttentionName, case: AttentionCase) -> AttentionKernel:
    """Choose the implementation of attention.

    Args:
        requested: the value of `attention`; "autoselected": the fastest on the platform.
        case: what is to be computed.

    Raises:
        UserError: the requested implementation cannot compute the case.
    """
    if requested != "autoselected":
        chosen = _IMPLEMENTATIONS.get(requested)
        if chosen is None:
            raise UserError(
                f"attention={requested}: there is no such kernel for {case.platform}\n"
                "fix: attention=autoselected, which takes another"
            )
        if why := chosen.unsupported(case):
            raise UserError(
                f"attention={requested}: {why}\nfix: attention=autoselected, which takes another"
            )
        return AttentionKernel(requested, "by name", (), chosen.attend(case))
    refused: list[tuple[str, str]] = []
    for name in _ORDER.get(case.platform, _ORDER["unknown"]):
        each = _IMPLEMENTATIONS[name]
        why_not = _too_long(name, case) or each.unsupported(case)
        if why_not is None:
            return AttentionKernel(name, each.reason, tuple(refused), each.attend(case))
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
    size = blockwise.CPU_BLOCK if case.platform == "cpu" else blockwise.OTHER_BLOCK
    ring = partial(ring_attend, largest_block=size)
    return AttentionKernel("blockwise", "its results can be merged, as the ring needs", (), ring)


def _too_long(name: str, case: AttentionCase) -> str | None:
    if name != "dot_product" or max(case.queries, case.keys) <= SHORT:
        return None
    return f"an array of {case.queries} x {case.keys} scores for each head"
