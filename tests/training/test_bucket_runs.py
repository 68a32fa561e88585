"""Runs whose checkpoints are in a bucket: killed, on other machines, damaged, of two processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_shard.checkpoints.bucket import Bucket
from moe_shard.checkpoints.in_bucket import InBucket
from tests.checkpoints.emulator import BUCKET, ROOT, emulator, free_port
from tests.quick import FLAGS
from tests.soak.runs import TINY, computed

pytestmark = pytest.mark.survival

BASE = f"gs://{BUCKET}/runs"


@pytest.fixture(scope="module")
def served() -> Iterator[dict[str, str]]:
    """Serve a bucket to this process and to those that it starts."""
    with emulator() as variables, pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield variables


def begin(machine: Path, *keys: str, **variables: str) -> subprocess.Popen[bytes]:
    """Begin to train on a machine: a current folder of its own, and nothing else shared."""
    machine.mkdir(exist_ok=True)
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": FLAGS,
        "JAX_COMPILATION_CACHE_DIR": str(machine.parent / "cache"),
    }
    with (machine / "output.txt").open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "moe_shard.train", *TINY, *keys],
            cwd=machine,
            env=environment | variables,
            stdout=output,
            stderr=output,
        )


def train(machine: Path, *keys: str) -> str:
    """Train to the end, and return what was said."""
    code = begin(machine, *keys).wait(200)
    said = (machine / "output.txt").read_text()
    assert code == 0, said
    return said


def here(machine: Path, name: str) -> Path:
    return machine / "outputs" / "gs" / BUCKET / "runs" / name


def evaluations(run: Path) -> list[str]:
    return (run / "eval.jsonl").read_text().splitlines()


def test_a_run_goes_on_from_its_bucket(served: dict[str, str], tmp_path: Path) -> None:
    del served
    keys: tuple[str, ...] = ("run_name=one", "eval_interval=10", "eval_steps=1")
    keys += ("eval_holdout_fraction=0.1", "learning_rate_schedule_steps=50")
    machine, place = tmp_path / "machine", (f"base_output_directory={BASE}",)
    train(tmp_path / "alone", *keys, "steps=50")
    alone = tmp_path / "alone" / "outputs" / "one"

    # Killed at some moment after a checkpoint.
    process, checkpoints = begin(machine, *keys, *place, "steps=30"), f"{BASE}/one/checkpoints"
    until = time.monotonic() + 100
    while "10" not in InBucket(checkpoints).numbers():
        assert process.poll() is None, (machine / "output.txt").read_text()
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    said = train(machine, *keys, *place, "steps=30")
    assert "continuing from the checkpoint after step" in said
    assert computed(here(machine, "one")) == computed(alone)[:30]

    # The machine is replaced.
    shutil.rmtree(machine)
    said = train(machine, *keys, *place, "steps=40")
    assert "continuing from the checkpoint after step 30" in said
    assert "takes effect from here on: steps 30 -> 40" in said
    assert computed(here(machine, "one")) == computed(alone)[:40]

    # The newest checkpoint is damaged.
    (array, _), *_ = sorted(
        Bucket(f"{checkpoints}/40").find("state/d").items(), key=lambda each: -each[1].size
    )
    content = Bucket(checkpoints).read(f"40/state/d/{array}")
    Bucket(checkpoints).write(f"40/state/d/{array}", content[:-1] + bytes([content[-1] ^ 1]))
    said = train(machine, *keys, *place, "steps=50")
    assert f"state/d/{array} has other contents than were saved; set aside as 40.damaged" in said
    assert "continuing from the checkpoint after step 30" in said
    assert computed(here(machine, "one")) == computed(alone)
    assert evaluations(here(machine, "one")) == evaluations(alone)
    assert {"30", "40", "40.damaged", "50"} <= {*InBucket(checkpoints).names()}
    copied = Bucket(f"{BASE}/one")
    assert copied.read("metrics.jsonl") == (here(machine, "one") / "metrics.jsonl").read_bytes()
    assert json.loads(copied.read("best.json")) == json.loads((alone / "best.json").read_text())


def test_two_machines_share_a_bucket_alone(served: dict[str, str], tmp_path: Path) -> None:
    del served
    keys: tuple[str, ...] = ("run_name=two", "eval_interval=5", "eval_steps=1")
    keys += ("eval_holdout_fraction=0.2", "max_num_checkpoints_to_keep=1")

    def both(*more: str) -> list[str]:
        address = f"127.0.0.1:{free_port()}"
        names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        machines = [tmp_path / str(index) for index in range(2)]
        processes = [
            begin(
                machine,
                *(*keys, f"base_output_directory={BASE}", *more),
                **dict(zip(names, (address, "2", str(index)), strict=True)),
            )
            for index, machine in enumerate(machines)
        ]
        codes = [process.wait(200) for process in processes]
        said = [(machine / "output.txt").read_text() for machine in machines]
        assert codes == [0, 0], said
        return said

    both("steps=20")
    assert InBucket(f"{BASE}/two/checkpoints").numbers()[0] == "20"
    shutil.rmtree(tmp_path / "1")
    assert "continuing from the checkpoint after step 20" in both("steps=30")[0]
    assert "30" in InBucket(f"{BASE}/two/checkpoints").numbers()
    one = computed(here(tmp_path / "0", "two"))
    assert [each[0] for each in one] == [*range(30)]
    assert evaluations(here(tmp_path / "1", "two")) == evaluations(here(tmp_path / "0", "two"))[:4]


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("gs://another-bucket/runs", "there is no bucket 'another-bucket'"),
        (BASE, "it cannot be reached"),
    ],
)
def test_what_cannot_be_reached_is_said_before_jax(
    served: dict[str, str], tmp_path: Path, base: str, words: str
) -> None:
    gone = served | {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{free_port()}"}
    began = time.monotonic()
    variables = gone if base == BASE else served
    process = begin(tmp_path / "machine", f"base_output_directory={base}", **variables)
    assert process.wait(60) == 2
    assert time.monotonic() - began < 30
    said = (tmp_path / "machine" / "output.txt").read_text().splitlines()
    assert len(said) == 2
    assert words in said[0]
    assert not (tmp_path / "machine" / "outputs").exists()
