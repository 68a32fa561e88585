"""Check that an estimate adds up: each second of the wire is overlapped or waited for, once."""

from __future__ import annotations

import random
import re
from math import isclose
from pathlib import Path

import pytest

from moe_shard.lowering.collectives import extract_collectives
from moe_shard.lowering.timeline import Rates, Timeline, timeline
from tests.lowering.fixtures_hand_counted import read
from tests.lowering.stored_programs import compiled_files, program_name, program_text

NAME = re.compile(r"%([\w.\-]+)")
STRING = re.compile(r'"(?:[^"\\]|\\.)*"')


def adding_up(text: str, *rates: Rates) -> Timeline:
    """The estimate at the last of these rates; at each of them it adds up."""
    extraction = extract_collectives(text)
    for each in rates:
        found = timeline(extraction, each)
        wire = sum(row.count * each.exchange(row) for row in extraction.collectives)
        assert isclose(found.on_wire, wire, rel_tol=1e-9)
        assert_adds_up(found)
    return found


def assert_adds_up(found: Timeline) -> None:
    """Check the identities of every estimate."""
    assert isclose(found.seconds, found.computing + found.waited, rel_tol=1e-9)
    for each in found.exchanges:
        assert 0 <= each.waited <= each.seconds * (1 + 1e-9)
        assert isclose(sum(each.overlapped.values()) + each.waited, each.seconds, rel_tol=1e-9)
    content = found.to_json()
    stages = content["stages"].values()
    for key in ("wire_s", "exposed_wire_s"):
        assert isclose(sum(each[key] for each in stages), content[key], rel_tol=1e-9, abs_tol=1e-18)
    for each in stages:
        hidden = each["wire_s"] - each["exposed_wire_s"]
        assert isclose(sum(each["beside_s"].values()), hidden, rel_tol=1e-6, abs_tol=1e-18)


@pytest.mark.parametrize("path", compiled_files(), ids=program_name)
def test_the_stages_of_every_program_add_up(path: Path) -> None:
    # Fast links, and links so slow that all work is hidden behind the wire.
    links = (1e12, 1e6)
    rates = [Rates(flops=1e14, memory=1e12, link=link, network=link / 10) for link in links]
    adding_up(program_text(path), *rates)


def shuffled(text: str, seed: int) -> str:
    """The same program in another schedule: any order in which names are defined before use."""
    choose = random.Random(seed)
    blocks = re.split(r"(?<=\n)(?=%|ENTRY )", text)
    return "".join(
        _shuffled_block(block, choose) if block[0] in "%E" else block for block in blocks
    )


def _shuffled_block(block: str, choose: random.Random) -> str:
    head, *lines = block[: block.rindex("\n}")].split("\n")
    names = {NAME.search(line)[1]: line for line in lines}  # type: ignore[index]
    waiting = {
        name: {used for used in NAME.findall(STRING.sub("", line))[1:] if used in names}
        for name, line in names.items()
    }
    order: list[str] = []
    while waiting:
        name = choose.choice([name for name, needs in waiting.items() if needs <= set(order)])
        order.append(name)
        del waiting[name]
    return "\n".join([head, *(names[name] for name in order)]) + block[block.rindex("\n}") :]


@pytest.mark.parametrize("name", ["gpu_moe", "tpu_gathered", "cpu_scan"])
@pytest.mark.parametrize("seed", range(4))
def test_any_schedule_adds_up(name: str, seed: int) -> None:
    text = shuffled(read(name), seed)
    assert text != read(name)
    choose = random.Random(seed)
    rates = Rates(10 ** choose.uniform(12, 15), 1e12, 10 ** choose.uniform(8, 12))
    adding_up(text, rates)


# Seconds are bytes: a copy of f32[16] takes 128 s, an all-gather of f32[16] over 4 devices 48 s.
RATES = Rates(flops=1.0, memory=1.0, link=1.0)
GATHER = (
    "(f32[4]{0}, f32[16]{0}) all-gather-start(%s), channel_id=1, replica_groups={{0,1,2,3}},"
    " dimensions={0}, use_global_device_ids=true"
)


def program(body: str, before: str = "") -> str:
    return f"""HloModule step, is_scheduled=true, num_partitions=4

{before}ENTRY %main (s: f32[4], x: f32[16]) -> f32[16] {{
  %s = f32[4]{{0}} parameter(0)
  %x = f32[16]{{0}} parameter(1)
{body}}}
"""


def start(name: str, stage: str) -> str:
    return f'  %{name} = {GATHER}, metadata={{op_name="jit(f)/{stage}/all_gather"}}\n'


def done(name: str) -> str:
    return f"  %{name}.done = f32[16]{{0}} all-gather-done(%{name})\n"


def copy(name: str, stage: str, size: int = 16) -> str:
    return (
        f"  %{name} = f32[{size}]{{0}} slice(%x), slice={{[0:{size}]}},"
        f' metadata={{op_name="jit(f)/{stage}/mul"}}\n'
    )


def estimate(text: str) -> dict[str, tuple[float, float, dict[str, float]]]:
    found = adding_up(text, RATES)
    return {
        each.collective.scope: (each.seconds, each.waited, each.overlapped)
        for each in found.exchanges
    }


def test_a_wait_for_two_is_charged_to_both() -> None:
    """While waiting for the second of two, nothing overlaps the first."""
    body = start("a", "dispatch") + start("b", "combine") + done("b") + done("a")
    body += "  ROOT %r = f32[16]{0} bitcast(%b.done)\n"
    assert estimate(program(body)) == {"dispatch": (48, 48, {}), "combine": (48, 48, {})}


