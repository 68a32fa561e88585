"""Run every command of docs/maxtext.md unchanged, and compare its output with the page."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.maxtext

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "maxtext.md").read_text(encoding="utf-8")
ANYTHING = "..."


class Example(NamedTuple):
    """Hold commands of the page, and the output that it shows: lines in order, with gaps."""

    commands: str
    printed: list[str]


def examples() -> list[Example]:
    found: list[Example] = []
    for language, body in re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL):
        if language == "sh":
            found.append(Example(body, []))
        else:
            assert language == "text", f"a block of {language!r} is neither run nor compared"
            found[-1].printed.extend(plain(line) for line in body.splitlines() if plain(line))
    return found


def plain(line: str) -> str:
    return " ".join(line.split())


EXAMPLES = examples()


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """Return what each example prints, both streams together."""
    mark = "=== end of example"
    script = "set -e\n" + "".join(f"{each.commands}\necho '{mark}'\n" for each in EXAMPLES)
    inherited = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    ran = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path_factory.mktemp("page"),
        env={
            **inherited,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1800,
        check=False,
    )
    parts = [part.splitlines() for part in ran.stdout.split(mark)]
    assert ran.returncode == 0, f"example {len(parts)}: {ran.stdout[-4000:]}"
    return [[plain(line) for line in part] for part in parts]


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_prints_what_the_page_says(number: int, outputs: list[list[str]]) -> None:
    lines = iter(outputs[number])
    for wanted in EXAMPLES[number].printed:
        pattern = ".*".join(map(re.escape, wanted.split(ANYTHING)))
        if wanted != ANYTHING:
            found = any(re.fullmatch(pattern, line) for line in lines)
            assert found, f"{wanted!r} is not there, or not in this order, in:\n" + "\n".join(
                outputs[number]
            )


def test_the_page_has_commands() -> None:
    assert len(EXAMPLES) >= 8
    assert sum("moe-shard" in each.commands for each in EXAMPLES) >= 7
