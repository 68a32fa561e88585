"""Save and restore checkpoints bit for bit, on any mesh, with errors that a person can act on."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moe_shard.checkpoints.checkpoint import Checkpointer
from moe_shard.config import Config
from moe_shard.data.corpus import Say
from moe_shard.errors import UserError
from moe_shard.program.step import Program, TrainState, make_program
from tests.models.build import QUICK, annotator, random_batch, random_params, small_config

EP8 = {"expert": 8}
EP2 = {"expert": 2, "fsdp": 4}
KEYS = ("base_num_decoder_layers=2", "learning_rate=0.01", "async_checkpointing=false")


@functools.cache
def built(sizes: tuple[tuple[str, int], ...]) -> tuple[Config, Program, jax.stages.Compiled]:
    config = small_config(dict(sizes), *KEYS)
    program = make_program(config, annotator(config))
    lowered = program.step.lower(program.abstract_state, program.abstract_batch)
    return config, program, lowered.compile(QUICK)


def build(sizes: dict[str, int]) -> tuple[Config, Program, jax.stages.Compiled]:
    return built(tuple(sizes.items()))


def made_up(config: Config, program: Program, seed: int = 0) -> TrainState:
    """Make a state in which every array differs, the moments included."""
    rng = np.random.default_rng(seed)

    def values(leaf: Any) -> np.ndarray:
        if np.issubdtype(leaf.dtype, np.integer):
            return np.full(leaf.shape, 7, leaf.dtype)
        return rng.uniform(0.001, 0.01, leaf.shape).astype(leaf.dtype)

    state = jax.tree.map(values, program.abstract_state)
    places = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state)
    return jax.device_put(state._replace(params=random_params(config, seed)), places)


def save(folder: Path, config: Config, state: TrainState, *updates: int) -> None:
    checkpointer = Checkpointer(folder, config)
    for number in updates:
        checkpointer.save(state, updates=number)
    checkpointer.close()


def restore(
    folder: Path, config: Config, program: Program, say: Say = lambda _: None
) -> TrainState:
    checkpointer = Checkpointer(folder, config)
    try:
        newest = checkpointer.latest()
        assert newest is not None
        checkpointer.check_fits(newest)
        return checkpointer.restore(newest, program.abstract_state, say=say)
    finally:
        checkpointer.close()


def assert_bitwise(one: TrainState, other: TrainState) -> None:
    structures: list[Any] = [jax.tree.structure(each) for each in (one, other)]
    assert structures[0] == structures[1]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one), jax.device_get(other))


def losses(
    program: Program, step: jax.stages.Compiled, state: TrainState, count: int = 3
) -> list[float]:
    found = []
    for seed in range(count):
        batch = jax.device_put(random_batch(seed=seed), program.batch_sharding)
        state, metrics = step(state, batch)
        found.append(float(metrics["loss"]))
    return found


@pytest.mark.parametrize("mode", ["true", "false"], ids=["async", "sync"])
def test_a_restored_state_is_the_saved_one_bit_for_bit(tmp_path: Path, mode: str) -> None:
    config, program, _ = build(EP8)
    state = made_up(config, program)
    save(tmp_path, small_config(EP8, *KEYS, f"async_checkpointing={mode}"), state, 3)
    restored = restore(tmp_path, config, program)
    assert_bitwise(restored, state)
    places = jax.tree.map(lambda a: a.sharding, restored)
    assert places == jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state)


def test_a_state_is_restored_at_another_ep_size_and_goes_on_alike(tmp_path: Path) -> None:
    config, program, step = build(EP8)
    other_config, other_program, other_step = build(EP2)
    state = made_up(config, program)
    save(tmp_path, config, state, 1)
    restored = restore(tmp_path, other_config, other_program)
    assert_bitwise(restored, state)
    places = jax.tree.map(lambda a: a.sharding, restored)
    assert places == jax.tree.map(lambda leaf: leaf.sharding, other_program.abstract_state)
    np.testing.assert_allclose(
        losses(other_program, other_step, restored), losses(program, step, state), rtol=1e-5
    )


@pytest.mark.parametrize("optimizer", ["adafactor", "muon"])
def test_any_optimizers_state_is_restored_on_another_mesh(tmp_path: Path, optimizer: str) -> None:
    keys = (*KEYS, f"optimizer={optimizer}", "mu_dtype=bfloat16", "base_emb_dim=128", "head_dim=16")
    over = small_config({"data": 2, "expert": 4}, *keys, "shard_optimizer_over_data=true")
    other = small_config(EP2, *keys)
    saved = made_up(over, make_program(over, annotator(over)))
    save(tmp_path, over, saved, 3)
    program = make_program(other, annotator(other))
    state = restore(tmp_path, other, program)
    assert_bitwise(state, saved)
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == jax.tree.map(
        lambda leaf: leaf.sharding, program.abstract_state
    )
    moments = {leaf.dtype.name for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim}
    assert ("bfloat16" in moments) == (optimizer == "muon")


def test_the_newest_are_kept(tmp_path: Path) -> None:
    config, program, _ = build(EP8)
    kept = small_config(EP8, *KEYS, "max_num_checkpoints_to_keep=2")
    state = made_up(config, program)
    save(tmp_path, kept, state, 2, 4, 6, 8)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"6", "8"}
    save(tmp_path, kept, state, 8)  # a second time does nothing
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"6", "8"}


def test_of_older_ones_every_mth_is_kept(tmp_path: Path) -> None:
    config, program, _ = build(EP8)
    keys = ("max_num_checkpoints_to_keep=2", "checkpoint_keep_period=4")
    kept = small_config(EP8, *KEYS, *keys)
    save(tmp_path, kept, made_up(config, program), 2, 4, 6, 8, 10, 12, 14)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"4", "8", "12", "14"}
    with pytest.raises(UserError, match="max_num_checkpoints_to_keep=-1 keeps all"):
        small_config(EP8, *KEYS, "checkpoint_keep_period=4")


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    config, _, _ = build(EP8)
    checkpointer = Checkpointer(tmp_path / "new", config)
    assert checkpointer.latest() is None
    checkpointer.close()


@pytest.mark.parametrize(
    "change",
    ["base_emb_dim=32", "num_experts=16", "optimizer=sgd", "use_qk_norm=true",
     "logits_via_embedding=true", "base_num_decoder_layers=3", "weight_dtype=bfloat16",
     "attention_bias=true", "dense_layers=[1]"],
)  # fmt: skip
def test_another_models_checkpoint_is_refused_by_the_keys_that_differ(
    tmp_path: Path, change: str
) -> None:
    config, program, _ = build(EP8)
    save(tmp_path, config, made_up(config, program), 1)
    other = small_config(EP8, *KEYS, change)
    with pytest.raises(UserError) as caught:
        restore(tmp_path, other, make_program(other, annotator(other)))
    message = str(caught.value)
    assert len(message.splitlines()) <= 3
    assert change in message
    assert "fix: " in message


def test_keys_that_shape_nothing_may_change(tmp_path: Path) -> None:
    config, program, _ = build(EP8)
    state = made_up(config, program)
    save(tmp_path, config, state, 1)
    other = small_config(EP8, *KEYS, "learning_rate=1.0", "capacity_factor=2", "steps=99")
    assert_bitwise(restore(tmp_path, other, make_program(other, annotator(other))), state)


def test_a_key_that_shapes_the_state_is_named(tmp_path: Path) -> None:
    config, program, _ = build(EP8)
    save(tmp_path, config, made_up(config, program), 1)
    other = small_config(EP8, *KEYS, "attention_sink=true")
    with pytest.raises(UserError, match="attention_sink=false"):
        restore(tmp_path, other, make_program(other, annotator(other)))


def damage_arrays(folder: Path) -> None:
    for path in (folder / "state").rglob("*"):
        if path.is_file() and path.stat().st_size > 64:
            path.write_bytes(path.read_bytes()[:32])


def remove_arrays(folder: Path) -> None:
    shutil.rmtree(folder / "state")


def remove_config(folder: Path) -> None:
    shutil.rmtree(folder / "config")


@pytest.mark.parametrize("harm", [damage_arrays, remove_arrays, remove_config])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path, harm: Any) -> None:
    config, program, _ = build(EP8)
    first = made_up(config, program, seed=1)
    save(tmp_path, config, first, 1)
    save(tmp_path, config, made_up(config, program, seed=2), 2)
    harm(tmp_path / "2")
    assert_bitwise(restore(tmp_path, config, program), first)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"1", "2.damaged"}


def test_a_save_cut_off_half_way_is_as_if_it_had_not_begun(tmp_path: Path) -> None:
    config, program, _ = build(EP8)
    state = made_up(config, program)
    save(tmp_path, config, state, 1, 2)
    # A killed process leaves the folder under its temporary name.
    (tmp_path / "2").rename(tmp_path / "2.orbax-checkpoint-tmp-0")
    assert_bitwise(restore(tmp_path, config, program), state)
