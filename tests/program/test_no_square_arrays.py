"""No array of the training step has the length of the sequence twice, in any kind of attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.extend
import pytest
from jax.sharding import AbstractMesh, AxisType

from moe_shard.config import load_config
from moe_shard.program.step import make_program
from moe_shard.sharding.annotate import Sharding

TOKENS = 4224  # no other dim of these models
MODELS = {
    "grouped": ("mixtral-8x7b", {"data": 1}, ()),
    "sinks-and-windows": ("gpt-oss-20b", {"data": 1}, ()),
    "chunks": ("llama4-17b-16e", {"data": 1}, ()),
    "latents": ("deepseek2-16b", {"data": 1}, ()),
    "gathered": ("mixtral-8x7b", {"context": 2}, ()),
    "ring": ("mixtral-8x7b", {"context": 2}, ("context_parallel_strategy=ring",)),
}


def shapes(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    """Yield the shapes of all arrays of a program, those of its loops and branches included."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield getattr(variable.aval, "shape", ())
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from shapes(inner)


def squares(case: str, *more: str) -> set[tuple[int, ...]]:
    """Return the shapes that have the length of the sequence, or of a device's part, twice."""
    model, sizes, overrides = MODELS[case]
    (axis, size), *_ = sizes.items()
    fixed = (
        "ici_expert_parallelism=1",
        f"ici_{axis}_parallelism={size}",
        "moe_dispatch=gather",
        "per_device_batch_size=1",
        f"base_num_decoder_layers={4 if case == 'chunks' else 2}",  # a turn of the cycle of layers
        f"max_target_length={TOKENS}",
    )
    config = load_config(model, [*fixed, *overrides, *more])
    mesh = AbstractMesh((size,), (axis,), axis_types=(AxisType.Auto,))
    program = make_program(config, Sharding(mesh))
    traced = jax.make_jaxpr(program.step)(program.abstract_state, program.abstract_batch)
    lengths = {TOKENS, TOKENS // size if axis == "context" else TOKENS}
    return {
        shape for shape in shapes(traced.jaxpr) if sum(shape.count(each) for each in lengths) > 1
    }


@pytest.mark.parametrize("case", MODELS)
def test_no_array_of_all_scores_or_masks(case: str) -> None:
    assert squares(case) == set()


def test_such_an_array_would_be_found() -> None:
    assert {shape[-2:] for shape in squares("gathered", "attention=dot_product")} >= {
        (TOKENS // 2, TOKENS)
    }
