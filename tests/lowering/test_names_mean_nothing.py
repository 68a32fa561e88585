"""What a compiler calls its computations and instructions decides nothing."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from moe_shard.lowering.collectives import extract_collectives
from moe_shard.lowering.hlo import parse_module
from tests.lowering.fixtures_hand_counted import HAND_COUNTED, read
from tests.lowering.stored_programs import compiled_files, program_name, program_text

NAME_OR_STRING = re.compile(r'"(?:[^"\\]|\\.)*"|%[\w.\-]+')


def renamed(text: str, seed: int) -> str:
    """Rename every computation and instruction to a name without meaning."""
    names = sorted({found for found in NAME_OR_STRING.findall(text) if found[0] == "%"})
    numbers = random.Random(seed).sample(range(len(names)), len(names))
    table = {name: f"%r{number}" for name, number in zip(names, numbers, strict=True)}
    return NAME_OR_STRING.sub(lambda found: table.get(found[0], found[0]), text)


@pytest.mark.parametrize("path", compiled_files(), ids=program_name)
def test_renaming_everything_changes_no_table(path: Path) -> None:
    text = program_text(path)
    mesh = HAND_COUNTED[program_name(path)][0] if program_name(path) in HAND_COUNTED else None
    expected = extract_collectives(text, mesh)
    found = extract_collectives(renamed(text, seed=7), mesh)
    assert found.collectives == expected.collectives
    assert len(found.warnings) == len(expected.warnings)
    # A short text has no percent signs, hence nothing that was renamed.
    assert found.at.keys() != expected.at.keys() or not expected.at


def test_a_name_that_says_something_else_is_not_believed() -> None:
    """A plain sum whose computation bears the name of TPU's reduce-scatter stays one."""
    text = read("tpu_moe")
    (fused,) = (
        name
        for name, each in parse_module(text).computations.items()
        if "all-reduce" in each.opcodes.values() and name.startswith("all-reduce-scatter")
    )
    whole = text.replace(
        "bf16[1,14336,2048]{2,1,0:T(8,128)(2,1)S(1)} dynamic-slice(%all-reduce.10,",
        "bf16[1,14336,4096]{2,1,0:T(8,128)(2,1)S(1)} dynamic-slice(%all-reduce.10,",
    )
    assert whole != text
    assert fused in whole
    mesh = HAND_COUNTED["tpu_moe"][0]
    was, now = (extract_collectives(each, mesh).collectives for each in (text, whole))
    assert [each.kind for each in was].count("reduce-scatter") == 1
    assert [each.kind for each in now].count("reduce-scatter") == 0
