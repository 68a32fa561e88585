"""Check that `metrics.jsonl` has each step once, even if the processes writing it were killed."""

from __future__ import annotations

import json
import os
import resource
import struct
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from moe_shard.errors import Finding, UserError
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


def events_of(folder: Path) -> list[Event]:
    """Read TensorBoard's events without the package's code."""
    found = []
    for path in sorted((folder / "tensorboard").iterdir(), key=os.path.getmtime):
        content = path.read_bytes()
        while content:
            size, crc = struct.unpack("<QI", content[:12])
            assert crc == masked_crc32c(content[:8])
            data, (end,) = content[12 : 12 + size], struct.unpack_from("<I", content, 12 + size)
            assert end == masked_crc32c(data)
            found.append(Event.FromString(data))
            content = content[16 + size :]
    return found


def values_of(folder: Path) -> list[tuple[int, str, float]]:
    return [
        (each.step, value.tag, value.simple_value)
        for each in events_of(folder)
        if each.HasField("summary")
        for value in each.summary.value
    ]


def test_tensorboards_own_reader_reads_the_events(tmp_path: Path) -> None:
    write_steps(tmp_path, range(2), loss=0.5, tensorboard=True)
    write_steps(tmp_path, range(1, 3), loss=0.25, tensorboard=True)
    starts = [each.step for each in events_of(tmp_path) if each.HasField("session_log")]
    assert starts == [0, 1]
    assert values_of(tmp_path) == [
        (0, "loss", 0.5), (1, "loss", 0.5), (1, "loss", 0.25), (2, "loss", 0.25),
    ]  # fmt: skip


LAYER_RECORD = {
    "step": 3,
    "memory": {"of": "host", "in_use_bytes": 8},
    "grad_norm": {"router": 0.5, "head": None},
    "layers": [1, 12],
    "router_z": [0.25, 2.0],
    "dropped_token_fraction": [None, 1.0],
}


def test_layers_and_evaluations_are_in_tensorboard(tmp_path: Path) -> None:
    evaluation = {"step": 4, "dataset": "a", "loss": 2.0, "perplexity": None}
    with MetricsWriter(tmp_path, first_step=0, tensorboard=True) as writer:
        writer.write_layers(LAYER_RECORD)
        writer.write_evaluation([evaluation])
    assert values_of(tmp_path) == [
        (3, "memory/in_use_bytes", 8),
        (3, "grad_norm/router", 0.5),
        (3, "router_z/layer_01", 0.25),
        (3, "router_z/layer_12", 2.0),
        (3, "dropped_token_fraction/layer_12", 1.0),
        # After update 4, whose step is number 3: a run that goes on from there keeps it.
        (3, "eval_a/loss", 2.0),
    ]
    assert json.loads((tmp_path / "layers.jsonl").read_text()) == LAYER_RECORD


def write_layers(folder: Path, steps: range) -> None:
    with MetricsWriter(folder, first_step=steps.start, tensorboard=False) as writer:
        for step in steps:
            writer.write_layers(LAYER_RECORD | {"step": step})


def test_records_of_layers_are_repaired_as_those_of_steps(tmp_path: Path) -> None:
    write_layers(tmp_path, range(6))
    path = tmp_path / "layers.jsonl"
    whole = path.read_bytes()
    for cut in (1, 2, 40):
        path.write_bytes(whole[:-cut])
        write_layers(tmp_path, range(3, 6))
        assert path.read_bytes() == whole


def test_layers_that_a_full_disk_lacks_at_the_end_are_a_finding(tmp_path: Path) -> None:
    lacking = r"layers\.jsonl lacks 4 records: File too large"
    with files_of_at_most(200), pytest.raises(Finding, match=lacking):
        write_layers(tmp_path, range(5))
    assert len((tmp_path / "layers.jsonl").read_bytes().splitlines()) == 1


@pytest.mark.parametrize(
    "bad",
    [
        *(b'{"step": 1, "lo\n', b"\xff\xfe\n", b"[1, 2]\n", b'{"loss": 1.0}\n', b"3\n"),
        *(b'{"step": "1"}\n', b"[" * 10_000 + b"\n"),
    ],
)
@pytest.mark.parametrize("place", [0, 2])
def test_lines_that_are_no_records_are_set_aside(tmp_path: Path, bad: bytes, place: int) -> None:
    write_steps(tmp_path, range(4))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = b"".join([*lines[:place], bad, *lines[place:]])
    path.write_bytes(damaged)
    assert [record["step"] for record in read_metrics(path)] == [0, 1, 2, 3]
    said: list[str] = []
    with MetricsWriter(tmp_path, first_step=4, tensorboard=False, say=said.append):
        pass
    assert path.read_bytes() == b"".join(lines)
    assert (tmp_path / "metrics.jsonl.1").read_bytes() == damaged
    assert said == ["metrics.jsonl: 1 lines are no records; the file as it was is metrics.jsonl.1"]


def test_gigabytes_of_zeros_are_read_in_pieces(tmp_path: Path) -> None:
    write_steps(tmp_path, range(4))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    os.truncate(path, 300 << 20)  # as a crash of the machine may leave it
    tracemalloc.start()
    assert [record["step"] for record in read_metrics(path)] == [0, 1, 2, 3]
    said: list[str] = []
    with MetricsWriter(tmp_path, first_step=4, tensorboard=False, say=said.append):
        pass
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
    assert path.read_bytes() == whole
    assert (tmp_path / "metrics.jsonl.1").stat().st_size == 300 << 20
    assert len(said) == 1


def test_a_link_is_written_through(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").symlink_to(elsewhere)
    write_steps(tmp_path / "run", range(4))
    write_steps(tmp_path / "run", range(2, 6))
    assert (tmp_path / "run" / "metrics.jsonl").is_symlink()
    assert [json.loads(line)["step"] for line in elsewhere.read_text().splitlines()] == [*range(6)]


def test_a_file_in_the_place_of_tensorboards_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("mine")
    with pytest.raises(UserError, match="is no folder"):
        write_steps(tmp_path, range(2), tensorboard=True)
    assert (tmp_path / "tensorboard").read_text() == "mine"


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let the system refuse to make a file larger, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("size", range(80, 160, 7))
def test_a_disk_that_is_full_for_a_while_tears_and_loses_nothing(tmp_path: Path, size: int) -> None:
    said: list[str] = []
    with MetricsWriter(tmp_path, first_step=0, tensorboard=True, say=said.append) as writer:
        with files_of_at_most(size):
            for step in range(8):
                writer.write({"step": step, "loss": 1.0, "mfu": None})
                whole = len(steps_of(tmp_path))
                if whole <= step:  # said at once
                    assert said
                assert (tmp_path / "metrics.jsonl").read_bytes().endswith((b"}\n", b""))
            assert whole < 8
        writer.write({"step": 8, "loss": 1.0, "mfu": None})
    assert steps_of(tmp_path) == list(range(9))
    full = [line for line in said if line.startswith("cannot write")]
    assert len(full) == 2  # a file each
    assert all(len(line.splitlines()) == 2 for line in full)
    assert sum("is written again" in line for line in said) == 2


def test_what_is_missing_at_the_end_is_a_finding(tmp_path: Path) -> None:
    with files_of_at_most(100), pytest.raises(Finding, match="lacks 6 records: File too large"):
        write_steps(tmp_path, range(8), loss=1.0)
    assert steps_of(tmp_path) == [0, 1]
