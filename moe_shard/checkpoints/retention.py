"""Decide which checkpoints stay when a new one is complete."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import orbax.checkpoint as ocp

_managers = ocp.checkpoint_managers


def retention(newest: int, every: int, named: Callable[[], Collection[int | None]]) -> Any:
    """Return Orbax's policy for which checkpoints stay; it is asked when one is saved.

    What it removes is removed only after the new one is complete.

    Args:
        newest: number of newest ones that stay; -1: all.
        every: of older ones, multiples of it stay; -1: none.
        named: returns the updates of those that stay in any case.
    """
    policies: list[Any] = [
        _managers.LatestN(None if newest == -1 else newest),
        _Named(named),
    ]
    if every != -1:
        policies.append(_managers.EveryNSteps(every))
    return _managers.AnyPreservationPolicy(policies)


class _Named:
    def __init__(self, named: Callable[[], Collection[int | None]]) -> None:
        self._named = named

    def should_preserve(self, checkpoints: Sequence[Any], **_: object) -> list[bool]:
        named = self._named()
        return [each.step in named for each in checkpoints]
