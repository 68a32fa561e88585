"""Make the references that the tests compare with, each once a session."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from tests.parity.families import Shape

if TYPE_CHECKING:
    from tests.parity.reference import Reference


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Shape], Reference]:
    """Return the reference of a shape; torch is imported when the first one is requested."""
    made: dict[str, Reference] = {}

    def get(shape: Shape) -> Reference:
        from tests.parity.reference import make

        if shape.id not in made:
            made[shape.id] = make(shape, tmp_path_factory.mktemp(shape.id))
        return made[shape.id]

    return get
