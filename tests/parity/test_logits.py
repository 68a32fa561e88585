"""Compare logits, router logits and losses of every shape on every size of the expert axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.parity.compare import assert_forward
from tests.parity.families import Shape, each_shape
from tests.parity.package import evaluate, open_model

pytestmark = pytest.mark.parity


@each_shape(also=(1, 2, 4, 8), quick=(2, 8), newer=(8,))
def test_forward(shape: Shape, experts: int, reference: Callable[[Shape], Any]) -> None:
    known = reference(shape)
    opened = open_model(known.directory, experts)
    assert_forward(evaluate(opened, known.inputs, known.targets), known, opened.config)
