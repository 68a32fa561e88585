"""Train some parameters: they move as if all were trained, the others stay and cost nothing."""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np
import pytest

from moe_shard.errors import UserError
from moe_shard.lowering.reports import report_from_text
from moe_shard.lowering.work import flops_by_scope
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
        "remat_policy=none",
        "routed_bias=true", "routed_bias_update_rate=0.01", *overrides,
    )  # fmt: skip
    program = make_program(config, annotator(config))
    compiled = program.step.lower(program.abstract_state, program.abstract_batch).compile(QUICK)
    state = program.init(jax.random.key(1))
    before = jax.device_get(state)
    batch = jax.device_put(random_batch(), program.batch_sharding)
    after, metrics = compiled(state, batch)
    return program, compiled, before, (jax.device_get(after), jax.device_get(metrics))


def products(compiled: Any) -> int:
    """Count the operations of a program's products on one device."""
    extraction = report_from_text(compiled.as_text()).extraction
    assert extraction is not None
    return flops_by_scope(extraction.walk, extraction.roles.flow).total()


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
    # Nothing is computed twice, and every capacity slot has a token: the program does what counts.
    tokens = random_batch()["inputs"].size / 8
    for each, compiled in ((program, whole), (some, part)):
        assert products(compiled) == tokens * each.flops_per_token
    kinds = dict(zip(("experts", "head"), metrics["grad_norm_by_kind"][[-3, -1]], strict=True))
    assert kinds["experts"] > 0 == kinds["head"]
    [note] = [note for note in some.notes if note.startswith("trained: ")]
    assert f"5 parameters of {len(first)}" in note
    found = jax.device_get(
        some.norms(before.params, jax.device_put(random_batch(), some.batch_sharding))
    )
    assert set(found.gradients) == trained
    assert set(found.parameters) == set(first)


@pytest.mark.recorded
@pytest.mark.parametrize(
    "overrides",
    [
        ("enable_lora=true", "lora_rank=4", "lora_alpha=8"),
        ("enable_lora=true", "lora_rank=4", "lora_alpha=8", "num_experts=1",
         "num_experts_per_tok=1", "routed_bias=false", "routed_bias_update_rate=0"),
        ("trainable_parameters_mask=[embedding/kernel]",),
        ("trainable_parameters_mask=[layers_1/]", "first_num_dense_layers=1"),
    ],
    ids=["adapters", "adapters-dense", "head", "upper-layer"],
)  # fmt: skip
def test_the_program_does_the_operations_that_are_counted(overrides: tuple[str, ...]) -> None:
    program, compiled, *_ = run(*overrides)
    assert products(compiled) == random_batch()["inputs"].size / 8 * program.flops_per_token


def test_patterns_that_find_nothing_are_refused() -> None:
    specs = describe(small_config(SIZES).model, annotator(small_config(SIZES))).specs
    with pytest.raises(UserError, match="self_attention is in the name of no parameter") as caught:
        Trainable(("query", "self_attention"), specs)
    assert "fix: one of " in str(caught.value)
    with pytest.raises(UserError, match="is no regular expression"):
        Trainable(("(",), specs)
    assert Trainable((), specs).of(specs) is specs
    assert not Trainable((), specs).note()
