"""Configure multi-token prediction: layers after the last that predict tokens further ahead."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from moe_shard.config.keys import Key, check_leaves

_MOST_DEPTHS = 64  # far above any model


@dataclasses.dataclass(frozen=True, kw_only=True)
class MTPConfig:
    """Describe multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2).

    Attributes:
        mtp_num_layers: layers after the last; layer k of them predicts the token k + 1 ahead. Each
            is of the kind of the last decoder layer.
        mtp_loss_scaling_factor: factor of their mean cross entropy in the training loss.
        mtp_after_final_norm: whether the first of them takes the decoder's output after its final
            norm, as vLLM and SGLang run published checkpoints, rather than before, as MaxText does.

    Raises:
        UserError: on a value out of range.
    """

    mtp_num_layers: Annotated[int, Key(least=0, most=_MOST_DEPTHS)] = 0
    mtp_loss_scaling_factor: Annotated[float, Key(least=0)] = 0.1
    mtp_after_final_norm: Annotated[bool, Key()] = False

    def __post_init__(self) -> None:
        check_leaves(self)
