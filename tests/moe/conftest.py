"""Parametrize tests by dispatch strategy: those that the module names, or all registered ones.

A test that takes `variant`, `strategy`, `strategy_and_flag`, `slotted` (has capacity slots) or
`flagged` (the flag changes its program) is parametrized here. A module that
imports such tests and sets `UNDER_TEST`, a list of entries, runs them for its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pytest

from moe_shard.config.strategies import find_strategy, strategy_names

EMULATED = "ragged by ragged-all-to-all"
"""The transport of TPU and GPU, emulated on CPU."""

T = TypeVar("T", bound=Callable[..., Any])


def variants(*more: str, without: str = "") -> Callable[[T], T]:
    """Mark a test that takes `variant`.

    Args:
        more: further variants; the first word of each is its strategy.
        without: a strategy to leave out.
    """

    def mark(test: T) -> T:
        test.more, test.without = more, without  # type: ignore[attr-defined]
        return test

    return mark


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize by the strategies under test."""
    registered = [find_strategy(name) for name in strategy_names()]
    entries = getattr(metafunc.module, "UNDER_TEST", registered)
    names = [entry.name for entry in entries]
    if "variant" in metafunc.fixturenames:
        more = (EMULATED, *getattr(metafunc.function, "more", ()))
        found = [*names, *(each for each in more if each.split()[0] in names)]
        without = getattr(metafunc.function, "without", "")
        metafunc.parametrize("variant", [each for each in found if each != without])
    if "strategy_and_flag" in metafunc.fixturenames:
        pairs = [
            (entry.name, flag)
            for entry in entries
            for flag in ((True,) if entry.always_moves_tokens else (True, False))
        ]
        ids = [f"{name}-{'on' if flag else 'off'}" for name, flag in pairs]
        metafunc.parametrize("strategy_and_flag", pairs, ids=ids)
    if "slotted" in metafunc.fixturenames:
        metafunc.parametrize("slotted", [entry.name for entry in entries if entry.has_slots])
    if "flagged" in metafunc.fixturenames:
        flagged = [entry.name for entry in entries if not entry.always_moves_tokens]
        metafunc.parametrize("flagged", flagged)
    if "strategy" in metafunc.fixturenames:
        metafunc.parametrize("strategy", names)