def test_work_is_beside_what_is_on_the_wire_then() -> None:
    """Of 80 s of work, 48 overlap the first exchange and 32 the one queued behind it."""
    body = start("a", "dispatch") + start("b", "combine") + copy("c", "experts", 10)
    body += done("a") + done("b") + "  ROOT %r = f32[16]{0} bitcast(%b.done)\n"
    assert estimate(program(body)) == {
        "dispatch": (48, 0, {"experts": 48}),
        "combine": (48, 16, {"experts": 32}),
    }


def test_of_branches_that_exchange_nothing_the_longest_counts() -> None:
    branches = "".join(
        f"%branch{size} (p{size}: f32[16]) -> f32[{size}] {{\n"
        f"  %x = f32[16]{{0}} parameter(0)\n{copy('c', 'attention', size)}"
        f"  ROOT %b = f32[{size}]{{0}} bitcast(%c)\n}}\n\n"
        for size in (2, 8, 4)
    )
    body = (
        "  %which = s32[] constant(0)\n"
        "  ROOT %r = f32[16]{0} conditional(%which, %x, %x, %x),"
        " branch_computations={%branch2, %branch8, %branch4}\n"
    )
    found = adding_up(program(body, before=branches), RATES)
    assert found.seconds == 8 * (4 + 4)  # bytes read and written


LOOPS = """%condition (q: (s32[], f32[4], f32[16])) -> pred[] {
  %q = (s32[], f32[4]{0}, f32[16]{0}) parameter(0)
  ROOT %c = pred[] constant(true)
}

%exchanges (p: (s32[], f32[4], f32[16])) -> (s32[], f32[4], f32[16]) {
  %p = (s32[], f32[4]{0}, f32[16]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %s = f32[4]{0} get-tuple-element(%p), index=1
  %x = f32[16]{0} get-tuple-element(%p), index=2
START  %work = f32[1]{0} slice(%x), slice={[0:1]}, metadata={op_name="jit(f)/mlp/mul"}
DONE  ROOT %t = (s32[], f32[4]{0}, f32[16]{0}) tuple(%i, %s, %x)
}

%works (u: (s32[], f32[4], f32[16])) -> (s32[], f32[4], f32[16]) {
  %u = (s32[], f32[4]{0}, f32[16]{0}) parameter(0)
  %k = s32[] get-tuple-element(%u), index=0
  %v = f32[4]{0} get-tuple-element(%u), index=1
  %x = f32[16]{0} get-tuple-element(%u), index=2
  %more = f32[1]{0} slice(%x), slice={[0:1]}, metadata={op_name="jit(f)/attention/mul"}
  ROOT %w = (s32[], f32[4]{0}, f32[16]{0}) tuple(%k, %v, %x)
}

""".replace("START", start("inner", "combine")).replace("DONE", done("inner"))


def loop(name: str, body: str, trips: int) -> str:
    return (
        f"  %{name} = (s32[], f32[4]{{0}}, f32[16]{{0}}) while(%init), condition=%condition,"
        f' body=%{body}, backend_config={{"known_trip_count":{{"n":"{trips}"}}}}\n'
    )


def test_two_loops_beside_one_exchange() -> None:
    """There is one wire, inside loops too: a loop's exchange queues behind the outer one."""
    body = "  %n = s32[] constant(0)\n"
    body += "  %init = (s32[], f32[4]{0}, f32[16]{0}) tuple(%n, %s, %x)\n"
    body += start("outer", "dispatch") + loop("first", "works", 3) + loop("second", "exchanges", 5)
    body += done("outer") + "  ROOT %r = f32[16]{0} bitcast(%outer.done)\n"
    # A slice of one element takes 8 s. The outer exchange overlaps the 3 x 8 s of the first loop
    # and the first 8 s of the second; there the next 16 s are waited for, then the inner one.
    # In the other four trips the inner one overlaps its 8 s and is waited for in the other 40.
    assert estimate(program(body, LOOPS)) == {
        "dispatch": (48, 16, {"attention": 24, "mlp": 8}),
        "combine": (5 * 48, 48 + 4 * 40, {"mlp": 4 * 8}),
    }
    found = timeline(extract_collectives(program(body, LOOPS)), RATES)
    assert found.seconds == 24 + 8 + 16 + 48 + 4 * 48


@pytest.mark.parametrize(
    ("link", "overlapped"), [(1.0, "100% overlapped with experts"), (1e-3, ", 0% overlapped")]
)
def test_what_hides_next_to_nothing_is_not_named(link: float, overlapped: str) -> None:
    body = start("a", "dispatch") + copy("c", "experts", 10) + done("a")
    text = program(body + "  ROOT %r = f32[16]{0} bitcast(%a.done)\n")
    lines = timeline(extract_collectives(text), Rates(1.0, 1.0, link)).lines(tokens=1)
    assert lines[2].endswith(overlapped)


def test_small_stages_are_in_the_lines_too() -> None:
    body = start("a", "dispatch") + done("a") + start("b", "router") + done("b")
    body += "  %big = f32[8000]{0} broadcast(%s), dimensions={}\n"
    body += "  ROOT %r = f32[16]{0} bitcast(%a.done)\n"
    *_, last = timeline(extract_collectives(program(body)), RATES).lines(tokens=1)
    assert last == "  other stages: 96 s on the wire, 0% overlapped"
