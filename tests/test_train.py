"""Use the command line as a person or a script does: processes, files, signals, exit codes."""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from moe_shard.cli import main as moe_shard
from moe_shard.config import load_config
from tests.quick import FLAGS

REPOSITORY = Path(__file__).resolve().parents[1]
TINY = (
    "base_num_decoder_layers=1",
    "base_emb_dim=32",
    "base_num_query_heads=2",
    "base_num_kv_heads=1",
    "head_dim=16",
    "base_mlp_dim=32",
    "base_moe_mlp_dim=32",
    "max_target_length=32",
    "per_device_batch_size=1",
)
# Long enough that a signal sent after a third of the steps arrives before the last.
STEPS, PERIOD, LOG_PERIOD = 200, 50, 10
LONG = (*TINY, f"steps={STEPS}", f"checkpoint_period={PERIOD}", f"log_period={LOG_PERIOD}")
METRICS = {
    "step", "loss", "ce_loss", "aux_loss", "grad_norm", "learning_rate", "step_time_s",
    "tokens_per_sec_per_device", "tflops_per_sec_per_device", "mfu", "dropped_token_fraction",
    "expert_load_max_over_mean", "update_norm", "skipped",
}  # fmt: skip
LOWERING = {"backend", "num_devices", "mesh", "verdict", "collectives", "totals", "memory"}
LOWERING |= {"moe", "attention"}
COLLECTIVE = {
    "kind", "axes", "scope", "pass", "count", "bytes", "wire_bytes", "async", "spmd_generated",
    "op_name", "source", "role", "parameter",
}  # fmt: skip
WAIT_S = 300  # a busy machine is slow; a process that hangs is still killed


@dataclass(frozen=True)
class Done:
    """Hold a process that has ended."""

    code: int
    out: str
    err: str


