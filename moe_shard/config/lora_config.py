"""Configure LoRA: low-rank additions to some of the weights, which alone are trained."""

from __future__ import annotations

import dataclasses
import re
from typing import Annotated

from moe_shard.config.keys import Key, check_leaves, shown
from moe_shard.errors import UserError

ADAPTER = "_lora"
"""End of the name of the module that holds the adapter of a weight."""

_MAXTEXTS = (
    ("attention/", "self_attention/"),
    ("mlp/experts/gate", "MoeBlock_0/wi_0"),
    ("mlp/experts/up", "MoeBlock_0/wi_1"),
    ("mlp/experts/down", "MoeBlock_0/wo"),
    ("mlp/shared/gate", "shared_experts/wi_0"),
    ("mlp/shared/up", "shared_experts/wi_1"),
    ("mlp/shared/down", "shared_experts/wo"),
    ("mlp/gate", "mlp/wi_0"),
    ("mlp/up", "mlp/wi_1"),
    ("mlp/down", "mlp/wo"),
)
"""Beginning of a weight's path here -> the same in MaxText, where patterns are of its paths."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Describe LoRA (arXiv 2106.09685): y = x W + (alpha / r) (x A) B; A and B are trained.

    Attributes:
        enable_lora: whether weights have such additions.
        lora_rank: r, the size of the dim between A and B.
        lora_alpha: alpha.
        lora_module_path: regular expression that is found in the path of a weight that has one, by
            the names here (`attention/query`, `mlp/experts/down`) or MaxText's
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
        for key in ("lora_module_path", "lora_restore_path"):
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

    def adapts(self, path: str) -> bool:
        """Return whether a weight has an addition.

        Args:
            path: its path in a layer, such as "attention/query".
        """
        if not self.enable_lora:
            return False
        known = (new + path[len(old) :] for old, new in _MAXTEXTS if path.startswith(old))
        theirs = next(known, "")
        names = (f"layers/{path}", f"decoder/layers/{theirs}")
        return any(re.search(self.lora_module_path, name) for name in names)
