"""Save for GKE's replicator service, which a stand-in plays, and go on bit for bit."""

from __future__ import annotations

import random
import resource
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint.experimental.emergency.multi_tier_checkpointing import initialization

from moe_shard.checkpoints.checksums import write_manifest
from moe_shard.checkpoints.replicated import ReplicatedCheckpoints, held_by, identical_groups
from moe_shard.checkpoints.replicator import Node, Replicator
from moe_shard.errors import UserError
from tests.checkpoints.damage import bit_flipped
from tests.checkpoints.replicator_stand_in import StandIn
from tests.models.build import small_config
from tests.quick import FLAGS
from tests.soak.runs import Start, computed, start, wait

PLAIN = ("ici_data_parallelism=2", "ici_expert_parallelism=2", "steps=40", "checkpoint_period=1000")
KEYS = (
    *("save_checkpoint_on_completion=false", "enable_multi_tier_checkpointing=true"),
    *("local_checkpoint_directory=~", "local_checkpoint_period=4"),
    "multi_tier_checkpointing_backup_interval_steps=8",
)


def started(folder: Path, nodes: list[Path], *keys: str) -> Start:
    return start(
        folder,
        2,
        (*PLAIN, *KEYS, *keys),
        own=[{"HOME": str(node)} for node in nodes],
        XLA_FLAGS=FLAGS,
    )


def killed(run: Start, service: StandIn, step: int) -> int:
    """Kill a process when the service has a checkpoint of a step; return the newest it has."""
    deadline = time.monotonic() + 300
    while not service.taken or service.taken[-1] < step:
        assert run.running(), run.texts()
        assert not service.failure, service.failure
        assert time.monotonic() < deadline
        time.sleep(0.002)
    run.processes[1].kill()
    assert wait(run, 60) < 60
    return service.taken[-1]


@pytest.mark.survival
def test_lost_parts_come_back_from_a_peer_and_from_the_bucket(tmp_path: Path) -> None:
    nodes, bucket = [tmp_path / "node-0", tmp_path / "node-1"], tmp_path / "bucket"
    with StandIn(nodes, bucket) as service:
        run = started(tmp_path, nodes, "run_name=two")
        killed(run, service, 8)
        service.lose(1)
        run = started(tmp_path, nodes, "run_name=two")
        killed(run, service, 24)
        service.lose(0, 1)
        run = started(tmp_path, nodes, "run_name=two")
        assert wait(run, 300) < 300
        assert [each.returncode for each in run.processes] == [0, 0], run.texts()
        step, _ = service.restored[2]
        assert f"continuing from the checkpoint after step {step}" in run.texts()[0]
        assert "is read from the machines' own disks" in run.texts()[0]
    alone = start(tmp_path, 2, (*PLAIN, "run_name=alone"), XLA_FLAGS=FLAGS)
    assert wait(alone, 300) < 300
    assert [each.returncode for each in alone.processes] == [0, 0], alone.texts()
    (none, _), (peer, from_peer), (bucket_step, from_bucket) = service.restored
    assert none is None
    assert from_peer == {1: "peer"}
    assert from_bucket == {0: "bucket", 1: "peer"}
    # The bucket has every eighth, that of a kill as well as what came after it.
    assert peer is not None
    assert peer % 4 == 0 <= peer - 8
    assert bucket_step is not None
    assert bucket_step % 8 == 0 <= bucket_step - 24
    outputs = tmp_path / "outputs"
    assert len(computed(outputs / "two")) == 40
    assert computed(outputs / "two") == computed(outputs / "alone")


@pytest.mark.survival
def test_a_save_that_fails_on_one_process_is_given_up_by_all(tmp_path: Path) -> None:
    nodes, bucket = [tmp_path / "node-0", tmp_path / "node-1"], tmp_path / "bucket"
    with StandIn(nodes, bucket) as service:
        run = started(tmp_path, nodes, "run_name=one", "steps=12")
        # Parts have files of 100 kB.
        resource.prlimit(run.processes[1].pid, resource.RLIMIT_FSIZE, (50_000, 50_000))
        assert wait(run, 300) < 300
    assert [each.returncode for each in run.processes] == [0, 0], run.texts()
    assert service.taken == []
    assert len(computed(tmp_path / "outputs" / "one")) == 12
    said = [line for line in run.texts()[0].splitlines() if "local checkpoint" in line]
    assert len(said) == 3
    for step, line in zip((4, 8, 12), said, strict=True):
        assert line.startswith(f"process 1: the local checkpoint after step {step} was not saved")
        assert "File too large" in line
    assert not [*nodes[0].glob("written*")]


@pytest.mark.survival
def test_a_service_that_is_absent_is_said(tmp_path: Path) -> None:
    nodes = [tmp_path / "node-0", tmp_path / "node-1"]
    for node in nodes:
        node.mkdir()
    for folders, said in ((nodes, "in 10 s\nfix: a cluster"), (nodes[:1] * 2, "processes 0 and 1")):
        run = started(tmp_path, folders, "jax_distributed_initialization_timeout=10", "run_name=a")
        assert wait(run, 120) < 120
        assert [each.returncode for each in run.processes] == [2, 2], run.texts()
        for text in run.texts():
            error = text[text.index("error: ") :].strip()
            assert said in error
            assert error.count("\n") == 1
        assert not [path for node in nodes for path in node.iterdir()]