class Command:
    """Run the command line, with one compilation cache for all of its processes.

    The devices are those that `num_simulated_devices` asks for, not those of the other tests.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {
            **{name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
            "JAX_PLATFORMS": "cpu",
            "JAX_ENABLE_COMPILATION_CACHE": "true",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": os.pathsep.join(
                [*os.environ.get("PYTHONPATH", "").split(os.pathsep), str(REPOSITORY)]
            ).strip(os.pathsep),
        }

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "moe_shard.train", *arguments],
            cwd=self.folder,
            env=self.env | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self, process: subprocess.Popen[str]) -> Done:
        try:
            out, err = process.communicate(timeout=WAIT_S)
        finally:
            process.kill()
        return Done(process.returncode, out, err)

    def run(self, *arguments: str, **environment: str) -> Done:
        return self.end(self.start(*arguments, **environment))

    def signalled(
        self, number: signal.Signals, run: Path, step: int, checkpoint: int, *arguments: str
    ) -> Done:
        """Run until a step has been recorded and a checkpoint is whole, then send a signal."""
        process = self.start(*arguments)
        deadline = time.monotonic() + WAIT_S
        whole = run / "checkpoints" / str(checkpoint)  # its final name
        while not (whole.is_dir() and records(run, partial=True)[-1]["step"] >= step):
            assert process.poll() is None, self.end(process)
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(number)
        return self.end(process)


def records(run: Path, partial: bool = False) -> list[dict[str, Any]]:
    """Read the lines of metrics.jsonl as strict JSON; `partial`: while it is being written."""
    path = run / "metrics.jsonl"
    if partial and not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    if partial and lines and not lines[-1].endswith("\n"):
        lines.pop()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in lines]


def layers(run: Path) -> list[dict[str, Any]]:
    """Read the records of layers.jsonl, but for the memory, which is that of a process."""
    found = [json.loads(line) for line in (run / "layers.jsonl").read_text().splitlines()]
    assert all(each.pop("memory")["in_use_bytes"] > 2**20 for each in found)
    return found


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in records(run)]


def assert_refused(done: Done, *parts: str) -> None:
    assert done.code == 2, done
    assert "Traceback" not in done.err
    assert 1 <= len(done.err.splitlines()) <= 3, done.err
    for part in parts:
        assert part in done.err, done.err


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    return Command(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def whole(command: Command) -> tuple[Path, Done]:
    """Return a run that is not interrupted."""
    done = command.run(
        "mixtral-tiny", *LONG, "run_name=whole", "dump_hlo=true", "profile=true", "profiler_steps=2"
    )
    assert done.code == 0, done.err
    return command.folder / "outputs" / "whole", done


def test_before_step_0_the_lowering_is_reported(whole: tuple[Path, Done]) -> None:
    _, done = whole
    parts = [
        "simulating 8 devices", "collectives per step, 8 devices (cpu): expert 8", "all-to-all",
        "verdict: expert-parallel", "parameters: 48,480", f"step 1/{STEPS}  loss ",
        f"step {STEPS}/{STEPS}", "files: outputs/whole",
    ]  # fmt: skip
    places = [done.out.find(part) for part in parts]
    assert -1 not in places, dict(zip(parts, places, strict=True))
    assert places == sorted(places)
    assert done.err == ""


def test_the_run_folder_holds_what_the_contract_says(whole: tuple[Path, Done]) -> None:
    run, _ = whole
    visible = {path.name for path in run.iterdir() if not path.name.startswith(".")}
    assert visible == {
        "config.yml", "lowering.json", "metrics.jsonl", "tensorboard", "checkpoints", "hlo",
        "profile", "goodput.json", "layers.jsonl",
    }  # fmt: skip
    steps = range(PERIOD, STEPS + 1, PERIOD)
    assert {p.name for p in (run / "checkpoints").iterdir()} == {str(step) for step in steps}
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    assert list((run / "profile").rglob("*.xplane.pb"))
    assert (run / "hlo" / "train_step.after_optimizations.txt").read_text().startswith("HloModule")


def test_a_profiled_run_ends_with_where_its_time_went(
    whole: tuple[Path, Done], capsys: pytest.CaptureFixture[str]
) -> None:
    run, done = whole
    assert "kernel time of a step, mean of 8 devices and 2 steps" in done.out
    kept = json.loads((run / "profile" / "kernel_times.json").read_text())
    stages = {each["stage"]: each["seconds"] for each in kept["stages"]}
    assert {"attention", "experts", "logits", "optimizer", "all-to-all"} <= set(stages)
    total = sum(stages.values()) + kept["idle_s"] - kept["overlapped_s"]
    assert total + kept["other_programs_s"] == pytest.approx(kept["step_s"])
    assert kept["unattributed_share"] < 0.01
    assert moe_shard(["profile", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == kept


def test_config_yml_is_the_resolved_configuration_and_loads_again(whole: tuple[Path, Done]) -> None:
    path = whole[0] / "config.yml"
    written = yaml.safe_load(path.read_text())
    assert written["base_emb_dim"] == 32
    assert written["steps"] == STEPS
    assert written["run_name"] == "whole"
    assert load_config(str(path)).as_flat_dict() == written


def test_lowering_json_has_the_contracts_keys(whole: tuple[Path, Done]) -> None:
    report = json.loads((whole[0] / "lowering.json").read_text())
    assert set(report) == LOWERING
    assert (report["backend"], report["num_devices"]) == ("cpu", 8)
    assert report["mesh"]["expert"] == 8
    assert report["verdict"] == "expert-parallel"
    assert report["collectives"]
    totals: dict[str, dict[str, int]] = {}
    for each in report["collectives"]:
        assert set(each) == COLLECTIVE
        total = totals.setdefault(each["kind"], {"count": 0, "bytes": 0})
        total["count"] += each["count"]
        total["bytes"] += each["count"] * each["bytes"]
    assert report["totals"] == totals


def test_metrics_jsonl_has_the_contracts_keys_and_the_loss_falls(whole: tuple[Path, Done]) -> None:
    found = records(whole[0])
    assert [record["step"] for record in found] == list(range(STEPS))
    for record in found:
        assert set(record) == METRICS
        assert record["mfu"] is None  # a CPU's peak is not known
        assert record["loss"] == pytest.approx(record["ce_loss"] + record["aux_loss"], rel=1e-6)
        assert 0 <= record["dropped_token_fraction"] < 1
        assert 1 <= record["expert_load_max_over_mean"] <= 8
        seconds = record["step_time_s"]
        assert record["tokens_per_sec_per_device"] == pytest.approx(32 / seconds)
    assert found[0]["loss"] == pytest.approx(5.7, abs=0.3)  # log 320 plus the auxiliary loss
    assert found[-1]["loss"] < found[0]["loss"] - 1


def test_layers_jsonl_agrees_with_metrics_jsonl(whole: tuple[Path, Done]) -> None:
    found = layers(whole[0])
    shown = {*range(0, STEPS, LOG_PERIOD), STEPS - 1}
    logged = [each for each in records(whole[0]) if each["step"] in shown]
    assert len(logged) > 3
    for each, of_step in zip(found, logged, strict=True):
        assert each["step"] == of_step["step"]
        for name in ("grad_norm", "update_norm"):
            whole_norm = math.sqrt(sum(norm**2 for norm in each[name].values()))
            assert whole_norm == pytest.approx(of_step[name], rel=1e-6)
        loads = each["expert_load_max_over_mean"]
        assert max(loads) == pytest.approx(of_step["expert_load_max_over_mean"], rel=1e-6)
        dropped = sum(each["dropped_token_fraction"]) / len(each["layers"])
        assert dropped == pytest.approx(of_step["dropped_token_fraction"], rel=1e-5, abs=1e-9)


def test_kill_ctrl_c_and_restarts_change_no_loss(
    command: Command, whole: tuple[Path, Done]
) -> None:
    arguments = ("mixtral-tiny", *LONG, "run_name=broken")
    run = command.folder / "outputs" / "broken"

    killed = command.signalled(signal.SIGKILL, run, PERIOD + 15, PERIOD, *arguments)
    assert killed.code == -signal.SIGKILL
    assert len(records(run, partial=True)) < STEPS

    stopped = command.signalled(signal.SIGINT, run, 2 * PERIOD + 15, 2 * PERIOD, *arguments)
    assert stopped.code == 75, stopped.err
    assert f"continuing from the checkpoint after step {PERIOD}" in stopped.out
    made = len(records(run))
    assert 2 * PERIOD + 15 < made < STEPS
    assert f"stopped by Ctrl-C after step {made}: a checkpoint was saved" in stopped.out
    assert (run / "checkpoints" / str(made)).is_dir()

    finished = command.run(*arguments)
    assert finished.code == 0, finished.err
    assert f"continuing from the checkpoint after step {made}" in finished.out
    assert [record["step"] for record in records(run)] == list(range(STEPS))
    # Bit for bit: the same program, the same batches, and a checkpoint that keeps every bit.
    assert losses(run) == losses(whole[0])
    assert layers(run) == layers(whole[0])

    before = (run / "metrics.jsonl").read_bytes()
    again = command.run(*arguments)
    assert again.code == 0, again.err
    assert f"already at step {STEPS}" in again.out
    assert (run / "metrics.jsonl").read_bytes() == before


def test_steps_0_reports_on_two_devices_and_makes_no_step(command: Command) -> None:
    done = command.run(
        "mixtral-tiny", *TINY, "steps=0", "num_simulated_devices=2", "ici_expert_parallelism=2",
        XLA_FLAGS=FLAGS,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "simulating 2 devices" in done.out
    assert "verdict: expert-parallel" in done.out
    assert "steps=0" in done.out
    run = command.folder / "outputs" / "mixtral-tiny"
    assert json.loads((run / "lowering.json").read_text())["mesh"]["expert"] == 2
    assert not (run / "metrics.jsonl").exists()
    assert not (run / "checkpoints").exists()


def test_updates_that_ruin_the_weights_are_skipped_and_end_the_run(command: Command) -> None:
    keys = ("optimizer=sgd", "learning_rate=1e38", "steps=20", "checkpoint_period=1")
    done = command.run("mixtral-tiny", *TINY, *keys, "run_name=ruined", XLA_FLAGS=FLAGS)
    assert done.code == 1, done
    assert "step 0 was skipped: the update's norm is inf" in done.out
    what, cause, fix = done.err.splitlines()
    assert what == "3 steps in a row were skipped, the last at step 2: the update's norm is inf"
    assert "loss and gradient are finite" in cause
    assert "sgd at learning_rate=1e+38 overflows" in cause
    assert "a learning_rate below 1e+38" in fix
    run = command.folder / "outputs" / "ruined"
    assert "ruined/bad_step_2.json and .npz" in fix
    assert [record["skipped"] for record in records(run)] == [1, 1, 1]
    assert [record["update_norm"] for record in records(run)] == [None] * 3
    assert not [path for path in (run / "checkpoints").iterdir() if path.name.isdigit()]
    kept = json.loads((run / "bad_step_2.json").read_text())
    assert kept["loss"] == records(run)[2]["loss"]
    assert kept["update_norm"] == "inf"
    layers = kept["gradients_by_layer"]
    total = sum(np.sum(np.square(x)) for x in map(np.asarray, layers.values()))
    assert math.isclose(math.sqrt(total), kept["grad_norm"], rel_tol=1e-4)
    with np.load(run / "bad_step_2.npz") as arrays:
        assert arrays["inputs"].shape == (1, 8, 32)
        assert arrays["inputs"][0, 0, 1:].tolist() == arrays["targets"][0, 0, :-1].tolist()
        for name, by_layer in layers.items():
            assert np.allclose(arrays[f"gradients.{name}"], by_layer)


def test_a_run_is_evaluated_ends_by_itself_and_goes_on_the_same(command: Command) -> None:
    keys = (
        "eval_interval=2", "eval_holdout_fraction=0.05", "eval_steps=2", "learning_rate=0",
        "eval_patience=2", "checkpoint_period=100", "steps=20",
    )  # fmt: skip
    done = command.run("mixtral-tiny", *TINY, *keys, "run_name=judged", XLA_FLAGS=FLAGS)
    assert done.code == 0, done
    assert "ended after step 6: the held-out loss has not fallen below" in done.out
    run = command.folder / "outputs" / "judged"
    judged = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    assert [(each["step"], each["dataset"]) for each in judged] == [
        (2, "held_out"), (4, "held_out"), (6, "held_out"),
    ]  # fmt: skip
    assert len({each["loss"] for each in judged}) == 1  # nothing is learned at rate 0
    assert judged[0]["tokens"] == 2 * 8 * 32
    assert json.loads((run / "best.json").read_text())["checkpoint"] == "checkpoints/2"
    assert (run / "checkpoints" / "2").is_dir()
    assert len(records(run)) == 6
    again = command.run("mixtral-tiny", *TINY, *keys, "run_name=judged", XLA_FLAGS=FLAGS)
    assert again.code == 0, again
    assert "ended after step 6" in again.out
    assert len(records(run)) == 6


def test_a_folder_that_another_process_trains_into_is_refused(command: Command) -> None:
    run = command.folder / "outputs" / "held"
    run.mkdir(parents=True)
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = command.run("mixtral-tiny", *TINY, "run_name=held")
    assert_refused(done, "another process")
    assert [path.name for path in run.iterdir()] == [".lock"]


def test_a_mesh_that_does_not_fit_the_devices_is_refused(command: Command) -> None:
    done = command.run("mixtral-tiny", *TINY, "ici_expert_parallelism=3")
    assert_refused(done, "ici_expert_parallelism=3", "8 devices", "fix: ")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        pytest.param(["mixtral-tiny", "stepz=3"], ["stepz", "did you mean steps?"], id="key"),
        pytest.param(["mixtral-tinny"], ["mixtral-tinny", "mixtral-tiny"], id="model"),
        pytest.param([], ["usage: ", "MODEL"], id="nothing"),
        pytest.param(["chunk.yml"], ["attention_type=chunk", "fix: "], id="maxtext-only"),
        pytest.param(
            ["mixtral-tiny", "enable_wandb=true"],
            ["the package wandb", "fix: pip install 'moe_shard[wandb]'"],
            id="wandb",
        ),
        pytest.param(["mixtral-tiny", "steps=many"], ["steps=many"], id="type"),
        pytest.param(["mixtral-tiny", "run_name=../x"], ["run_name"], id="run-name"),
        pytest.param(["absent.yml"], ["absent.yml"], id="file"),
    ],
)
def test_bad_input_is_answered_in_three_lines(
    command: Command, arguments: list[str], parts: list[str]
) -> None:
    (command.folder / "chunk.yml").write_text("base_emb_dim: 64\nattention_type: chunk\n")
    assert_refused(command.run(*arguments), *parts)
