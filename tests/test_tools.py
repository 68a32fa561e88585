"""Start the tools as a person does: exit codes, one JSON object, short errors, no traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "tests" / "lowering" / "fixtures"


def tool(name: str, *arguments: str, stdin: bytes = b"") -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / name), *arguments],
        input=stdin,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"},
        check=False,
        timeout=120,
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_diff_in_words_and_as_json() -> None:
    gathered, moe = str(FIXTURES / "cpu_gathered.txt"), str(FIXTURES / "cpu_moe.txt")
    code, out, err = tool("hlo_diff.py", gathered, moe, "--mesh", "data=1,fsdp=1,expert=8")
    assert (code, err) == (0, "")
    assert "experts forward: -2 all-gather(expert) 131 kB" in out.splitlines()
    assert "verdict: weight-gathered -> expert-parallel" in out.splitlines()
    code, out, err = tool("hlo_diff.py", "-", moe, "--json", stdin=Path(moe).read_bytes())
    assert (code, err) == (0, "")
    assert json.loads(out)["same"] is True


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("a",), "the following arguments are required: B"),
        (("no/such", "-"), "cannot read no/such"),
        (("-", "-"), "both"),
        ((str(FIXTURES), "-"), "holds no HLO"),
    ],
)
def test_diff_bad_usage_is_short(arguments: tuple[str, ...], told: str) -> None:
    code, out, err = tool("hlo_diff.py", *arguments)
    assert (code, out) == (2, "")
    assert told in err
    assert err.startswith("error: ")
    assert len(err.splitlines()) <= 3


def test_explain_strict_json() -> None:
    flag = "moe_dispatch_no_expert_sharding=false"
    code, out, err = tool("explain_sharding.py", "mixtral-tiny", "--strict", flag, "--json")
    assert code == 1
    assert err == "--strict: conflicts: 1, errors in the table: 0\n"
    data = json.loads(out)
    assert data["conflicts"][0]["dim"] == "activation_exp"
    assert data["totals"]["parameters"] == 3_429_504


def test_explain_a_rule_file_in_a_hundred_columns(tmp_path: Path) -> None:
    rules = tmp_path / "theirs.yml"
    rules.write_text(
        "mesh_axes: [replica, model]\nlogical_axis_rules: [[activation_batch, replica], "
        "[activation_batch_moe, [replica, model]], [activation_exp, model], [exp, model], "
        "[activation_batch_no_exp, replica], [heads, [model]]]\n",
        encoding="utf-8",
    )
    code, out, err = tool(
        *("explain_sharding.py", "mixtral-tiny", "--rules", str(rules), "--strict"),
        "ici_model_parallelism=4",
    )
    assert (code, err) == (0, "")
    assert "by theirs.yml on 8 devices: replica 2, model 4" in out
    assert "expert axis (the rule of activation_exp): model" in out
    assert "(only with" in out
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "MODEL"),
        (("mixtral-tinny",), "did you mean mixtral-tiny"),
        (("mixtral-tiny", "ici_expert_paralelism=2"), "ici_expert_parallelism"),
    ],
)
def test_explain_bad_usage_is_short(arguments: tuple[str, ...], told: str) -> None:
    code, out, err = tool("explain_sharding.py", *arguments)
    assert (code, out) == (2, "")
    assert told in err
    assert len(err.splitlines()) <= 3