@pytest.mark.parametrize(("rank", "groups", "minutes"), [(1, 2, 0), (2, 1, 30), (3, 4, 0)])
def test_a_request_is_what_orbax_writes(
    tmp_path: Path, rank: int, groups: int, minutes: int
) -> None:
    node = Node("3e-4", rank, 4, groups, minutes, 0 if minutes else 8)
    initialization._create_replicator_file(
        tmp_path,
        run_name="'3e-4'",  # which a YAML reader takes for a number as it is
        num_nodes=4,
        data_parallelism=groups,
        node_rank=rank,
        peer_ranks=node.peers,
        backup_interval_minutes=minutes or None,
        backup_interval_steps=None if minutes else 8,
    )
    written = yaml.safe_load((tmp_path / "replicator.yaml").read_text())
    assert yaml.safe_load(node.request()) == written
    assert node.peers == {2: [3], 1: [], 4: [0, 1, 2]}[groups]


def test_a_service_that_is_absent_fails_or_finds_nothing_is_told_apart(tmp_path: Path) -> None:
    service = Replicator(tmp_path, Node("run", 0, 2, 2, 30, 0))
    assert "nothing has taken replicator.yaml out of" in service.ask(0.2)
    assert not [*tmp_path.iterdir()]
    taking = threading.Timer(0.2, lambda: (tmp_path / "replicator.yaml").unlink())
    taking.start()
    assert service.ask(30) == ""
    taking.join()
    (tmp_path / "run-s0-n0-w0.restore").touch()
    assert service.wait(print) is None
    assert not [*tmp_path.iterdir()]
    for step in (8, 12):
        (tmp_path / f"run-s{step}-n0-w0.restore").symlink_to("D0.data")
    assert service.wait(print) == tmp_path / "run-s12-n0-w0.restore"
    (tmp_path / "replicator.failed").write_text("one\nno bucket\n")
    with pytest.raises(UserError, match=r"has given up in .*: no bucket\nfix: "):
        service.wait(print)
    assert not (tmp_path / "replicator.failed").exists()
    missing = Replicator(tmp_path / "none", Node("run", 0, 2, 2, 30, 0))
    assert "cannot write to" in missing.ask(0.2)


def test_groups_of_processes_that_hold_the_same() -> None:
    for processes, groups in {"abab": 2, "aaaa": 4, "aabb": 1, "abcabc": 2, "aabbaabb": 2}.items():
        assert identical_groups(processes) == groups
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "expert"))

    def state(*specs: P) -> Any:
        return [
            jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=NamedSharding(mesh, spec))
            for spec in specs
        ]

    process_of = {device.id: device.id // 2 for device in jax.devices()}  # four of two devices
    for found, specs in {
        2: (P("fsdp", "expert"), P()),
        4: (P("expert"), P()),
        1: (P("fsdp"), P(("data", "fsdp"))),  # moments over data: no process has those of another
    }.items():
        assert identical_groups(held_by(state(*specs), process_of, 4)) == found


def test_a_part_that_is_damaged_makes_way_for_another(tmp_path: Path) -> None:
    local: Any = SimpleNamespace(_folder=tmp_path, _id="this")
    for name, run in (("Da", "this"), ("Db", "this"), ("Dc", "other")):
        data = tmp_path / f"{name}.data"
        data.mkdir()
        (data / "array").write_bytes(bytes(100))
        write_manifest(data, updates=8, run=run)
    bit_flipped(tmp_path / "Db.data", random.Random(0))
    lines = []
    for name in ("Da", "Db", "Dc"):
        link = tmp_path / "written_8"
        link.symlink_to(f"{name}.data")
        lines.append(ReplicatedCheckpoints._examine(local, link, 8, verify=True))
        link.unlink()
    assert lines[0] == []
    assert "after step 8 is damaged: " in lines[1][0]
    assert lines[1][0].endswith("set aside as Db.data.aside")
    assert lines[2][0].endswith("is of another mesh, other processes or another optimizer")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "Da.data",
        "Db.data.aside",
        "Dc.data",
    ]


def test_what_hinders_a_save_is_said(tmp_path: Path) -> None:
    local: Any = SimpleNamespace(_folder=tmp_path, _bytes=0)
    local._service = Replicator(tmp_path, Node("run", 0, 2, 2, 30, 0))
    (tmp_path / "8").mkdir()
    assert ReplicatedCheckpoints._hindrance(local) == (
        "GKE's replicator service has not taken the one after step 8 yet"
    )
    (tmp_path / "replicator.failed").write_text("no bucket")
    assert ReplicatedCheckpoints._hindrance(local).endswith("has given up: no bucket")


MTC = ("enable_multi_tier_checkpointing=true", "local_checkpoint_directory=x")
OFTEN = (*MTC, "local_checkpoint_period=4")
MINUTES, STEPS = (
    f"multi_tier_checkpointing_backup_interval_{each}" for each in ("minutes", "steps")
)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ((*MTC, "enable_emergency_checkpoint=true"), "fix: the second with GKE's"),
        (MTC, "fix: local_checkpoint_directory=FOLDER"),
        (OFTEN, "and has none"),
        ((*OFTEN, f"{MINUTES}=8", f"{STEPS}=8"), "and has two"),
        ((*OFTEN, f"{STEPS}=3"), "more often than local_checkpoint_period=4"),
        (("mtc_data_parallelism=2",), "fix: enable_multi_tier_checkpointing=true"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(keys: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        small_config({"data": 8}, *keys)
