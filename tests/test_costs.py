"""Make each change of CONTRIBUTING's table "what a change costs" in a copy of the package.

The copy is edited in exactly the files that the table names, and then used by a process that can
import nothing else.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
USE = """
import json
from pathlib import Path
from moe_shard.autoep.family import choose_family
from moe_shard.config import load_config
from moe_shard.config.hardware import find_hardware
from moe_shard.runtime.targets.target import parse_target

config = load_config("mixtral-tiny", ["data_repeats=5"])
told = {"model_type": "sparrow", "architectures": ["SparrowForCausalLM"]}
family = choose_family(told, Path("dir"))
print(json.dumps({
    "key": [load_config("mixtral-tiny").data.data_repeats, config.data.data_repeats],
    "rules": [list(axes) for name, axes in config.mesh.logical_axis_rules if name == "beam"],
    "hardware": [parse_target("x1:8").hardware.name, find_hardware("Chip X1").hbm_bytes],
    "family": family.model_type,
}))
"""


def replace_once(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{path.name}: {text.count(old)} of {old!r}"
    path.write_text(text.replace(old, new), encoding="utf-8")


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what a copy with an added key, rule, hardware and family makes of them."""
    copy = tmp_path_factory.mktemp("copy")
    for name in ("moe_shard", "configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    base = copy / "configs" / "base.yml"
    # A configuration key: a line of base.yml, an attribute of a dataclass.
    line = "dataset_path: []  # paths of text files"
    replace_once(base, line, f"data_repeats: 1  # times; a corpus is read\n{line}")
    schema = copy / "moe_shard" / "config" / "data_config.py"
    attribute = "    dataset_path: Annotated"
    key = "    data_repeats: Annotated[int, Key(least=1)] = 1\n"
    replace_once(schema, attribute, f"{key}{attribute}")
    # A rule: a line of base.yml.
    replace_once(
        base, "  - [norm, []]", "  - [beam, [context, tensor]]  # a new dim\n  - [norm, []]"
    )
    # Hardware: a file.
    h100 = (copy / "configs" / "hardware" / "h100.yml").read_text(encoding="utf-8")
    x1 = h100.replace("NVIDIA H100 80GB HBM3]", "Chip X1]").replace("NVIDIA H100 SXM\n", "X1\n")
    (copy / "configs" / "hardware" / "x1.yml").write_text(x1, encoding="utf-8")
    # A family: a file.
    family = "model_type: sparrow\narchitectures: SparrowForCausalLM\nbased_on: mixtral\n"
    (copy / "configs" / "families" / "sparrow.yml").write_text(family, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", USE],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_configuration_key(used: dict[str, Any]) -> None:
    assert used["key"] == [1, 5]


def test_a_rule(used: dict[str, Any]) -> None:
    assert used["rules"] == [["context", "tensor"]]


def test_hardware(used: dict[str, Any]) -> None:
    assert used["hardware"] == ["X1", 85899345920]


def test_a_family(used: dict[str, Any]) -> None:
    assert used["family"] == ["sparrow"]
