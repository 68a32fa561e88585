"""Spellings that no small program here gives, written by hand; loops; damaged text."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_shard.errors import UserError
from moe_shard.lowering.collectives import Collective, extract_collectives
from moe_shard.lowering.expect import assert_collectives
from moe_shard.lowering.hlo import HloParseError
from moe_shard.lowering.shapes import shape_bytes, tuple_elements
from moe_shard.scopes import FURTHER_ROUNDS
from tests.lowering.fixtures_hand_counted import HAND_COUNTED, read

HEADER = "HloModule jit_f, is_scheduled=true, num_partitions=8\n\n"
SUM = """%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

"""
REDUCE = (
    "all-reduce(%x), channel_id=1, replica_groups={}, use_global_device_ids=true, to_apply=%sum"
)


def collectives(text: str, **mesh: int) -> tuple[Collective, ...]:
    return extract_collectives(HEADER + text, mesh or None).collectives


def entry(body: str) -> str:
    return f"ENTRY %main (x: f32[16]) -> f32[16] {{\n  %x = f32[16]{{0}} parameter(0)\n{body}}}\n"


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[]", 4),
        ("bf16[8,128]{1,0:T(8,128)(2,1)S(1)}", 2048),
        ("pred[3]{0}", 3),
        ("s4[7]{0:E(4)}", 4),
        ("f8e4m3fn[10]", 10),
        ("f8e5m2fnuz[10]", 10),
        ("f4e2m1fn[8]", 4),
        ("c64[2]", 16),
        ("u64[0]", 0),
        ("f32[<=8,2]", 64),
        ("token[]", 0),
        ("()", 0),
        ("(f32[2]{0}, (s8[3]{0}, bf16[]), /*index=2*/u32[])", 8 + 3 + 2 + 4),
    ],
)
def test_shape_bytes(shape: str, size: int) -> None:
    assert shape_bytes(shape) == size


def test_strange_shapes_are_refused() -> None:
    for shape in ("q7[2]", "nothing"):
        with pytest.raises(UserError):
            shape_bytes(shape)


def test_tuple_elements() -> None:
    assert tuple_elements("f32[2,3]{1,0}") == ["f32[2,3]{1,0}"]
    shape = "((f32[2,3]{1,0:T(8,128)}, s8[]), bf16[4]{0}, /*index=2*/u32[]{:S(2)})"
    inner = "(f32[2,3]{1,0:T(8,128)}, s8[])"
    assert tuple_elements(shape) == [inner, "bf16[4]{0}", "u32[]{:S(2)}"]
    assert tuple_elements(inner) == ["f32[2,3]{1,0:T(8,128)}", "s8[]"]


def test_async_start_that_wraps_a_computation() -> None:
    # GPU, as XLA wrote it before it had all-to-all-start.
    text = """%wrapped (p: f32[16]) -> f32[16] {
  %p = f32[16]{0} parameter(0)
  ROOT %all-to-all.1 = f32[16]{0} all-to-all(%p), channel_id=1, replica_groups=[2,4]<=[8]
}

