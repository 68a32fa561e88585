"""Check what `moe-shard status` reads from a run's folder, a damaged one included."""

from __future__ import annotations

import fcntl
import html.parser
import json
import os
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest

from moe_shard.cli import main
from moe_shard.errors import UserError
from moe_shard.training.concerns import concerns
from moe_shard.training.run_status import read_status, spark
from moe_shard.training.status_lines import status_lines
from moe_shard.training.status_page import render_status
from tests.hostile.cases import other_json


def record(step: int, **more: Any) -> dict[str, Any]:
    known = {"step": step, "loss": 6.0 - step / 100, "step_time_s": 2.0, "mfu": None}
    return known | {"grad_norm": 1.5, "learning_rate": 1e-3} | more


def make_run(folder: Path, records: list[dict[str, Any]], **files: str) -> Path:
    folder.mkdir()
    kept = {"config.yml": "steps: 1000\n", "lowering.json": '{"verdict": "expert-parallel"}'}
    lines = "".join(json.dumps(each) + "\n" for each in records)
    for name, text in (kept | {"metrics.jsonl": lines} | files).items():
        (folder / name).write_text(text)
    for name in ("200", "400", "300.damaged"):
        (folder / "checkpoints" / name).mkdir(parents=True)
    return folder


def test_a_glance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", [record(step) for step in range(500)])
    assert main(["status", str(run)]) == 0
    out = capsys.readouterr().out
    assert "not running on this machine: step 500 of 1000, 0:16:40 left at this pace" in out
    assert "its step is expert-parallel" in out
    assert re.search(
        r"checkpoints after steps 200, 400 \(the newest .+, free on its disk .+B\)\n", out
    )
    assert "set aside as damaged: 300.damaged" in out
    assert re.search(r"loss +6 -> 1\.01 +█.*▁\n", out)
    assert "MFU" not in out  # it is not known


LAYER_RECORD = {
    "memory": {"of": "device", "in_use_bytes": 5e9, "peak_bytes": 78.5e9, "limit_bytes": 80e9},
    "grad_norm": {"router": 0.1, "experts": 0.4},
    "param_norm": {"router": 2.0, "experts": 8.0},
    "update_norm": {"router": 0.01, "experts": 0.02},
    "layers": [1, 2, 3],
    "expert_load_max_over_mean": [1.5, 3.25, 2.0],
    "expert_load_min_over_mean": [0.5, 0.25, 0.0],
    "expert_load_entropy": [0.9, 0.8, 0.95],
    "dropped_token_fraction": [0.0, 0.125, 0.01],
    "router_z": [1.0, 2.0, None],
}


def layer_lines(steps: int) -> str:
    return "".join(json.dumps({"step": step} | LAYER_RECORD) + "\n" for step in range(steps))


def evaluation_lines(*losses: float | None) -> str:
    records = [
        {"step": 10 * at, "dataset": name, "loss": loss, "bits_per_byte": loss}
        for at, loss in enumerate(losses, 1)
        for name in ("wiki", "code")
    ]
    return "".join(json.dumps(each) + "\n" for each in records)


def make_old(run: Path) -> None:
    for name in ("metrics.jsonl", "lowering.json"):
        os.utime(run / name, (time.time() - 4000, time.time() - 4000))


