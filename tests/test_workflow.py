"""Check public CI's workflow: its Makefile targets exist, and it tests oldest and newest jax."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))


def jobs() -> dict[str, dict[str, Any]]:
    loaded: dict[str, dict[str, Any]] = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    return loaded


def commands() -> list[str]:
    """Return every `run` of the workflow, with each value of its matrix filled in."""
    found = []
    for job in jobs().values():
        matrix = job.get("strategy", {}).get("matrix", {})
        cells = matrix.get("include") or [
            {key: value} for key, values in matrix.items() for value in values
        ]
        for step in job["steps"]:
            for cell in cells or [{}]:
                fill = {f"${{{{ matrix.{key} }}}}": str(value) for key, value in cell.items()}
                text = step.get("run", "")
                for name, value in fill.items():
                    text = text.replace(name, value)
                found += [text] if text else []
    return found


def test_every_step_calls_a_make_target_that_exists() -> None:
    called = set()
    for command in commands():
        assert "${{" not in command, command
        make, target, *_ = command.split()
        assert make == "make"
        assert target in TARGETS, command
        called.add(target)
    assert {"lint", "test", "demo", "test-wheel", "test-maxtext"} <= called


def test_the_oldest_and_the_newest_jax_are_tested() -> None:
    cells = jobs()["test"]["strategy"]["matrix"]["include"]
    found = {(cell["python"], cell["jax"], cell["pins"]) for cell in cells}
    assert found == {
        ("3.11", "oldest", "-c constraints.txt"),
        ("3.12", "newest", ""),
        ("3.13", "newest", ""),
    }
    # The pins are the oldest jax that the package declares.
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name in ("jax", "jaxlib", "flax"):
        assert f"{name}>={pins[name]}" in project["dependencies"]
    tested = {f"Programming Language :: Python :: {cell['python']}" for cell in cells}
    assert tested == {each for each in project["classifiers"] if re.search(r":: 3\.\d", each)}