""" + entry(
        "  %start = ((f32[16]{0}), f32[16]{0}) async-start(%x), calls=%wrapped,"
        ' metadata={op_name="jit(f)/dispatch/all_to_all" source_file="f.py" source_line=7}\n'
        "  ROOT %done = f32[16]{0} async-done(%start), calls=%wrapped\n"
    )
    (found,) = collectives(text, data=2, expert=4)
    assert (found.kind, found.count, found.bytes, found.is_async) == ("all-to-all", 1, 64, True)
    assert (found.axes, found.scope, found.source) == (("expert",), "dispatch", "f.py:7")
    assert found.wire_bytes == 48


@pytest.mark.parametrize(
    ("line", "kind", "size"),
    [
        ("(f32[2]{0}, f32[16]{0}) all-gather-start(%x), dimensions={0}", "all-gather", 64),
        ("((f32[16]{0}), f32[2]{0}) reduce-scatter-start(%x), to_apply=%sum", "reduce-scatter", 8),
        ("(f32[16]{0}, f32[8]{0}) all-reduce-start(%x, %x), to_apply=%sum", "all-reduce", 96),
        ("((f32[4]{0}, s8[2]{0}), (f32[8]{0}, s8[4]{0})) all-gather-start(%x)", "all-gather", 36),
        ("f32[16]{0} collective-broadcast(%x)", "collective-broadcast", 64),
        ("f32[32]{0} ragged-all-to-all(%x, %x)", "ragged-all-to-all", 128),
    ],
)
def test_bytes_are_those_of_the_output(line: str, kind: str, size: int) -> None:
    body = f"  %c = {line}, channel_id=1, replica_groups=[1,8]<=[8], use_global_device_ids=true\n"
    (found,) = collectives(SUM + entry(body + "  ROOT %r = f32[16]{0} copy(%x)\n"))
    assert (found.kind, found.bytes, found.group_size) == (kind, size, 8)


def test_cross_replica_groups_hold_all_partitions() -> None:
    body = f"  ROOT %r = f32[16]{{0}} {REDUCE}\n".replace(", use_global_device_ids=true", "")
    (found,) = collectives(SUM + entry(body.replace("={}", "={{0}}")), data=2, expert=4)
    assert found.axes == ("data", "expert")


def test_only_what_the_entry_reaches_is_counted() -> None:
    unused = entry(f"  ROOT %r = f32[16]{{0}} {REDUCE}\n").replace("ENTRY %main", "%unused")
    assert collectives(SUM + unused + entry("  ROOT %c = f32[16]{0} copy(%x)\n")) == ()


def test_shard_map_collectives_of_one_channel_are_all_counted() -> None:
    body = f"  %r = f32[16]{{0}} {REDUCE}\n  ROOT %s = f32[16]{{0}} {REDUCE.replace('%x', '%r')}\n"
    assert sum(each.count for each in collectives(SUM + entry(body))) == 2


def loop(
    start: str = "0", bound: str = "12", step: str = "1", direction: str = "LT", by: str = "add"
) -> str:
    """A loop with one all-reduce, its bound in the condition, as TPU writes it."""
    return f"""{SUM}%body (p: (s32[], f32[16])) -> (s32[], f32[16]) {{
  %p = (s32[], f32[16]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %step = s32[] constant({step})
  %next = s32[] {by}(%i, %step)
  %x = f32[16]{{0}} get-tuple-element(%p), index=1
  %r = f32[16]{{0}} {REDUCE}
  ROOT %t = (s32[], f32[16]{{0}}) tuple(%next, %r)
}}

%condition (q: (s32[], f32[16])) -> pred[] {{
  %q = (s32[], f32[16]{{0}}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %bound = s32[] constant({bound})
  ROOT %less = pred[] compare(%j, %bound), direction={direction}
}}

""" + entry(f"""  %start = s32[] constant({start})
  %copied = s32[] copy(%start)
  %init = (s32[], f32[16]{{0}}) tuple(%copied, %x)
  %while = (s32[], f32[16]{{0}}) while(%init), condition=%condition, body=%body
  ROOT %out = f32[16]{{0}} get-tuple-element(%while), index=1
""")


@pytest.mark.parametrize(
    ("text", "trips"),
    [
        (loop(), 12),
        (loop(start="2", step="2"), 5),
        (loop(step="5"), 3),
        (loop(direction="LE"), 13),
        (loop(start="12", bound="0", step="-1", direction="GT"), 12),
        (loop(start="12", bound="0", step="1", direction="GE", by="subtract"), 13),
        (loop(step="3", direction="NE"), 4),
        (
            loop().replace(
                "compare(%j, %bound), direction=LT", "compare(%bound, %j), direction=GT"
            ),
            12,
        ),
        (
            loop().replace(
                "body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}'
            ),
            7,
        ),
    ],
)
def test_trip_counts(text: str, trips: int) -> None:
    extraction = extract_collectives(HEADER + text)
    assert [each.count for each in extraction.collectives] == [trips]
    assert extraction.warnings == ()


COUNTED = (
    'body=%body, backend_config={"known_induction_variable":{"tuple_index":"0"},'
    '"known_trip_count":{"n":"7"}}'
)


def test_a_stated_trip_count_that_the_loop_contradicts_is_said() -> None:
    """Where the compiler has found what counts, it can be counted here, and must agree."""
    extraction = extract_collectives(HEADER + loop().replace("body=%body", COUNTED))
    assert [each.count for each in extraction.collectives] == [12]
    (warning,) = extraction.warnings
    assert "%while (HLO line" in warning
    assert "known_trip_count 7" in warning
    assert "condition and step give 12" in warning
    agreed = extract_collectives(HEADER + loop(bound="7").replace("body=%body", COUNTED))
    assert ([each.count for each in agreed.collectives], agreed.warnings) == ([7], ())


@pytest.mark.parametrize(
    ("was", "now", "message"),
    [
        ("%step = s32[] constant(1)", "%step = s32[] constamt(1)", "unknown opcode in what a loop"),
        ("pred[] compare(", "pred[] compase(", "unknown opcode in the condition of a loop"),
        ("direction=LT", "direction=LX", "a comparison without a direction"),
        ("%q = (s32[], f32[16]{0}) parameter(0)", "%q = (s32[], f32[16]{0}) parameter(1)", "lacks"),
        ("while(%init)", "while(%init, %x)", r"passes 2 operands to %\w+, which takes 1"),
    ],
)
def test_a_damaged_loop_is_refused(was: str, now: str, message: str) -> None:
    text = loop()
    assert text.count(was) == 1
    with pytest.raises(HloParseError, match=message):
        collectives(text.replace(was, now))


def test_sizes_that_do_not_fit_are_said() -> None:
    assert extract_collectives(GOOD).warnings == ()
    text = GOOD.replace("%r = f32[16]", "%r = f32[13]")
    assert extract_collectives(text).warnings == (
        "HLO line 11: the sizes of the operands and the result of %r do not match; the text may be"
        " damaged",
    )


def test_a_loop_that_never_runs_has_no_collective() -> None:
    assert collectives(loop(start="20")) == ()


@pytest.mark.parametrize(
    "text",
    [
        loop(by="multiply"),
        loop(step="0"),
        loop(step="5", direction="NE"),
        loop(direction="EQ"),
        loop().replace("%start = s32[] constant(0)", "%start = s32[] parameter(1)"),
    ],
)
def test_a_trip_count_that_cannot_be_told_is_said(text: str) -> None:
    extraction = extract_collectives(HEADER + text)
    assert [each.count for each in extraction.collectives] == [1]
    assert len(extraction.warnings) == 1
    assert "%while" in extraction.warnings[0]


UNKNOWN = loop().replace("%start = s32[] constant(0)", "%start = s32[] parameter(1)")
AROUND = f"jit(f)/{FURTHER_ROUNDS}/while"


def named_loop(op_name: str) -> str:
    return UNKNOWN.replace("body=%body", f'body=%body, metadata={{op_name="{op_name}"}}')


@pytest.mark.parametrize(
    ("op_name", "passed_over"),
    [
        (AROUND, True),
        (f"jit(f)/other/while;{AROUND}", True),
        (f"{FURTHER_ROUNDS}/while", True),
        # A scope of anybody's: whatever it is called, its collectives are counted.
        ("jit(f)/overflow/while", False),
        ("jit(f)/moe/overflow/while/body/while", False),
        (f"jit(f)/my{FURTHER_ROUNDS}/while", False),
        (f"jit(f)/{FURTHER_ROUNDS}2/while", False),
        # Not the loop's own scope, but one around it.
        (f"{AROUND}/body/while", False),
        (f"jit(f)/{FURTHER_ROUNDS}/inner/while", False),
    ],
)
def test_only_the_private_scope_of_a_loop_passes_it_over(op_name: str, passed_over: bool) -> None:
    text = HEADER + named_loop(op_name)
    extraction = extract_collectives(text)
    assert [each.count for each in extraction.collectives] == ([] if passed_over else [1])
    warning, *held = extraction.warnings
    assert warning.startswith("not counted: 1 loops" if passed_over else "the trip count of loop")
    shown = ["the loops of further rounds contain 1 all-reduce; list them with --further-rounds"]
    assert held == (shown if passed_over else [])
    asked = extract_collectives(text, count_further_rounds=True)
    assert [each.count for each in asked.collectives] == [1]
    assert asked.warnings[0].startswith("counted once" if passed_over else "the trip count of loop")


def test_a_loop_of_known_trips_is_counted_whatever_its_scope() -> None:
    text = loop().replace("body=%body", f'body=%body, metadata={{op_name="{AROUND}"}}')
    extraction = extract_collectives(HEADER + text)
    assert ([each.count for each in extraction.collectives], extraction.warnings) == ([12], ())


def test_a_bound_that_the_loop_only_passes_on() -> None:
    text = loop()
    for old, new in [
        ("(s32[], f32[16]", "(s32[], s32[], f32[16]"),
        ("index=1", "index=2"),
        ("tuple(%next, %r)", "tuple(%next, %kept, %r)"),
        ("  %next =", "  %kept = s32[] get-tuple-element(%p), index=1\n  %next ="),
        ("%bound = s32[] constant(12)", "%bound = s32[] get-tuple-element(%q), index=1"),
        ("tuple(%copied, %x)", "tuple(%copied, %limit, %x)"),
        ("  %init", "  %limit = s32[] constant(9)\n  %init"),
    ]:
        text = text.replace(old, new)
    assert [each.count for each in collectives(text)] == [9]


def test_groups_that_match_no_axes_are_shown_with_a_warning() -> None:
    body = f"  ROOT %r = f32[16]{{0}} {REDUCE}\n".replace("={}", "={{0,1},{2,3},{4,5},{6,7}}")
    extraction = extract_collectives(HEADER + SUM + entry(body), {"data": 2, "expert": 4})
    assert extraction.collectives[0].axes == ("?",)
    assert len(extraction.warnings) == 1


def test_branches_and_sends_are_said() -> None:
    branch = entry(f"  ROOT %r = f32[16]{{0}} {REDUCE}\n").replace("ENTRY %main", "%branch")
    body = (
        "  %which = s32[] constant(0)\n  %token = token[] after-all()\n"
        "  %send = (f32[16]{0}, u32[], token[]) send(%x, %token), channel_id=2\n"
        "  ROOT %c = f32[16]{0} conditional(%which, %x, %x),"
        " branch_computations={%branch, %branch}\n"
    )
    extraction = extract_collectives(HEADER + SUM + branch + entry(body))
    assert [each.count for each in extraction.collectives] == [2]
    assert len(extraction.warnings) == 2
    assert "every branch" in extraction.warnings[0]
    assert "1 point-to-point sends" in extraction.warnings[1]


def test_an_assertion_that_fails_says_what_could_not_be_told() -> None:
    text = HEADER + UNKNOWN
    (warning,) = extract_collectives(text).warnings
    with pytest.raises(AssertionError) as raised:
        assert_collectives(text, all_reduce=12)
    assert warning in str(raised.value).splitlines()


def test_what_is_not_listed_is_said() -> None:
    body = (
        "  %token = token[] after-all()\n"
        "  %to = (f32[16]{0}, u32[], token[]) send(%x, %token), channel_id=2,"
        " is_host_transfer=true\n"
        "  %sent = token[] send-done(%to), channel_id=2, is_host_transfer=true\n"
        "  %from = (f32[16]{0}, u32[], token[]) recv(%sent), channel_id=3\n"
        '  ROOT %k = f32[16]{0} custom-call(%x), custom_call_target="tpu_custom_call",'
        ' backend_config={"custom_call_config": {"body": "", "has_communication": true}}\n'
    )
    assert extract_collectives(HEADER + entry(body)).warnings == (
        "1 transfers to the host are not listed",
        "1 kernels exchange data between devices, which is not listed",
    )


def test_collectives_that_nothing_calls_are_said() -> None:
    unused = entry(f"  ROOT %r = f32[16]{{0}} {REDUCE}\n").replace("ENTRY %main", "%unused")
    text = HEADER + SUM + unused + entry("  ROOT %c = f32[16]{0} copy(%x)\n")
    assert extract_collectives(text).warnings == (
        "not counted: the collectives of %unused, which nothing calls",
    )


@pytest.mark.parametrize(
    "line",
    [
        "f32[16]{0} all-gather-v2(%x), replica_groups={{0,1}}, dimensions={0}",
        "f32[16]{0} nccl-all-to-all(%x), channel_id=4",
        "f32[16]{0} permute(%x), source_target_pairs={{0,1}}",
        "f32[16]{0} all-reduce-starts(%x), replica_groups=[1,8]<=[8]",
    ],
)
def test_an_unknown_opcode_between_devices_is_refused(line: str) -> None:
    opcode = line.split()[1].split("(")[0]
    text = HEADER + entry(f"  ROOT %r = {line}\n")
    with pytest.raises(HloParseError) as raised:
        extract_collectives(text)
    assert f"HLO line 5: unknown opcode {opcode!r} that names devices" in str(raised.value)
    # In a string the words name nothing.
    quoted = line.split(", ")[0] + ', metadata={op_name="replica_groups={} channel_id=1"}'
    assert extract_collectives(HEADER + entry(f"  ROOT %r = {quoted}\n")).collectives == ()


def test_a_computation_that_calls_itself_is_refused() -> None:
    text = entry("  ROOT %r = f32[16]{0} call(%x), to_apply=%main\n")
    with pytest.raises(HloParseError, match="calls itself"):
        collectives(text)


def test_a_thousand_calls_deep() -> None:
    """Also where nothing calls the outermost; no end of the interpreter's stack is reached."""
    reduced = entry(f"  ROOT %r = f32[16]{{0}} {REDUCE}\n").replace("ENTRY %main", "%c0")
    chain = [reduced]
    for depth in range(1, 1500):
        called = f"  ROOT %r = f32[16]{{0}} call(%x), to_apply=%c{depth - 1}\n"
        chain.append(entry(called).replace("ENTRY %main", f"%c{depth}"))
    for last in ("call(%x), to_apply=%c1499", "copy(%x)"):
        text = SUM + "".join(chain) + entry(f"  ROOT %r = f32[16]{{0}} {last}\n")
        assert len(collectives(text)) == ("call" in last)


GOOD = HEADER + SUM + entry(f"  ROOT %r = f32[16]{{0}} {REDUCE}\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("\n\n", "empty"),
        ("print('hello')\n", "line 1.*must begin with 'HloModule'"),
        ("\x00\x01\x02" * 40, "must begin"),
        (GOOD[:-3], "cut off|not an instruction"),
        (HEADER, "0 ENTRY"),
        (GOOD + GOOD, "unexpected between"),
        (GOOD.replace("ROOT %r", "%r"), "has no root"),
        (GOOD.replace("%x = f32", "%y = f32"), "%x is used but not defined"),
        (GOOD.replace("replica_groups={}", "replica_groups=all"), r"line \d+: unknown notation"),
        (GOOD.replace("replica_groups={}", "replica_groups={{0,8}}"), "do not fit 8 devices"),
        (GOOD.replace("replica_groups={}", "replica_grpups={}"), "without replica_groups"),
        (GOOD.replace("all-reduce(%x)", "all-reduce((%x)"), "brackets"),
        (GOOD.replace("  %a = f32[] parameter(0)", "  what is this"), "line 4: not an instruction"),
    ],
)
def test_bad_text_is_one_clear_error(text: str, message: str) -> None:
    with pytest.raises(HloParseError, match=message) as error:
        extract_collectives(text)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_a_percent_sign_in_a_string_is_no_name() -> None:
    text = GOOD.replace("to_apply=%sum", 'to_apply=%sum, metadata={op_name="jit(f)/%weird"}')
    assert len(extract_collectives(text).collectives) == 1


def test_a_missing_stack_frame_is_damage_but_missing_tables_are_not() -> None:
    text = read("cpu_three_axes")
    frames = text[text.index("StackFrames") : text.index("%", text.index("StackFrames"))]
    found = extract_collectives(text.replace(frames, "")).collectives
    assert {each.source for each in found} == {None}
    with pytest.raises(HloParseError, match="StackFrames"):
        extract_collectives(text.replace(frames, "\n".join(frames.split("\n")[:2]) + "\n\n"))


# Damage: either an error or the same right answer, and never another exception.
NAMES = ["cpu_three_axes", "cpu_scan", "tpu_gathered"]
LINES = {name: read(name).split("\n") for name in NAMES}
RIGHT = {name: extract_collectives(read(name), HAND_COUNTED[name][0]).collectives for name in NAMES}
fuzz = settings(max_examples=60, suppress_health_check=list(HealthCheck))


def same_or_error(name: str, text: str) -> None:
    try:
        found = extract_collectives(text, HAND_COUNTED[name][0]).collectives
    except UserError:
        return
    key = [(e.kind, e.axes, e.scope, e.count, e.bytes, e.source) for e in found]
    assert key == [(e.kind, e.axes, e.scope, e.count, e.bytes, e.source) for e in RIGHT[name]]


names = st.sampled_from(NAMES)


@fuzz
@given(names, st.floats(0, 1))
def test_truncated(name: str, fraction: float) -> None:
    text = read(name)
    same_or_error(name, text[: int(len(text) * fraction)])


@fuzz
@given(names, st.lists(st.floats(0, 0.999), min_size=1, max_size=3))
def test_lines_lost(name: str, places: list[float]) -> None:
    lost = {int(place * len(LINES[name])) for place in places}
    kept = [line for number, line in enumerate(LINES[name]) if number not in lost]
    same_or_error(name, "\n".join(kept))


def test_each_line_lost_in_turn() -> None:
    lines = LINES["cpu_three_axes"]
    for number in range(len(lines)):
        same_or_error("cpu_three_axes", "\n".join(lines[:number] + lines[number + 1 :]))


@fuzz
@given(names, names, st.randoms(use_true_random=False))
def test_interleaved(first: str, second: str, random: object) -> None:
    choose = random.random  # type: ignore[attr-defined]
    left, right = list(LINES[first]), list(LINES[second])
    mixed = []
    while left and right:
        mixed.append((left if choose() < 0.5 else right).pop(0))
    with pytest.raises(UserError):
        extract_collectives("\n".join(mixed + left + right))


@fuzz
@given(names, st.floats(0, 1), st.binary(min_size=1, max_size=40))
def test_bytes_inserted(name: str, fraction: float, noise: bytes) -> None:
    lines = list(LINES[name])
    lines.insert(int(fraction * len(lines)), "\x01" + noise.decode("latin-1"))
    same_or_error(name, "\n".join(lines))


@fuzz
@given(st.binary(max_size=2000))
def test_random_bytes(data: bytes) -> None:
    with pytest.raises(UserError):
        extract_collectives(data.decode("latin-1"))


@fuzz
@given(st.floats(0, 0.999), st.sampled_from("{}()[]%,=\"'x9"))
def test_one_character_changed_raises_nothing_else(fraction: float, character: str) -> None:
    text = read("cpu_scan")
    at = int(fraction * len(text))
    try:
        extract_collectives(text[:at] + character + text[at + 1 :], {"fsdp": 2, "expert": 4})
    except UserError:
        return


SPARSE_CORE = """\
HloModule step, is_scheduled=true, num_partitions=8

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

%offloaded (p: f32[64]) -> f32[64] {
  %p = f32[64]{0} parameter(0)
  ROOT %r = f32[64]{0} all-reduce(%p), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, use_global_device_ids=true, to_apply=%sum
}, execution_thread="sparsecore"

ENTRY %main (x: f32[64]) -> f32[64] {
  %x = f32[64]{0} parameter(0)
  %start = ((f32[64]{0}), f32[64]{0}, u32[]) call-start(%x), async_execution_thread="sparsecore", to_apply=%offloaded
  %done = f32[64]{0} call-done(%start)
  %cut = f32[64]{0} bitcast(%done)
  ROOT %y = f32[64]{0} multiply(%cut, %cut), metadata={op_name="jit(step)/jvp(experts)/mul"}
}
"""  # noqa: E501


def test_what_a_sparse_core_runs_is_found_and_named_by_what_uses_it() -> None:
    """TPU7x offloads collectives to call-start, which bears no name: once they were all missed."""
    (found,) = extract_collectives(SPARSE_CORE, {"expert": 8}).collectives
    assert (found.kind, found.axes, found.bytes, found.is_async) == (
        "all-reduce",
        ("expert",),
        256,
        True,
    )
    assert (found.scope, found.pass_) == ("experts", "forward")


def test_a_call_of_an_unknown_kind_that_hides_a_collective_is_refused() -> None:
    text = SPARSE_CORE.replace("call-start(", "future-start(").replace("call-done", "future-done")
    with pytest.raises(UserError) as raised:
        extract_collectives(text, {"expert": 8})
    assert "HLO line 16: calls %offloaded, which holds collectives" in str(raised.value)
    assert len(str(raised.value).splitlines()) <= 3
