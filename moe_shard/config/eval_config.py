"""Configure evaluation on text that a run does not train on."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from moe_shard.config.keys import Key, check_leaves


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Describe when a run is evaluated, and what follows from it.

    Attributes:
        eval_interval: updates between two evaluations; -1: none.
        eval_steps: batches of each dataset that are evaluated; -1: all whole ones.
        eval_start_step: the first update after which there is one.
        target_eval_loss: loss at which the run ends; 0: none.
        eval_patience: evaluations in a row without a new best loss after which the run ends; -1:
            any number.

    Raises:
        UserError: a value out of range.
    """

    eval_interval: Annotated[int, Key(least=1, off=-1)] = -1
    eval_steps: Annotated[int, Key(least=1, off=-1)] = -1
    eval_start_step: Annotated[int, Key(least=0)] = 0
    target_eval_loss: Annotated[float, Key(least=0)] = 0.0
    eval_patience: Annotated[int, Key(least=1, off=-1)] = -1

    def __post_init__(self) -> None:
        check_leaves(self)

    def due(self, updates: int) -> bool:
        """Return whether to evaluate after a number of updates."""
        return (
            self.eval_interval > 0
            and updates % self.eval_interval == 0
            and updates >= self.eval_start_step
        )