def test_layers_norms_evaluations_and_what_to_look_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [record(step, skipped=int(step in (3, 40))) for step in range(50)]
    files = {
        "layers.jsonl": layer_lines(50),
        "eval.jsonl": evaluation_lines(3.0, 2.5, 2.75),
        "bad_step_3.json": "{}",
    }
    run = make_run(tmp_path / "run", records, **files)
    assert "it has not made" not in "\n".join(concerns(read_status(run)))  # just now written
    make_old(run)
    assert main(["status", str(run)]) == 0
    out = capsys.readouterr().out
    for line in (
        "! it has not made all its steps, and no process of this machine is at it",
        "! 2 steps of the last 100 skipped, the last at 40",
        "! steps that ended a start: bad_step_3.json",
        "! an expert has no token at step 49 in layer 3 (1 of 3)",
        "! router_z is not finite in a layer at step 49",
        "! memory of a device: 78.5 GB of 80.0 GB at the peak",
        "held-out loss of code after step 30: 2.75 (2.75 bits/byte), lowest 2.5 after step 20",
        "worst layers at step 49: busiest expert 3.25 x the mean (layer 2), least busy 0 x "
        "(layer 3), evenness 0.8 (layer 2), dropped 12.5% (layer 2), router z 2 (layer 2)",
        "memory of a device: 5.0 GB, at the peak 78.5 GB of 80.0 GB",
    ):
        assert f"{line}\n" in out, line
    assert re.search(r"\nrouter +2 +0\.1 +0\.01 +0\.005\n", out)
    assert main(["status", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["skipped_steps"] == 2
    assert found["last_layers"]["by_layer"]["router_z"] == [1.0, 2.0, None]
    assert [each["dataset"] for each in found["last_evaluations"]] == ["wiki", "code"]
    assert len(found["concerns"]) == 7


def test_a_page_of_layers_and_kinds(tmp_path: Path) -> None:
    files = {"layers.jsonl": layer_lines(1000), "eval.jsonl": evaluation_lines(3.0, None, 2.5)}
    run = make_run(tmp_path / "run", [record(step) for step in range(1000)], **files)
    status = read_status(run)
    assert len(status.layers) == 300
    assert status.layers[-1].step == 999
    text = render_status(status)
    page = Page(text)
    # Three metrics; two datasets twice; memory now and at its peak; norms of two kinds, thrice.
    assert len(page.curves) == 3 + 4 + 2 + 6
    assert text.count('class="heat"') >= 5
    assert "Experts, by layer" in text
    assert "Parameters, by kind" in text
    assert len(text) < 300_000


def test_a_run_that_stands_still(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [record(step) for step in range(50)])
    make_old(run)
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = list(concerns(read_status(run)))
        assert re.fullmatch(r"no step for 1:06:4\d; a step takes 2 s", found[0])
        os.utime(run / "lowering.json")  # it has just been compiled
        assert not [line for line in concerns(read_status(run)) if "no step" in line]


def test_a_full_run_without_anything_to_look_at(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [record(step) for step in range(1000)])
    (run / "checkpoints" / "300.damaged").rmdir()
    assert list(concerns(read_status(run))) == []


def test_speed_that_fell_is_said(tmp_path: Path) -> None:
    records = [record(step, step_time_s=5.0 if step > 960 else 2.0) for step in range(1000)]
    (found,) = [
        line
        for line in concerns(read_status(make_run(tmp_path / "run", records)))
        if line.startswith("steps take")
    ]
    assert found == "steps take 5 s now, and 2 s in the median of the run"


@pytest.mark.parametrize("seed", range(60))
def test_damaged_records_of_layers_end_in_no_traceback(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    lines = [other_json({"step": at} | LAYER_RECORD, rng, rng.randint(1, 4)) for at in range(4)]
    evaluated = [other_json(json.loads(x), rng) for x in evaluation_lines(3.0, 2.0).splitlines()]
    run = make_run(
        tmp_path / "run",
        [record(0)],
        **{
            "layers.jsonl": "".join(json.dumps(each) + "\n" for each in lines),
            "eval.jsonl": "".join(json.dumps(each) + "\n" for each in evaluated),
        },
    )
    status = read_status(run)
    Page(render_status(status))
    assert all(isinstance(line, str) for line in (*concerns(status), *status_lines(status)))
    json.dumps(status.to_json())


def test_one_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", [record(0), record(1)])
    assert main(["status", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["updates"], found["steps"], found["left_s"]) == (2, 1000, 2 * 998)
    assert found["last"]["step"] == 1
    assert (found["running"], found["verdict"]) == (False, "expert-parallel")


def test_a_run_that_goes_on(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [record(0)])
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert read_status(run).running
    assert not read_status(run).running


DRAWN = {"polyline", "line", "path", "rect", "circle"}


class Page(html.parser.HTMLParser):
    """Collect the points of curves, and check that tags are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.curves: list[list[tuple[float, float]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in {"meta", *DRAWN}:
            self.open.append(tag)
        if tag == "polyline":
            points = dict(attrs)["points"] or ""
            pairs = [pair.split(",") for pair in points.split()]
            self.curves.append([(float(x), float(y)) for x, y in pairs])

    def handle_endtag(self, tag: str) -> None:
        assert tag in DRAWN or self.open.pop() == tag


def test_a_page_with_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # One step far above the others, which a mean over parts would hide.
    records = [record(step, loss=50.0 if step == 2500 else 1.0) for step in range(5000)]
    run = make_run(tmp_path / "<b>run", records)
    file = tmp_path / "page.html"
    assert main(["status", str(run), "--html", str(file)]) == 0
    assert f"page: {file}" in capsys.readouterr().out
    text = file.read_text()
    assert "&lt;b&gt;run" in text
    assert "<script" not in text
    assert "http" not in text.replace("http-equiv", "")
    loss, *others = Page(text).curves
    assert len(others) == 2
    assert len(loss) <= 600
    assert [y for _, y in loss].count(min(y for _, y in loss)) == 1  # up is small in SVG
    assert all(0 <= x <= 640 and 0 <= y <= 200 for x, y in loss)


@pytest.mark.parametrize(
    "files",
    [
        {"config.yml": "steps: [", "lowering.json": "{"},
        {"config.yml": "- 1", "lowering.json": "[]", "goodput.json": "{}"},
        {"config.yml": "steps: many", "lowering.json": '{"verdict": 3}', "metrics.jsonl": ""},
    ],
)
def test_what_cannot_be_read_is_left_out(tmp_path: Path, files: dict[str, str]) -> None:
    status = read_status(make_run(tmp_path / "run", [record(0)], **files))
    assert (status.steps, status.left_s, status.verdict) == (None, None, None)
    Page(render_status(status))


def test_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not the folder of a run"):
        main(["status", str(tmp_path)])


def test_a_curve_in_a_line() -> None:
    assert spark([(0, 1.0), (1, 1.0), (2, 8.0), (3, 8.0)], 2) == "▁█"
    assert spark([(0, 3.0)], 10) == "▁"
