"""Check that the optimizer's state survives a change of wrappers: clipping on or off, mu_dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moe_shard.checkpoints.optimizer_state import arranged_as, arranged_back
from moe_shard.errors import UserError
from moe_shard.program.spikes import WithHistory
from moe_shard.program.step import make_program
from tests.checkpoints.test_checkpoint import EP2, EP8, KEYS, made_up, restore, save
from tests.models.build import annotator, small_config

CLIPPING = "gradient_clipping_threshold"
SPIKES = "skip_step_on_spikes=true"


def structure(tree: Any) -> Any:
    return jax.tree.structure(tree)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adafactor", "muon"])
@pytest.mark.parametrize(("first", "then"), [("1.0", "0"), ("0", "1.0")])
def test_clipping_switched_on_or_off_keeps_every_moment(
    tmp_path: Path, optimizer: str, first: str, then: str
) -> None:
    keys = (*KEYS, f"optimizer={optimizer}", "base_emb_dim=128", "head_dim=16")
    before = small_config(EP8, *keys, f"{CLIPPING}={first}")
    after = small_config(EP2, *keys, f"{CLIPPING}={then}")
    saved = made_up(before, make_program(before, annotator(before)))
    save(tmp_path, before, saved, 3)
    program = make_program(after, annotator(after))
    state = restore(tmp_path, after, program)
    assert structure(state) == structure(program.abstract_state)
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    assert places == jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state)
    # The order of leaves does not depend on the tuples around them.
    moments = zip(jax.tree.leaves(state), jax.tree.leaves(saved), strict=True)
    for one, other in moments:
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("first", "then"), [("", "bfloat16"), ("bfloat16", "")])
def test_moments_are_read_in_another_dtype(tmp_path: Path, first: str, then: str) -> None:
    before = small_config(EP8, *KEYS, f"mu_dtype={first}", f"{CLIPPING}=0")
    after = small_config(EP8, *KEYS, f"mu_dtype={then}")
    saved = made_up(before, make_program(before, annotator(before)))
    save(tmp_path, before, saved, 3)
    program = make_program(after, annotator(after))
    state = restore(tmp_path, after, program)
    wanted = [leaf.dtype for leaf in jax.tree.leaves(program.abstract_state)]
    assert [leaf.dtype for leaf in jax.tree.leaves(state)] == wanted
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(saved), strict=True):
        np.testing.assert_array_equal(one, np.asarray(other).astype(one.dtype))


def test_arrays_of_one_name_keep_their_order() -> None:
    leaf = np.zeros
    found: Any = [None, [{"count": leaf(1), "mu": {"w": leaf(3)}}, {"count": leaf(2)}]]
    wanted: Any = ({"count": leaf(1), "mu": {"w": leaf(3)}}, (), {"count": leaf(2)})
    there = arranged_as(found, wanted)
    assert structure(there) == structure(found)
    assert there[1][0]["count"] is wanted[0]["count"]
    assert there[1][1]["count"] is wanted[2]["count"]
    back = arranged_back(there, wanted)
    assert structure(back) == structure(wanted)
    assert all(map(lambda a, b: a is b, jax.tree.leaves(back), jax.tree.leaves(wanted)))


def test_other_arrays_are_refused_by_name() -> None:
    leaf = np.zeros
    with pytest.raises(UserError, match=r"nu\.w is not there, \(3,\) in this run"):
        arranged_as([None, {"mu": {"w": leaf(3)}}], {"mu": {"w": leaf(3)}, "nu": {"w": leaf(3)}})
    with pytest.raises(UserError, match=r"mu\.w \(3,\) there, \(4,\) in this run"):
        arranged_as([None, {"mu": {"w": leaf(3)}}], {"mu": {"w": leaf(4)}})


@pytest.mark.parametrize("clipping", ["0", "1.0"])
@pytest.mark.parametrize(
    ("first", "then", "said"),
    [
        ((), (SPIKES,), "a statistic of 128 steps for spikes begins: none was saved"),
        ((SPIKES,), (), "the saved statistic for spikes is dropped (skip_step_on_spikes=false)"),
        ((SPIKES,), (SPIKES, "skip_step_interval=20"), "begins: the saved one is of 128"),
        ((SPIKES,), (SPIKES,), ""),
    ],
    ids=["on", "off", "another length", "same"],
)
def test_the_statistic_of_spikes_begins_or_is_dropped(
    tmp_path: Path, first: tuple[str, ...], then: tuple[str, ...], said: str, clipping: str
) -> None:
    before = small_config(EP8, *KEYS, *first)
    after = small_config(EP2, *KEYS, *then, f"{CLIPPING}={clipping}")
    saved = made_up(before, make_program(before, annotator(before)))
    save(tmp_path, before, saved, 3)
    program = make_program(after, annotator(after))
    lines: list[str] = []
    state = restore(tmp_path, after, program, say=lines.append)
    wrapped = clipping == "0"
    assert [each for each in lines if "clipping" in each] == lines[:wrapped]
    assert len(lines[wrapped:]) == bool(said)
    assert said in "".join(lines)
    assert structure(state) == structure(program.abstract_state)
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    assert places == jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state)
    kept: list[Any] = []
    for each in (state, saved):
        optimizer: Any = each.opt_state
        inner = optimizer.inner if isinstance(optimizer, WithHistory) else optimizer
        kept.append(jax.tree.leaves((each.params, inner)))
    for one, other in zip(*kept, strict=True):
        np.testing.assert_array_equal(one, other)
    if then:
        history: Any = state.opt_state.history
        assert int(history.seen) == (0 if said else 7)
        assert bool((history.losses == 0).all()) == bool(said)
