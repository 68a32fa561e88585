"""Check what `moe-shard status` reads from a run's folder, a damaged one included."""

from __future__ import annotations

import fcntl
import html.parser
import json
import re
from pathlib import Path
from typing import Any

import pytest

from moe_shard.cli import main
from moe_shard.errors import UserError
from moe_shard.training.run_status import read_status, spark
from moe_shard.training.status_page import render_status


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
    assert "checkpoints after steps 200, 400\n" in out
    assert "set aside as damaged: 300.damaged" in out
    assert re.search(r"loss +6 -> 1\.01 +█.*▁\n", out)
    assert "MFU" not in out  # it is not known


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


class Page(html.parser.HTMLParser):
    """Collect the points of curves, and check that tags are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.curves: list[list[tuple[float, float]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in {"meta", "polyline", "line"}:
            self.open.append(tag)
        if tag == "polyline":
            points = dict(attrs)["points"] or ""
            pairs = [pair.split(",") for pair in points.split()]
            self.curves.append([(float(x), float(y)) for x, y in pairs])

    def handle_endtag(self, tag: str) -> None:
        assert tag in {"polyline", "line"} or self.open.pop() == tag


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
