"""Damage checkpoints in every way: restored right, or the one before, or refused; never silent."""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from moe_shard.checkpoints.checkpoint import Checkpointer
from moe_shard.checkpoints.checksums import CHECKSUMS
from moe_shard.checkpoints.run_params import restore_params
from moe_shard.checkpoints.whole import find_whole
from moe_shard.config import Config
from moe_shard.errors import UserError
from moe_shard.program.step import TrainState
from tests.checkpoints.damage import HARMS
from tests.models.build import small_config

OLDER, NEWEST = 7, 12


class Saved(NamedTuple):
    """Hold a folder of two checkpoints, and what is in them."""

    folder: Path
    config: Config
    states: dict[int, TrainState]


def state_of(updates: int) -> TrainState:
    rng = np.random.default_rng(updates)
    params = {"embedding": rng.normal(size=(64, 16)), "norm": {"scale": rng.normal(size=(16,))}}
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = jax.device_put(jax.tree.map(np.float32, params), place)
    moments = optax.adamw(1e-3).init(params)
    return TrainState(jax.device_put(jnp.int32(updates), place), params, moments)


def abstract(state: TrainState) -> TrainState:
    def leaf(array: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)

    described: TrainState = jax.tree.map(leaf, jax.device_put(state, state.step.sharding))
    return described


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    config = small_config({"data": 8}, "async_checkpointing=true")
    states = {updates: state_of(updates) for updates in (OLDER, NEWEST)}
    checkpointer = Checkpointer(folder, config)
    for updates, state in states.items():
        checkpointer.save(state, updates=updates)
    checkpointer.close()
    return Saved(folder, config, states)


def copy_of(saved: Saved, to: Path) -> Saved:
    shutil.copytree(saved.folder, to / "checkpoints", symlinks=True)
    return saved._replace(folder=to / "checkpoints")


def resume(saved: Saved, *keys: str) -> tuple[int, TrainState, list[str]]:
    """Open a folder as a run does and restore; return the updates, the state and what was said."""
    lines: list[str] = []
    config = small_config({"data": 8}, *keys) if keys else saved.config
    checkpointer = Checkpointer(saved.folder, config, say=lines.append)
    try:
        updates = checkpointer.latest()
        assert updates is not None
        checkpointer.check_fits(updates)
        return updates, checkpointer.restore(updates, abstract(saved.states[NEWEST])), lines
    finally:
        checkpointer.close()


def assert_same(one: TrainState, other: TrainState) -> None:
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one), jax.device_get(other))


def judge(saved: Saved) -> str:
    """Return what became of a damaged folder; an answer that is wrong raises."""
    before = {path.name for path in saved.folder.iterdir()}
    refusal = ""
    try:
        updates, state, lines = resume(saved)
    except UserError as error:
        refusal = str(error)
    if refusal:
        assert len(refusal.splitlines()) <= 3
        assert "fix: " in refusal
        return "refused"
    assert_same(state, saved.states[updates])
    after = {path.name for path in saved.folder.iterdir()}
    if updates == NEWEST:
        return "restored, said" if lines else "restored"
    assert lines, "fell back without a word"
    assert any(name.startswith(f"{NEWEST}") and "damaged" in name for name in after) or (
        str(NEWEST) not in before
    )
    return "the one before"


@pytest.mark.parametrize("kind", HARMS)
def test_with_no_other_to_go_back_to_it_is_restored_or_refused(
    saved: Saved, tmp_path: Path, kind: str
) -> None:
    seen: Counter[str] = Counter()
    count = int(os.environ.get("DAMAGES", "8")) // len(HARMS)
    for seed in range(count):
        here = copy_of(saved, tmp_path / str(seed))
        shutil.rmtree(here.folder / str(OLDER))
        HARMS[kind](here.folder / str(NEWEST), random.Random(f"only {kind} {seed}"))
        seen[judge(here)] += 1
    assert not seen["the one before"] + seen["restored"]
    print("the only one,", kind, dict(seen))


@pytest.mark.parametrize("kind", HARMS)
def test_damage_of_any_kind_is_survived_or_refused(saved: Saved, tmp_path: Path, kind: str) -> None:
    seen: Counter[str] = Counter()
    count = int(os.environ.get("DAMAGES", "24")) // len(HARMS)
    for seed in range(count):
        here = copy_of(saved, tmp_path / str(seed))
        HARMS[kind](here.folder / str(NEWEST), random.Random(f"{kind} {seed}"))
        seen[judge(here)] += 1
    assert seen["refused"] == 0  # there is one before
    if kind not in ("renamed", "foreign_inside", "foreign_beside"):
        assert seen["the one before"] == count
    assert seen["restored"] == 0, "not a word on what is there"
    print(kind, dict(seen))


def test_every_file_is_named_with_its_size_and_content(saved: Saved) -> None:
    for updates in saved.states:
        found = find_whole(saved.folder, updates=updates)
        assert found is not None
        assert found.manifest is not None
        checkpoint = saved.folder / str(updates)
        files = {str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()}
        assert set(found.manifest.files) == files - {CHECKSUMS}
        assert "_CHECKPOINT_METADATA" in files
        assert found.manifest.updates == updates
    assert not list(saved.folder.glob("*tmp*"))


