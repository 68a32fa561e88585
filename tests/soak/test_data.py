"""Train on a mixture of three small datasets, killed at a random step and left alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.soak.data import SMALL, WAITS, Row, Soak, make_datasets
from tests.soak.datasets import MARK, documents, find_parts, overlaps


@pytest.mark.survival
def test_a_killed_run_has_the_batches_of_one_left_alone(tmp_path: Path) -> None:
    datasets = make_datasets(tmp_path, megabytes=2, files=3)
    (title, arguments) = list(datasets.items())[-1]
    soak = Soak(tmp_path, steps=40, seed=0, demo=SMALL)
    assert not soak.run_default()
    row = Row(title, "mixture")
    soak.run_dataset(row, arguments, (1, 2), kills=1)
    # So short a run may end before a second record of where its time went: what steps waited for is
    # unknown then, which the command, whose runs are longer, takes for wrong.
    assert {*row.wrong} <= {WAITS}
    assert row.compared == {1: 40 * 32, 2: 40 * 32}


def test_tokens_of_another_document_are_seen() -> None:
    first, second = (np.frombuffer(each, np.uint8) for each in documents("a", 7, 2))
    good = np.concatenate([first[-300:], [MARK], second[:200]]).astype(np.int32)
    found = find_parts(good)
    assert [(part.number, part.end - part.start) for part in found] == [(7, 300), (8, 200)]
    assert found[0].end == len(first)
    assert overlaps(found) == 0
    assert overlaps([*found, *find_parts(good[-100:])]) == 1
    for at in (10, 320):
        bad = good.copy()
        bad[at] ^= 1
        with pytest.raises(ValueError, match="is not what document"):
            find_parts(bad)
    with pytest.raises(ValueError, match="document a8"):  # not from its start
        find_parts(np.delete(good, 301))
