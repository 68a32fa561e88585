"""Check that `metrics.jsonl` has each step once, even if the processes writing it were killed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_shard.training.metrics import MetricsWriter, read_metrics


def write_steps(folder: Path, steps: range, loss: float = 0.0, tensorboard: bool = False) -> None:
    with MetricsWriter(folder, first_step=steps.start, tensorboard=tensorboard) as writer:
        for step in steps:
            writer.write({"step": step, "loss": loss, "mfu": None})


def steps_of(folder: Path) -> list[int]:
    """Read the steps without the package's code."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def test_one_object_a_line_and_unknown_values_are_null(tmp_path: Path) -> None:
    write_steps(tmp_path, range(2), loss=0.1)
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step": 0, "loss": 0.1, "mfu": null}\n{"step": 1, "loss": 0.1, "mfu": null}\n'
    )


def test_a_record_is_on_disk_before_the_next_step(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, first_step=0, tensorboard=False) as writer:
        writer.write({"step": 0, "loss": 1.0})
        assert steps_of(tmp_path) == [0]


def test_only_one_process_of_a_run_writes(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, first_step=0, tensorboard=True, enabled=False) as writer:
        writer.write({"step": 0, "loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_steps_after_the_checkpoint_are_written_anew(tmp_path: Path) -> None:
    write_steps(tmp_path, range(10), loss=1.0)
    write_steps(tmp_path, range(6, 12), loss=2.0)
    assert steps_of(tmp_path) == list(range(12))
    losses = [record["loss"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert losses == [1.0] * 6 + [2.0] * 6


@pytest.mark.parametrize("cut", [1, 2, 12, 37, 38])
def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path: Path, cut: int) -> None:
    write_steps(tmp_path, range(4))
    path = tmp_path / "metrics.jsonl"
    text = path.read_bytes()
    path.write_bytes(text[:-cut])
    # A line without only its newline is complete.
    whole = 4 if cut == 1 else 3
    assert [record["step"] for record in read_metrics(path)] == list(range(whole))
    write_steps(tmp_path, range(3, 6))
    assert steps_of(tmp_path) == list(range(6))


def test_a_new_run_over_an_old_file_starts_anew(tmp_path: Path) -> None:
    write_steps(tmp_path, range(4))
    write_steps(tmp_path, range(2))
    assert steps_of(tmp_path) == [0, 1]


def test_floats_survive_being_read_and_written_again(tmp_path: Path) -> None:
    value = 0.1 + 0.2
    write_steps(tmp_path, range(2), loss=value)
    write_steps(tmp_path, range(1, 2), loss=1e-310)
    assert [r["loss"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [value, 1e-310]


def test_no_file_is_no_record(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_tensorboard_gets_the_numbers_and_not_the_unknown_ones(tmp_path: Path) -> None:
    write_steps(tmp_path, range(2), tensorboard=True)
    (events,) = (tmp_path / "tensorboard").iterdir()
    text = events.read_bytes()
    assert b"loss" in text
    assert b"mfu" not in text
    write_steps(tmp_path, range(2))
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
