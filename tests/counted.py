"""Count the calls a piece of work makes: what a clock measures, less what else the machine does."""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")


def counted(work: Callable[[], Result]) -> tuple[Result, int]:
    """Do some work; return what it returns and how many calls of functions it took.

    Built-in functions count. A million take about 0.2 s.
    """
    profile = cProfile.Profile()
    result = profile.runcall(work)
    stats: Any = pstats.Stats(profile)
    return result, stats.total_calls
