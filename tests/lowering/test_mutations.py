"""Damaged text: an error for people or a table that is not smaller, never a traceback.

`make test` tries 400 of them. MUTATIONS=4000 in the environment tries as many as it says:

    MUTATIONS=4000 python -m pytest tests/lowering/test_mutations.py
"""

from __future__ import annotations

import os
import random
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from moe_shard.errors import UserError
from moe_shard.lowering.reports import LoweringReport, report_from_text
from moe_shard.lowering.timeline import Rates, timeline
from moe_shard.lowering.work import flops_by_scope, memory_by_scope
from tests.lowering.fixtures_hand_counted import HAND_COUNTED
from tests.lowering.stored_programs import program_files, program_name, program_text
from tests.xla_parser import hlo

MUTATIONS = int(os.environ.get("MUTATIONS", "400"))
BATCHES = 8
RATES = Rates(flops=1e14, memory=1e12, link=1e11)
# Every fixture, and of the programs of other hands the short ones of each compiler.
PROGRAMS = [
    path
    for path in program_files()
    if path.suffix == ".txt" or re.match(r"(cpu_dense|v5e_index|h100_nnx|mi355x_shard)", path.name)
]
# Lines on which much depends: exchanges, calls, and what loops count.
TELLING = re.compile(
    r" (?:all-|reduce-scatter|collective|ragged|async|while|fusion|compare|constant)[a-z-]*\("
)
CONSTANT = re.compile(r" constant\(\d+\)")


@cache
def read(path: Path) -> str:
    return program_text(path)


def report(path: Path, text: str) -> LoweringReport:
    mesh = HAND_COUNTED[path.stem][0] if path.stem in HAND_COUNTED else None
    return report_from_text(text, mesh=mesh)


@cache
def right(path: Path) -> LoweringReport:
    return report(path, read(path))


def delete(lines: list[str], choose: random.Random) -> None:
    at = choose.randrange(len(lines))
    del lines[at : at + choose.choice([1, 1, 2, 20])]


def duplicate(lines: list[str], choose: random.Random) -> None:
    at = choose.randrange(len(lines))
    lines.insert(choose.choice([at, choose.randrange(len(lines))]), lines[at])


def swap(lines: list[str], choose: random.Random) -> None:
    one = choose.randrange(len(lines) - 1)
    other = choose.choice([one + 1, choose.randrange(len(lines))])
    lines[one], lines[other] = lines[other], lines[one]


def cut(lines: list[str], choose: random.Random) -> None:
    at = choose.randrange(len(lines))
    lines[at:] = [lines[at][: choose.randrange(len(lines[at]) + 1)]]


def flip(lines: list[str], choose: random.Random) -> None:
    """Change one character into any other."""
    at = choose.choice([number for number, line in enumerate(lines) if line])
    place = choose.randrange(len(lines[at]))
    noise = choose.choice("{}()[]%,=\"'\\/#:x9a0-_ \t\x00é")
    lines[at] = lines[at][:place] + noise + lines[at][place + 1 :]


def flip_alike(lines: list[str], choose: random.Random) -> None:
    """Change a letter or a digit on an important line into another of its kind."""
    at = choose.choice([n for n, line in enumerate(lines) if TELLING.search(line)] or [0])
    places = [n for n, each in enumerate(lines[at]) if each.isalnum() and each.isascii()]
    place = choose.choice(places)
    alike = "0123456789" if lines[at][place].isdigit() else "abcdefghijklmnopqrstuvwxyz"
    noise = choose.choice(alike.replace(lines[at][place], ""))
    lines[at] = lines[at][:place] + noise + lines[at][place + 1 :]


CHANGES = [delete, duplicate, swap, cut, flip, flip, flip_alike, flip_alike, flip_alike]


def sizes(found: LoweringReport) -> tuple[int, int, int]:
    """Rows, executions and bytes of a table."""
    totals = found.totals.values()
    count, size = (sum(each[key] for each in totals) for key in ("count", "bytes"))
    return len(found.collectives), count, size


@pytest.mark.parametrize("batch", range(BATCHES))
def test_damage_is_an_error_or_no_smaller_table(batch: int) -> None:
    ends = Counter[str]()
    for seed in range(batch, MUTATIONS, BATCHES):
        choose = random.Random(seed)
        path = choose.choice(PROGRAMS)
        change = choose.choice(CHANGES)
        lines = read(path).split("\n")
        change(lines, choose)
        text = "\n".join(lines)
        where = f"seed {seed}: {change.__name__} in {program_name(path)}"
        try:
            found = report(path, text)
            assert found.extraction is not None
            timeline(found.extraction, RATES)
            flops_by_scope(found.extraction.walk)
            memory_by_scope(found.extraction.walk)
        except UserError as error:
            long = len(str(error).splitlines()) > 3
            ends["refused at length" if long else "refused"] += 1
            continue
        smaller = any(a < b for a, b in zip(sizes(found), sizes(right(path)), strict=True))
        if not smaller:
            ends["as large"] += 1
        elif set(found.warnings) > set(right(path).warnings):
            ends["smaller, which is said"] += 1
        else:
            assert is_another_program(read(path), text), where
            ends["another program"] += 1
    assert not ends["refused at length"]
    assert ends["refused"] > ends["as large"] > 0, ends


def is_another_program(text: str, changed: str) -> bool:
    """Return whether a change cannot be detected: another number in a loop or a size.

    XLA's own parser reads it, too, and finds as many collectives in it.
    """
    pairs = zip(text.split("\n"), changed.split("\n"), strict=True)
    (changes,) = [pair for pair in pairs if pair[0] != pair[1]]
    same_but_for_numbers = re.sub(r"\d", "0", changes[0]) == re.sub(r"\d", "0", changes[1])
    return same_but_for_numbers and exchanges(text) == exchanges(changed)


def exchanges(text: str) -> Counter[str]:
    """The opcodes of what goes between devices, as XLA reads them."""
    found = Counter[str]()
    for computation in hlo.hlo_module_from_text(text).computations():
        found.update(str(each.opcode) for each in computation.instructions())
    return Counter({name: n for name, n in found.items() if re.search("All|Collective", name)})
