"""Check a sample of generated hostile inputs; `make fuzz` runs 20,000."""

from __future__ import annotations

import pytest

from tests.hostile.generated import make_case
from tests.hostile.judged import judge

SAMPLE = 300
PARTS = 6


@pytest.mark.parametrize("part", range(PARTS))
def test_every_answer_is_in_the_contract(part: int) -> None:
    verdicts = [judge(seed) for seed in range(part, SAMPLE, PARTS)]
    wrong = [(each.seed, each.wrong, each.errors) for each in verdicts if each.wrong]
    assert wrong == []
    assert {each.code for each in verdicts} >= {0, 2}


def test_a_case_follows_from_its_seed() -> None:
    assert [make_case(seed) for seed in range(50)] == [make_case(seed) for seed in range(50)]