def test_a_flipped_bit_is_found_only_by_checksums(saved: Saved, tmp_path: Path) -> None:
    here = copy_of(saved, tmp_path)
    data = max((here.folder / str(NEWEST) / "state").rglob("*"), key=lambda p: p.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    assert find_whole(here.folder, verify=False, say=lambda _: None) is not None
    unverified = find_whole(here.folder, verify=False)
    assert unverified is not None
    assert unverified.updates == NEWEST
    updates, state, lines = resume(here)
    assert updates == OLDER
    assert_same(state, here.states[OLDER])
    assert "has other contents than were saved; set aside as 12.damaged" in "\n".join(lines)
    assert {p.name for p in here.folder.iterdir() if p.is_dir()} >= {"12.damaged", "7"}


def test_without_a_whole_one_it_is_refused_and_again_and_nothing_starts(
    saved: Saved, tmp_path: Path
) -> None:
    here = copy_of(saved, tmp_path)
    for updates in (OLDER, NEWEST):
        (here.folder / str(updates) / "state" / "_METADATA").write_text("{")
    lines: list[str] = []
    for _ in range(2):
        with pytest.raises(UserError, match=r"none of the 2 .* is whole; .* is damaged") as caught:
            Checkpointer(here.folder, here.config, say=lines.append)
        assert len(str(caught.value).splitlines()) == 2
        assert {path.name for path in here.folder.iterdir() if path.is_dir()} == {"7", "12"}
    for updates in (OLDER, NEWEST):
        (here.folder / str(updates)).rename(here.folder / f"{updates}.damaged")
    with pytest.raises(UserError, match="holds only damaged checkpoints"):
        Checkpointer(here.folder, here.config, say=lines.append)
    assert not lines


def test_a_checkpoint_of_another_run_is_set_aside(saved: Saved, tmp_path: Path) -> None:
    here, other = copy_of(saved, tmp_path / "a"), tmp_path / "b" / "checkpoints"
    checkpointer = Checkpointer(other, saved.config)
    checkpointer.save(state_of(20), updates=20)
    checkpointer.close()
    shutil.copytree(other / "20", here.folder / "20")
    updates, _, lines = resume(here)
    assert updates == NEWEST
    assert "another run" in lines[0]


def test_one_saved_before_there_were_checksums_is_read_with_a_line(
    saved: Saved, tmp_path: Path
) -> None:
    here = copy_of(saved, tmp_path)
    for updates in (OLDER, NEWEST):
        (here.folder / str(updates) / CHECKSUMS).unlink()
        metadata = here.folder / str(updates) / "_CHECKPOINT_METADATA"
        metadata.write_text(metadata.read_text().replace(f'{{"checksums": "{CHECKSUMS}"}}', "{}"))
    updates, state, lines = resume(here)
    assert updates == NEWEST
    assert_same(state, here.states[NEWEST])
    assert [line for line in lines if "not verified" in line]
    for data in (here.folder / str(NEWEST) / "state").rglob("d/*"):
        data.write_bytes(data.read_bytes()[:-40])
    updates, state, lines = resume(here)
    assert updates == OLDER
    assert_same(state, here.states[OLDER])


@pytest.mark.parametrize("what", ["file", "link"])
def test_a_folder_that_is_none_is_refused(saved: Saved, tmp_path: Path, what: str) -> None:
    folder = tmp_path / "checkpoints"
    if what == "file":
        folder.write_text("x")
    else:
        folder.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="fix: "):
        Checkpointer(folder, saved.config)


def test_readers_choose_the_whole_one_and_rename_nothing(saved: Saved, tmp_path: Path) -> None:
    here = copy_of(saved, tmp_path)
    (here.folder / str(NEWEST) / "state" / "manifest.ocdbt").write_bytes(b"")
    names = {path.name for path in here.folder.iterdir()}
    lines: list[str] = []
    wanted = abstract(saved.states[OLDER]).params
    params = restore_params(here.folder, wanted, say=lines.append)
    jax.tree.map(np.testing.assert_array_equal, params, saved.states[OLDER].params)
    assert "is damaged" in lines[0]
    assert "after step 7" in lines[-1]
    assert {path.name for path in here.folder.iterdir()} == names
    with pytest.raises(UserError, match="damaged"):
        restore_params(here.folder, wanted, updates=NEWEST)


def test_orbax_reads_it_by_itself(saved: Saved) -> None:
    with ocp.CheckpointManager(saved.folder) as manager:
        assert manager.all_steps() == [OLDER, NEWEST]
    read = ocp.StandardCheckpointer().restore(saved.folder / str(NEWEST) / "state")
    np.testing.assert_array_equal(
        read["params"]["embedding"], saved.states[NEWEST].params["embedding"]
    )


def test_what_a_killed_process_left_is_removed(saved: Saved, tmp_path: Path) -> None:
    here = copy_of(saved, tmp_path)
    for name in ("14.orbax-checkpoint-tmp", "15.orbax-checkpoint-tmp.whole"):
        (here.folder / name / "state").mkdir(parents=True)
    assert resume(here)[0] == NEWEST
    assert not list(here.folder.glob("*tmp*"))
