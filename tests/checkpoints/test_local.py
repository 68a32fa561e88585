"""Save to each machine's own disk as well, and go on from there bit for bit."""

from __future__ import annotations

import random
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from moe_shard.checkpoints import local as local_checkpoints
from moe_shard.checkpoints.checksums import write_manifest
from moe_shard.checkpoints.emergency import EmergencyCheckpoints, own_replica
from moe_shard.errors import UserError
from tests.checkpoints.damage import bit_flipped
from tests.models.build import small_config
from tests.quick import FLAGS
from tests.soak.runs import COMPUTED, records, start, wait

KEYS = (
    *("ici_data_parallelism=2", "ici_expert_parallelism=2", "run_name=two", "steps=12"),
    *("checkpoint_period=7", "save_checkpoint_on_completion=false"),
    *("enable_emergency_checkpoint=true", "local_checkpoint_directory=ram"),
    "local_checkpoint_period=4",
)


@pytest.mark.survival
def test_two_processes_go_on_from_their_own_disks_bit_for_bit(tmp_path: Path) -> None:
    run = tmp_path / "outputs" / "two"
    metrics = []
    for said in ("", "process 1: the local checkpoint "):
        started = start(tmp_path, 2, KEYS, XLA_FLAGS=FLAGS)
        assert wait(started, 300) < 300
        assert [each.returncode for each in started.processes] == [0, 0], started.texts()
        metrics.append([[each[name] for name in ("step", *COMPUTED)] for each in records(run)])
        first = started.texts()[0]
        assert ("continuing from the checkpoint after step 8" in first) == bool(said)
        assert ("is read from the machines' own disks" in first) == bool(said)
        assert said in first
        kept = {
            path.relative_to(tmp_path / "ram") for path in tmp_path.glob("ram/*/*/checkpoints/*")
        }
        # The first replica's are those of the run.
        assert {path.parts[1] for path in kept} == {"1"}
        assert {"8", "12"} <= {path.name for path in kept}
        assert {path.name for path in (run / "checkpoints").iterdir()} == {"7", "run"}
        if not said:
            bit_flipped(next(tmp_path.glob("ram/*/1/checkpoints/12")), random.Random(0))
    assert "12.aside" in {path.name for path in kept}
    assert len(metrics[0]) == 12
    assert metrics[0] == metrics[1]


@pytest.mark.survival
def test_a_save_that_fails_on_one_process_of_a_replica_ends_on_all_of_it(tmp_path: Path) -> None:
    keys = (*KEYS, "steps=4", "local_checkpoint_period=2")
    run = start(tmp_path, 4, keys, XLA_FLAGS=FLAGS)  # processes 2 and 3 are the second replica
    resource.prlimit(run.processes[3].pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
    assert wait(run, 300) < 300
    assert [each.returncode for each in run.processes] == [0] * 4, run.texts()
    said = [line for line in run.texts()[0].splitlines() if "local checkpoint" in line]
    assert [line.split(" in ")[0] for line in said] == [
        f"process 3: the local checkpoint after step {step} was not saved" for step in (2, 4)
    ]
    assert all("File too large" in line for line in said)
    assert not [path for path in tmp_path.glob("ram/*/*/checkpoints/*") if path.name.isdecimal()]


def test_parts_that_cannot_be_used_are_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (3, 6, 9, 12, 15):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "array").write_bytes(bytes(100))
    (tmp_path / "15.orbax-checkpoint-tmp").mkdir()
    for number, run in ((3, "this"), (6, "this"), (9, "other"), (12, "this")):
        write_manifest(tmp_path / str(number), updates=number, run=run)
    (tmp_path / "6" / "array").write_bytes(bytes(99) + b"1")
    shutil.move(tmp_path / "12", tmp_path / "18")
    local: Any = SimpleNamespace(_folder=tmp_path, _id="this")
    local._parts = lambda: EmergencyCheckpoints._parts(local)
    local._needed = lambda: EmergencyCheckpoints._needed(local)
    local._remove_unfinished = lambda: EmergencyCheckpoints._remove_unfinished(local)
    lines = EmergencyCheckpoints._examine(local, verify=True)
    assert sorted(
        line.partition("checkpoint ")[2].replace(str(tmp_path), "") for line in lines
    ) == [
        "/18 is damaged: it was saved after step 12; set aside as 18.aside",
        "/6 is damaged: array has other contents than were saved; set aside as 6.aside",
        "/9 is of another mesh, other processes or another optimizer; set aside as 9.aside",
    ]
    # One without checksums was not finished.
    assert {path.name for path in local._parts()} == {"3"}
    assert EmergencyCheckpoints._hindrance(local) == ""
    assert not (tmp_path / "15.orbax-checkpoint-tmp").exists()
    monkeypatch.setattr(local_checkpoints, "free_bytes", lambda _: 99)
    assert "cannot fit in" in EmergencyCheckpoints._hindrance(local)
    assert "(99 B free, needs about 100 B)" in EmergencyCheckpoints._hindrance(local)


def test_what_has_no_replicas_is_refused() -> None:
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "expert"))
    with pytest.raises(UserError, match="there are 2 on 1"):
        own_replica(mesh)
    keys = ("enable_emergency_checkpoint=true", "local_checkpoint_directory=x")
    with pytest.raises(UserError, match="fix: local_checkpoint_directory=FOLDER"):
        small_config({"data": 8}, *keys)
    with pytest.raises(UserError, match="do nothing by themselves"):
        small_config({"data": 8}, *keys[1:])
    with pytest.raises(UserError, match="fix: shard_optimizer_over_data=false"):
        small_config(
            {"data": 8}, *keys, "local_checkpoint_period=1", "shard_optimizer_over_data=true"
        )
