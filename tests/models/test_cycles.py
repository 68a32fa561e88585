"""Layers of several kinds split into the cycles that were counted by hand."""

from __future__ import annotations

import pytest

from moe_shard.config.model_config import LayerKind
from moe_shard.models.cycles import cycles_of

DENSE = LayerKind(moe=False, span="global", rope=True)
MOE = LayerKind(moe=True, span="global", rope=True)
WINDOW = LayerKind(moe=True, span="sliding", rope=True)
BARE = LayerKind(moe=True, span="global", rope=False)


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        pytest.param([MOE], [(0, 1, 1)], id="one"),
        pytest.param([MOE] * 32, [(0, 1, 32)], id="alike"),
        pytest.param([DENSE] + [MOE] * 26, [(0, 1, 1), (1, 1, 26)], id="one dense first"),
        pytest.param([DENSE] * 3 + [MOE] * 58, [(0, 1, 3), (3, 1, 58)], id="three dense first"),
        pytest.param([WINDOW, MOE] * 12, [(0, 2, 12)], id="alternating"),
        pytest.param([WINDOW, WINDOW, WINDOW, BARE] * 12, [(0, 4, 12)], id="four"),
        pytest.param([WINDOW, MOE] * 2 + [WINDOW], [(0, 2, 2), (4, 1, 1)], id="odd one at the end"),
        pytest.param(
            [MOE] * 3 + [DENSE] + [MOE] * 20, [(0, 1, 3), (3, 1, 1), (4, 1, 20)], id="one between"
        ),
        pytest.param([DENSE, MOE] * 2 + [DENSE] * 3, [(0, 2, 2), (4, 1, 3)], id="dense at the end"),
    ],
)
def test_cycles(kinds: list[LayerKind], expected: list[tuple[int, int, int]]) -> None:
    cycles = cycles_of(kinds)
    assert [(cycle.first, len(cycle.kinds), cycle.turns) for cycle in cycles] == expected
    # Every layer occurs once, at a place of its kind.
    numbers = {
        number: kind
        for cycle in cycles
        for place, kind in enumerate(cycle.kinds)
        for number in cycle.numbers(place)
    }
    assert [numbers[number] for number in range(len(kinds))] == kinds
