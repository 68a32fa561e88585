"""Log to wandb: the same numbers and steps as TensorBoard, one id, and no failure ends a run.

The package is optional: a module that records its calls takes its place.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from moe_shard.errors import UserError
from moe_shard.training.metrics import MetricsWriter
from moe_shard.training.wandb_log import WandbLog, require_wandb, wandb_sinks
from tests.models.build import small_config

KEYS = ("enable_wandb=true", "wandb_project_name=p", "run_name=mine")


class Recorded:
    """Stand in for wandb; a run of an id goes on where the last one of that id ended."""

    def __init__(self, fails_in: str = "") -> None:
        self.fails_in = fails_in
        self.inits: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = 0
        self.module = ModuleType("wandb")
        vars(self.module).update(init=self.init, Settings=lambda **each: each)

    def _may_fail(self, where: str) -> None:
        if where == self.fails_in:
            raise RuntimeError(f"{where} failed\nand more")

    def init(self, **arguments: Any) -> SimpleNamespace:
        self._may_fail("init")
        again = any(each["id"] == arguments["id"] for each in self.inits)
        self.inits.append(arguments)
        start = self.logged[-1][0] + 1 if again and self.logged else 0
        return SimpleNamespace(
            starting_step=start, disabled=False, offline=False, url="u", log=self.log,
            finish=self.finish,
        )  # fmt: skip

    def log(self, values: dict[str, float], *, step: int) -> None:
        self._may_fail("log")
        self.logged.append((step, values))

    def finish(self) -> None:
        self._may_fail("finish")
        self.finished += 1


def run(folder: Path, recorded: Recorded, monkeypatch: pytest.MonkeyPatch, first: int) -> list[str]:
    """Run three steps; return what was said."""
    monkeypatch.setitem(sys.modules, "wandb", recorded.module)
    said: list[str] = []
    sinks = wandb_sinks(small_config({"data": 8}, *KEYS), folder, said.append)
    with MetricsWriter(folder, first_step=first, tensorboard=False, sinks=sinks) as writer:
        for step in range(first, first + 3):
            writer.write({"step": step, "loss": 1.0 / (step + 1), "mfu": None})
            writer.write_layers({"step": step, "layers": [0], "router_z": [float(step)]})
        writer.write_evaluation([{"step": first + 3, "dataset": "d", "loss": 0.5}])
    return said


def test_steps_have_what_tensorboard_gets_and_a_restart_goes_on_under_the_same_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = Recorded()
    assert run(tmp_path, recorded, monkeypatch, 0) == ["wandb: u"]
    assert recorded.logged[:2] == [(0, {"loss": 1.0}), (0, {"router_z/layer_00": 0.0})]
    assert recorded.logged[-1] == (2, {"eval_d/loss": 0.5})
    before = len(recorded.logged)
    run(tmp_path, recorded, monkeypatch, 1)  # repeats steps 1 and 2
    assert [step for step, _ in recorded.logged[before:]] == [3, 3, 3]
    first, second = recorded.inits
    assert first["id"] == second["id"] == json.loads((tmp_path / "wandb.json").read_text())["id"]
    assert (first["project"], first["name"], first["resume"]) == ("p", "mine", "allow")
    assert first["config"]["run_name"] == "mine"
    assert first["dir"] == str(tmp_path)
    assert recorded.finished == 2


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_failure_is_said_once_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    said = run(tmp_path, Recorded(where), monkeypatch, 0)
    assert said[-1] == f"wandb: {where} failed; training goes on without it"
    assert len(said) == (1 if where == "init" else 2)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("content", ["", "[]", '{"id": 3}', '{"id": ""}', "\xff"])
def test_a_damaged_id_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    (tmp_path / "wandb.json").write_text(content, encoding="latin-1")
    monkeypatch.setenv("WANDB_RUN_ID", "chosen")
    recorded = Recorded()
    run(tmp_path, recorded, monkeypatch, 0)
    assert recorded.inits[0]["id"] == "chosen"
    assert json.loads((tmp_path / "wandb.json").read_text()) == {"id": "chosen"}


def test_a_disabled_run_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded()
    made = recorded.init

    def disabled(**arguments: Any) -> SimpleNamespace:
        return SimpleNamespace(**vars(made(**arguments)) | {"disabled": True})

    recorded.module.init = disabled  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", recorded.module)
    said: list[str] = []
    WandbLog(small_config({"data": 8}, *KEYS), tmp_path, said.append)
    assert "nothing is logged" in said[0]


def test_without_the_package_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    require_wandb(small_config({"data": 8}))
    with pytest.raises(UserError, match=r"pip install 'moe_shard\[wandb\]'") as caught:
        require_wandb(small_config({"data": 8}, *KEYS))
    assert len(str(caught.value).splitlines()) == 2
    assert wandb_sinks(small_config({"data": 8}), Path("unused"), print) == ()
