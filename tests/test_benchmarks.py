"""Run the scripts behind docs/results.md at tiny sizes; the package must not need them."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import card, collectives, curve, layer, step, targets
from benchmarks.bars import bars
from benchmarks.markdown import replace_section, table
from moe_shard.cli import main as moe_shard
from moe_shard.config import Config
from moe_shard.errors import UserError
from moe_shard.runtime import compile_target, layer_bench
from moe_shard.runtime.compile_target import TargetReport, compile_for_target
from moe_shard.runtime.targets.target import Target

ROOT = Path(__file__).parents[1]
TINY = (
    "base_num_decoder_layers=1",
    "base_emb_dim=32",
    "base_moe_mlp_dim=64",
    "max_target_length=32",
    "per_device_batch_size=1",
    "optimizer=sgd",
    "remat_policy=none",
)


_programs: dict[bool, TargetReport] = {}


@pytest.fixture(autouse=True)
def _each_program_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile each program once, though two scripts compile the same two."""

    def compile_once(config: Config, target: Target) -> TargetReport:
        assert config.model.moe is not None
        flag = config.model.moe.moe_dispatch_no_expert_sharding
        if flag not in _programs:
            _programs[flag] = compile_for_target(config, target)
        return _programs[flag]

    monkeypatch.setattr(compile_target, "compile_for_target", compile_once)
    monkeypatch.setattr(collectives, "compile_for_target", compile_once)
    monkeypatch.setattr(subprocess, "run", run_here)


_start = subprocess.run


def run_here(command: Sequence[str], **how: Any) -> Any:
    """Run `python -m moe_shard ...` without a new process; return its output and exit code."""
    if list(command[1:3]) != ["-m", "moe_shard"]:
        return _start(command, **how)
    printed, errors, code = io.StringIO(), "", 0
    try:
        with contextlib.redirect_stdout(printed):
            code = moe_shard(command[3:])
    except UserError as error:
        errors, code = f"error: {error}", 2
    return subprocess.CompletedProcess(list(command), code, printed.getvalue(), errors)


def cells(printed: str) -> list[dict[str, str]]:
    """Return the lines of the first Markdown table, by the names of its columns."""
    lines = [line for line in printed.split("\n\n")[0].splitlines() if line.startswith("|")]
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(head, row, strict=True)) for row in rows]


def says_where_it_is_from(printed: str, kind: str, module: str) -> None:
    """Check that kind, hardware, versions, date and command are below the table."""
    below = printed.partition("\n\n")[2]
    assert below.startswith(f"**{kind}**; ")
    assert re.search(r"CPU.*; jax \d+\.\d+\.\d+, .*; 20\d\d-\d\d-\d\d\.$", below, re.M)
    assert f"    python -m {module} " in below


def test_collectives_of_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    collectives.main(["mixtral-tiny", *TINY])
    printed = capsys.readouterr().out
    on, off = cells(printed)
    assert (on["flag"], on["verdict"]) == ("on", "`expert-parallel`")
    # Four exchanges of a layer; slots of 8 experts x 8 sequences x 10 slots x 32 x 4 bytes.
    assert on["all-to-all"] == "4 / 41.0 kB"
    assert on["all-gather"] == on["all-reduce"] == on["reduce-scatter"] == "0"
    assert (off["flag"], off["verdict"], off["all-to-all"]) == ("off", "`weight-gathered`", "0")
    assert int(off["all-gather"].split()[0]) > 0
    says_where_it_is_from(printed, "Compiled, not run", "benchmarks.collectives")
    with pytest.raises(UserError, match="has no MoE layer"):
        collectives.main(["mixtral-tiny", "num_experts=1", "num_experts_per_tok=1"])


def test_layer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    two = layer_bench.variants()[:2]
    monkeypatch.setattr(layer_bench, "variants", lambda: two)
    monkeypatch.chdir(tmp_path)
    layer.main(["--tokens", "8", "--rounds", "1"])
    assert not list(tmp_path.iterdir())
    printed = capsys.readouterr().out
    found = cells(printed)
    assert [(row["routing"], row["strategy"]) for row in found] == [
        (routing, strategy)
        for routing in ("balanced", "skewed")
        for strategy in ("gather", "gather, flag off")
    ]
    assert [row["verdict"] for row in found] == ["`expert-parallel`", "`weight-gathered`"] * 2
    assert found[0]["time S8"] == "1.00"
    assert float(found[1]["sent, x the least"]) > float(found[0]["sent, x the least"]) >= 1
    says_where_it_is_from(printed, "Measured", "benchmarks.layer")
    with pytest.raises(UserError, match="moe-shard bench --json"):
        layer.main(["--json"])


@pytest.mark.survival
def test_curve_of_a_run_that_is_killed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(subprocess, "run", _start)
    model = tmp_path / "tiny.yml"
    sizes = (ROOT / "configs/models/mixtral-tiny.yml").read_text()
    for each in TINY:
        key, _, value = each.partition("=")
        sizes = re.sub(rf"^{key}: .*$", "", sizes, flags=re.M) + f"\n{key}: {value}"
    model.write_text(sizes)
    page, picture = tmp_path / "page.md", tmp_path / "curve.svg"
    page.write_text("<!-- curve -->\n<!-- /curve -->\n")
    arguments = ["--steps", "40", "--kills", "1", "--model", str(model), "--plot", str(picture)]
    arguments += ["--folder", str(tmp_path / "runs"), "--write", str(page)]
    assert curve.main(arguments) == 0
    printed = capsys.readouterr().out
    found = cells(printed)
    assert [row["updates"] for row in found] == [str(2 * (i + 1)) for i in range(20)]
    assert float(found[-1]["bits per byte"]) < float(found[0]["bits per byte"])
    assert "killed 1 times (1 x SIGKILL): 40 records and 20 evaluations" in printed
    assert "bit for bit those of the first" in printed
    assert picture.read_text().count("<polyline") == 2
    assert "![the curve](curve.svg)" in page.read_text()
    # One number that differs is found, without training again.
    file = tmp_path / "runs/outputs/killed/eval.jsonl"
    first, rest = file.read_text().split("\n", 1)
    file.write_text(json.dumps(json.loads(first) | {"loss": 1.0}) + "\n" + rest)
    monkeypatch.setattr(curve, "train", lambda *_: Counter())
    assert curve.main(arguments[:-2]) == 1
    assert "NOT those of the first" in capsys.readouterr().out


