"""Make the references that the tests compare with, and choose how attention is computed."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

from moe_shard.layers.kernels import blockwise
from tests.parity import package
from tests.parity.families import Shape

if TYPE_CHECKING:
    from tests.parity.reference import Reference


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--attention", default="autoselected", help="of this package's side")


@pytest.fixture(autouse=True)
def attention(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Compute attention as --attention says, in blocks so small that short texts have several."""
    named = str(request.config.getoption("--attention"))
    monkeypatch.setattr(package, "OVERRIDES", (*package.OVERRIDES, f"attention={named}"))
    monkeypatch.setattr(blockwise, "CPU_BLOCK", 8)
    monkeypatch.setattr(blockwise, "_SMALLEST", 4)
    return named


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


@pytest.fixture(scope="session")
def transformers_models() -> ModuleType:
    """Return the module of transformers' models, which imports torch."""
    from tests.parity import transformers_models

    return transformers_models
