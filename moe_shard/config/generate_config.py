"""Configure generation: which tokens may come next, and how one of them is chosen."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal, get_args

from moe_shard.config.keys import Key, check_leaves
from moe_shard.errors import UserError

SamplingStrategy = Literal["greedy", "weighted", "nucleus", "topk", "composite"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Describe how the next token of a text is chosen.

    Attributes:
        decode_sampling_strategy: a `SamplingStrategy`. `greedy` picks the most probable token; the
            others sample: `weighted` from all tokens, `nucleus` from the most probable ones whose
            probabilities add up to `decode_sampling_nucleus_p` (arXiv 1904.09751), `topk` from the
            `decode_sampling_top_k` most probable ones, `composite` from those that both admit.
        decode_sampling_temperature: logits are divided by it before anything else.
        decode_sampling_nucleus_p: cumulative probability of the tokens to sample from; -1: not set.
        decode_sampling_top_k: number of tokens to sample from; 0: not set.
        max_new_tokens: tokens to generate after the prompt, at most; an end-of-document token ends
            a text earlier.
        seed: seed of the sampling.

    Raises:
        UserError: a value out of range, or a strategy whose size is not set.
    """

    decode_sampling_strategy: Annotated[
        SamplingStrategy, Key(choices=get_args(SamplingStrategy))
    ] = "greedy"
    decode_sampling_temperature: Annotated[float, Key(above=0)] = 1.0
    decode_sampling_nucleus_p: Annotated[float, Key(above=0, most=1, off=-1)] = -1.0
    decode_sampling_top_k: Annotated[int, Key(least=0)] = 0
    max_new_tokens: Annotated[int, Key(least=1, most=2**20)] = 64
    seed: Annotated[int, Key(least=0, below=2**32)] = 0

    def __post_init__(self) -> None:
        check_leaves(self)
        if (
            self.decode_sampling_strategy in ("nucleus", "composite")
            and self.decode_sampling_nucleus_p == -1
        ):
            raise UserError(
                f"decode_sampling_strategy={self.decode_sampling_strategy} does not say "
                "how much of the probability to draw from\n"
                "fix: decode_sampling_nucleus_p=0.9, for example"
            )
        if (
            self.decode_sampling_strategy in ("topk", "composite")
            and self.decode_sampling_top_k == 0
        ):
            raise UserError(
                f"decode_sampling_strategy={self.decode_sampling_strategy} does not say "
                "how many tokens to draw from\nfix: decode_sampling_top_k=40, for example"
            )
