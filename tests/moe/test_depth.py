"""Limit how many calls a reader must follow from the layer to its exchange."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import jax
import pytest

import moe_shard
from tests.moe.build import build_layer, mesh_of
from tests.moe.test_contract import DIMS, WHOLE

PACKAGE = Path(moe_shard.__file__).parent
MOST_CALLS, MOST_FILES = 5, 3


@pytest.mark.parametrize("settings", [{}, {"ragged_buffer_factor": 1.0}], ids=["exact", "drops"])
def test_the_exchange_is_near_the_layer(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Count the package's calls on the Python stack, from the layer's to the collective's."""
    stacks: list[list[str]] = []
    exchange = jax.lax.all_to_all

    def seen(*arguments: Any, **options: Any) -> Any:
        calls = [
            f"{Path(frame.filename).name}:{frame.name}"
            for frame in traceback.extract_stack()
            if Path(frame.filename).is_relative_to(PACKAGE)
        ]
        stacks.append(calls[calls.index("layer.py:__call__") :])
        return exchange(*arguments, **options)

    monkeypatch.setattr(jax.lax, "all_to_all", seen)
    layer = build_layer(
        mesh_of({"expert": 8}), WHOLE, dispatch="ragged", flag=True, **DIMS, **settings
    )
    jax.make_jaxpr(layer.apply)(layer.shapes, layer.tokens)
    # To the experts and back. Further rounds, which are deeper, run only beyond the bound.
    exchanges = [stack for stack in stacks if not any("further" in call for call in stack)]
    assert len(exchanges) == 2
    for stack in exchanges:
        print(" -> ".join(stack))
        assert len(stack) - 1 <= MOST_CALLS
        assert len({call.partition(":")[0] for call in stack}) <= MOST_FILES
