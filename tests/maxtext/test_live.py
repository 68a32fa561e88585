"""Watch MaxText's own step with `moe-shard watch`: verdict, exact count, and the reason."""

from __future__ import annotations

import json
import linecache
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.maxtext.oracle import Step
from tests.maxtext.trainer import (
    CASES,
    EXPERT_AXIS,
    LAYERS,
    Case,
    command,
    environment,
    package,
)

pytestmark = pytest.mark.maxtext


class Watched(NamedTuple):
    """Hold a case, the report of `watch` on its step, and the step's text as XLA dumped it."""

    case: Case
    step: dict[str, Any]
    text: str


@pytest.fixture(scope="module", params=CASES)
def watched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    case = CASES[request.param]
    folder = tmp_path_factory.mktemp("maxtext")
    # The user's flags are kept and their dumps are not removed: they serve the oracle's count.
    flags = f"--xla_dump_to={folder}/hlo --xla_dump_hlo_as_text"
    if case.where == "cpu":
        flags += " --xla_force_host_platform_device_count=8"
    ran = subprocess.run(
        [sys.executable, "-m", "moe_shard", "watch", "--json", "--", *command(case, folder)],
        cwd=folder,
        env=environment(flags),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    steps = [
        each for each in json.loads(ran.stdout)["programs"] if each["program"] == "jit_train_step"
    ]
    assert len(steps) == 1, ran.stderr[-4000:]
    return Watched(case, steps[0], (folder / "hlo" / steps[0]["file"]).read_text())


def test_the_verdict_is_right(watched: Watched) -> None:
    assert watched.step["verdict"] == watched.case.verdict


def test_every_collective_is_counted_as_xla_has_it(watched: Watched) -> None:
    counted = {kind: total["count"] for kind, total in watched.step["totals"].items()}
    assert counted == Step(watched.text).counts(LAYERS)
    assert watched.step["warnings"] == []


def test_the_mesh_is_maxtexts_own(watched: Watched) -> None:
    large = {axis: size for axis, size in watched.step["mesh"].items() if size > 1}
    assert large.pop("expert") == EXPERT_AXIS[watched.case.mesh]
    assert large in ({}, {"fsdp": 2})


def test_tokens_are_exchanged_as_often_as_was_read_by_hand(watched: Watched) -> None:
    exchanges = Counter[tuple[str, str]]()
    for each in watched.step["collectives"]:
        if each["role"] == "token-exchange":
            exchanges[each["kind"], each["pass"]] += each["count"]
    forward, backward = watched.case.exchanges
    kind = watched.case.exchanged_by
    expected = {(kind, "forward"): LAYERS * forward, (kind, "backward"): LAYERS * backward}
    assert exchanges == Counter({key: count for key, count in expected.items() if count})


def test_gathered_weights_of_experts_are_named(watched: Watched) -> None:
    gathered = Counter[str]()
    for each in gathers_of_experts(watched.step):
        names = {path.split("'")[-2] for path in each["parameter"]}
        assert len(names) == 1, each
        gathered[names.pop()] += each["count"]
    expected = {name: LAYERS * count for name, count in watched.case.gathered.items()}
    assert gathered == expected


def test_their_line_is_the_one_that_asks_for_them(watched: Watched) -> None:
    for each in gathers_of_experts(watched.step):
        file, _, line = each["source"].rpartition(":")
        assert Path(file) == package() / "layers" / "moe.py"
        weight = {"wi_0": "w0_kernel", "wi_1": "w1_kernel", "wo": "wo_kernel"}
        (name,) = {weight[path.split("'")[-2]] for path in each["parameter"]}
        asking = f"{name} = self.maybe_all_gather_kernel_weight_in_expert_parallelism({name}"
        assert asking in linecache.getline(file, int(line))


def gathers_of_experts(step: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for each in step["collectives"]:
        if each["role"] == "weight-gather" and "expert" in each["axes"]:
            paths = each["parameter"]
            if any("MoeBlock" in path and "gate" not in path for path in paths):
                yield each


def test_nothing_large_is_unknown(watched: Watched) -> None:
    unknown = [each for each in watched.step["collectives"] if each["role"] == "unknown"]
    assert all(each["bytes"] <= 1024 for each in unknown), unknown
