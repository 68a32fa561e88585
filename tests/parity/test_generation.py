"""Compare greedy tokens of every shape, with and without a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.parity.families import PROMPT_LENGTH, PROMPTS, Shape, each_shape
from tests.parity.package import greedy, open_model

pytestmark = pytest.mark.parity


@each_shape(also=(1, 8), quick=(8,))
def test_greedy(shape: Shape, experts: int, reference: Callable[[Shape], Any]) -> None:
    known = reference(shape)
    opened = open_model(known.directory, experts)
    prompts = known.inputs[:PROMPTS, :PROMPT_LENGTH]
    for cached, expected in ((True, known.greedy), (False, known.greedy_without_cache)):
        np.testing.assert_array_equal(greedy(opened, prompts, cached=cached), expected)
