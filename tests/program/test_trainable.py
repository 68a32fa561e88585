"""Train some parameters: they move as if all were trained, the others stay and cost nothing."""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np
import pytest

from moe_shard.errors import UserError
from moe_shard.models.params import describe
from moe_shard.program.step import make_program
from moe_shard.program.trainable import Trainable
from tests.models.build import QUICK, annotator, random_batch, small_config

SIZES = {"fsdp": 2, "expert": 4}
MASK = "trainable_parameters_mask=[attention/(query|out), experts]"


def run(*overrides: str) -> tuple[Any, Any, Any, Any]:
    """Return the program, its executable, a first state, and the one after a step."""
    config = small_config(
        SIZES, "base_num_decoder_layers=2", "gradient_clipping_threshold=0",
        "routed_bias=true", "routed_bias_update_rate=0.01", *overrides,
    )  # fmt: skip
    program = make_program(config, annotator(config))
    compiled = program.step.lower(program.abstract_state, program.abstract_batch).compile(QUICK)
    state = program.init(jax.random.key(1))
    before = jax.device_get(state)
    batch = jax.device_put(random_batch(), program.batch_sharding)
    after, metrics = compiled(state, batch)
    return program, compiled, before, (jax.device_get(after), jax.device_get(metrics))


def by_name(tree: Any, specs: Any) -> dict[str, Any]:
    names = [spec.name for spec in jax.tree.leaves(specs)]
    return dict(zip(names, jax.tree.leaves(tree), strict=True))


def test_what_is_trained_moves_as_it_would_and_the_rest_stays() -> None:
    program, whole, _, (expected, _) = run()
    some, part, before, (after, metrics) = run(MASK)
    moved, all_moved, first = (
        by_name(each.params, program.model.specs) for each in (after, expected, before)
    )
    trained = {name for name in first if re.search(r"attention\.(query|out)|experts", name)}
    assert len(trained) == 5
    for name, value in first.items():
        if name in trained:
            np.testing.assert_allclose(moved[name], all_moved[name], rtol=2e-6, atol=1e-8)
            assert (moved[name] != value).any()
        else:
            np.testing.assert_array_equal(moved[name], value)
    moments = [leaf for leaf in jax.tree.leaves(after.opt_state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * sum(first[name].size for name in trained)
    assert part.cost_analysis()["flops"] < whole.cost_analysis()["flops"]
    kinds = dict(zip(("experts", "head"), metrics["grad_norm_by_kind"][[-3, -1]], strict=True))
    assert kinds["experts"] > 0 == kinds["head"]
    [note] = [note for note in some.notes if note.startswith("trained: ")]
    assert f"5 parameters of {len(first)}" in note
    found = jax.device_get(
        some.norms(before.params, jax.device_put(random_batch(), some.batch_sharding))
    )
    assert set(found.gradients) == trained
    assert set(found.parameters) == set(first)


def test_patterns_that_find_nothing_are_refused() -> None:
    specs = describe(small_config(SIZES).model, annotator(small_config(SIZES))).specs
    with pytest.raises(UserError, match="self_attention is in the name of no parameter") as caught:
        Trainable(("query", "self_attention"), specs)
    assert "fix: one of " in str(caught.value)
    with pytest.raises(UserError, match="is no regular expression"):
        Trainable(("(",), specs)
    assert Trainable((), specs).of(specs) is specs
    assert not Trainable((), specs).note()