def test_targets(capsys: pytest.CaptureFixture[str]) -> None:
    program = f"mixtral-tiny cpu:8 {' '.join(TINY)}"
    targets.main([program, "--flag", "on"])
    printed = capsys.readouterr().out
    (row,) = cells(printed)
    assert row["program"] == f"`{program}`"
    assert (row["verdict"], row["all-to-all"]) == ("`expert-parallel`", "4")
    # At least 7 of 8 parts of the 41.0 kB above are sent; the router's statistics come on top.
    sent, ratio = re.findall(r"[\d.]+", row["MoE on the wire, x the least"])
    assert float(sent) / float(ratio) == pytest.approx(35.8, rel=0.01)
    assert float(row["experts' FLOPs, x the least"].split()[-1]) >= 1
    assert row["memory"] != "-"
    with pytest.raises(UserError, match="mixtral-tniy"):
        targets.main(["mixtral-tniy cpu:8", "--flag", "on"])


def test_step(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page, picture = tmp_path / "results.md", tmp_path / "step.svg"
    page.write_text("# Results\n<!-- step -->\nold\n<!-- /step -->\nmore\n")
    sizes = [*TINY, "capacity_factor=1.0"]
    asked = ["--tokens", "8", "--rounds", "1", "--variants", "gather", "--against"]
    step.main([*sizes, *asked, "--plot", str(picture), "--write", str(page)])
    printed = capsys.readouterr().out
    (row,) = cells(printed)
    assert (row["S"], row["step"], row["time"]) == ("8", "`gather`", "1.00")
    assert (row["verdict"], row["MFU"]) == ("`expert-parallel`", "-")
    assert float(row["FLOPs, x ideal"]) >= 1
    says_where_it_is_from(printed, "Measured", "benchmarks.step")
    start, middle = page.read_text().split("<!-- step -->\n")
    section, end = middle.split("\n<!-- /step -->")
    assert (start, end) == ("# Results\n", "\nmore\n")
    assert section == f"{printed.strip()}\n\n![times of the steps](step.svg)"
    assert "gather, S 8" in picture.read_text()
    with pytest.raises(UserError, match="moe-shard bench --step --json"):
        step.main(["--json"])


def test_a_section_that_is_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("<!-- step -->\n")
    with pytest.raises(UserError, match="has no section step"):
        replace_section(tmp_path / "page.md", "step", "text")
    with pytest.raises(UserError, match="cannot read"):
        replace_section(tmp_path / "none.md", "step", "text")


def test_bars_are_as_long_as_their_values() -> None:
    drawn = bars("a < b", [("x & y", 1.0), ("z", 4.0)])
    widths = re.findall(r'width="([\d.]+)" height="16"', drawn)
    assert float(widths[1]) == pytest.approx(4 * float(widths[0]), rel=1e-3)
    assert "a &lt; b" in drawn
    assert "x &amp; y" in drawn
    assert "nan" not in bars("nothing", [])


def test_card_trains_profiles_and_goes_on_after_a_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(_: card.Bench) -> Any:
        raise UserError("cannot\nfix: none")

    monkeypatch.setattr(card, "PARTS", {"gather": broken, "ragged": card.ragged})
    out = tmp_path / "card.json"
    assert card.main(["--tiny", "--out", str(out)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(out.read_text())
    assert found["parts"]["gather"]["failed"] == "cannot\nfix: none"
    ragged = found["parts"]["ragged"]
    assert ragged["tokens_per_sec_per_device"] > 0
    assert ragged["mfu"] is None  # a CPU has no peak
    assert ragged["kernel_times"]["steps"] == 2
    assert ragged["dropped_token_fraction"] == 0


def test_card_finds_the_largest_batch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tried = []

    def train(_: card.Bench, _work: card.Work, _name: str, *keys: str, **how: Any) -> Any:
        rows = int(keys[0].partition("=")[2])
        tried.append((rows, how.get("steps")))
        if how.get("steps") != 0 and rows > 6:
            raise UserError("out of memory: 90 GB")
        return {"memory_bytes": 20e9 + 7.5e9 * rows}

    monkeypatch.setattr(card.Bench, "train", train)
    monkeypatch.setattr(card, "_device_memory", lambda _: 80e9)
    found = card.mixtral(card.Bench(tmp_path, until=1e18, tiny=False))
    assert (found["rows"], found["did_not_fit"]) == (6, [7])
    assert tried == [(1, 0), (2, 0), (7, None), (6, None)]


def test_a_part_of_card_has_a_limit(tmp_path: Path) -> None:
    late = card.Bench(tmp_path, until=0.0, tiny=True)
    with pytest.raises(UserError, match="no time was left"):
        late.call(["train"], 100)


def test_a_table() -> None:
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_the_package_does_not_import_benchmarks() -> None:
    for path in (ROOT / "moe_shard").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names.append(node.module or "")
            assert not [name for name in names if name.startswith(("benchmarks", "tests"))], path
