"""How text is written: which tokens may come next, and how one of them is taken."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal, get_args

from moe_shard.config.keys import Key, check_leaves
from moe_shard.errors import UserError

SamplingStrategy = Literal["greedy", "weighted", "nucleus", "topk", "composite"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """The next token of a text.

    Attributes:
        strategy: a `SamplingStrategy`. `greedy` takes the most probable token; the others draw:
            `weighted` from all, `nucleus` from the most probable that make up `nucleus_p` (arXiv
            1904.09751), `topk` from the `top_k` most probable, `composite` from both.
        temperature: logits are divided by it before anything else.
        nucleus_p: share of the probability; -1: not said.
        top_k: tokens; 0: not said.
        max_new_tokens: after the prompt; the end of the document ends a text earlier.
        seed: of what is drawn.

    Raises:
        UserError: a value out of range, or a strategy whose size is not said.
    """

    strategy: Annotated[
        SamplingStrategy, Key("decode_sampling_strategy", choices=get_args(SamplingStrategy))
    ]
    temperature: Annotated[float, Key("decode_sampling_temperature", above=0)]
    nucleus_p: Annotated[float, Key("decode_sampling_nucleus_p", above=0, most=1, off=-1)]
    top_k: Annotated[int, Key("decode_sampling_top_k", least=0)]
    max_new_tokens: Annotated[int, Key("max_new_tokens", least=1, most=2**20)]
    seed: Annotated[int, Key("seed", least=0, below=2**32)]

    def __post_init__(self) -> None:
        check_leaves(self)
        if self.strategy in ("nucleus", "composite") and self.nucleus_p == -1:
            raise UserError(
                f"decode_sampling_strategy={self.strategy} does not say how much of the "
                "probability to draw from\nfix: decode_sampling_nucleus_p=0.9, for example"
            )
        if self.strategy in ("topk", "composite") and self.top_k == 0:
            raise UserError(
                f"decode_sampling_strategy={self.strategy} does not say how many tokens to draw "
                "from\nfix: decode_sampling_top_k=40, for example"
            )
