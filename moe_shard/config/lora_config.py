"""Configure LoRA: low-rank additions to some of the weights, which alone are trained."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Annotated

from moe_shard.config.keys import Key, check_leaves, shown
from moe_shard.errors import UserError

ADAPTER = "_lora"
"""End of the name of the module that holds the adapter of a weight."""

_MAXTEXTS = (
    ("attention/", ("self_attention/", "GptOssAttention/")),
    ("mlp/experts/", ("DeepSeekMoeBlock_0/MoeBlock_0/", "Llama4MoEBlock_0/MoeBlock_0/")),
    ("mlp/experts/", ("MoeBlock_0/", "moe_block/", "GptOssMlp/")),
    ("mlp/shared/", ("DeepSeekMoeBlock_0/shared_experts/", "Llama4MoEBlock_0/shared_experts/")),
    ("mlp/shared/", ("shared_experts/",)),
    ("mlp/", ("mlp/",)),
)
"""Module here -> the same in MaxText, whose patterns are of its paths."""
_WEIGHTS = {"gate": "wi_0", "up": "wi_1", "down": "wo"}
_WEIGHTS |= {"query_down": "wq_a", "query_up": "wq_b", "latent_down": "wkv_a", "latent_up": "wkv_b"}
"""Name of a weight here -> in MaxText, where it is another."""
_STACKS = {
    True: ("layers", "moe_layers", "moe_stack", "scanned_blocks/layers"),
    False: ("layers", "dense_layers", "scanned_blocks/layers"),
}
"""Whether a layer has experts -> names of its stack in MaxText's paths and patterns."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Describe LoRA (arXiv 2106.09685): y = x W + (alpha / r) (x A) B; A and B are trained.

    Attributes:
        enable_lora: whether weights have such additions.
        lora_rank: r, the size of the dim between A and B.
        lora_alpha: alpha.
        lora_module_path: regular expression that is found in the path of a weight that has one, by
            the names here (`attention/query`, `mlp/experts/down`) or those of MaxText's models
            (`decoder/layers/self_attention/query`); empty: all of attention, experts and MLPs.
        lora_restore_path: directory in peft's format with the first A and B; empty: A is drawn as
            peft draws it, and B is 0.

    Raises:
        UserError: on a value out of range, or a pattern that is none.
    """

    enable_lora: Annotated[bool, Key()] = False
    lora_rank: Annotated[int, Key(least=0, most=2**14)] = 0
    lora_alpha: Annotated[float, Key(least=0)] = 0.0
    lora_module_path: Annotated[str, Key()] = ""
    lora_restore_path: Annotated[str, Key()] = ""

    def __post_init__(self) -> None:
        check_leaves(self)
        if self.enable_lora and not (self.lora_rank and self.lora_alpha):
            raise UserError(
                f"enable_lora=true with lora_rank={self.lora_rank} and lora_alpha="
                f"{self.lora_alpha:g} would add nothing\nfix: lora_rank=16 lora_alpha=32"
            )
        for key in ("lora_rank", "lora_alpha", "lora_module_path", "lora_restore_path"):
            if getattr(self, key) and not self.enable_lora:
                raise UserError(
                    f"{key}={shown(getattr(self, key))} has no effect: enable_lora=false\n"
                    f"fix: enable_lora=true, or no {key}"
                )
        try:
            re.compile(self.lora_module_path)
        except (re.error, RecursionError, OverflowError) as error:
            raise UserError(
                f"lora_module_path={shown(self.lora_module_path)} is no regular expression: {error}"
                "\nfix: a part of a weight's path, such as attention/(query|value)"
            ) from error

    @property
    def scale(self) -> float:
        """Return alpha / r."""
        return self.lora_alpha / self.lora_rank

    def adapts(self, path: str, *, moe: bool = True) -> bool:
        """Return whether a weight has an addition.

        Args:
            path: its path in a layer, such as "attention/query".
            moe: whether the layer has experts.
        """
        if not self.enable_lora:
            return False
        names = (f"layers/{path}", *_in_maxtext(path, moe=moe))
        return any(re.search(self.lora_module_path, name) for name in names)


def _in_maxtext(path: str, *, moe: bool) -> Iterator[str]:
    """Yield the paths that a weight has in MaxText's models."""
    module, _, weight = path.rpartition("/")
    for ours, theirs in _MAXTEXTS:
        if ours == f"{module}/":
            for stack in _STACKS[moe]:
                for each in theirs:
                    yield f"decoder/{stack}/{each}{_WEIGHTS.get(weight, weight)}"
