"""Read what the compiler makes of the layer from the compiled text, at the models' real widths.

Programs are compiled for arrays that are never allocated. The regular expressions are this test's
own, so that a mistake in `moe_shard.lowering` cannot hide one in the layer.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from moe_shard.config.load import load_config
from moe_shard.lowering.reports import report_from_text
from tests.moe.build import BuiltLayer, build_layer, mesh_of
from tests.moe.oracle import Settings

COLLECTIVE = re.compile(
    r"= (?P<type>.*?) (?P<kind>all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute|"
    r"ragged-all-to-all|collective-broadcast)(-start)?\("
)
ARRAY = re.compile(r"\b(pred|[a-z]+\d+)\[([\d,]*)\]")
BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}
SETTINGS = Settings(load_balance_weight=0.01, z_weight=0.001)
EXPERT_8 = {"expert": 8}


class Collective(NamedTuple):
    kind: str
    arrays: list[tuple[str, tuple[int, ...]]]
    op_name: str

    @property
    def bytes(self) -> int:
        return sum(BYTES[dtype] * math.prod(shape) for dtype, shape in self.arrays)


def collectives(text: str) -> list[Collective]:
    found = []
    for line in text.splitlines():
        if match := COLLECTIVE.search(line):
            arrays = [
                (dtype, tuple(int(size) for size in dims.split(",") if size))
                for dtype, dims in ARRAY.findall(match["type"])
            ]
            name = re.search(r'op_name="([^"]*)"', line)
            found.append(Collective(match["kind"], arrays, name[1] if name else ""))
    return found


def kinds(found: list[Collective]) -> Counter[str]:
    return Counter(collective.kind for collective in found)


def verdict_of(text: str) -> str | None:
    """Return the package's own verdict on a program, to compare with the counts made here."""
    return report_from_text(text, mesh=EXPERT_8).verdict


def build(
    sizes: dict[str, int],
    dispatch: str,
    flag: bool,
    *,
    rows: int = 8,
    tokens: int = 128,
    model: int = 256,
    hidden: int = 512,
    experts: int = 8,
    dtype: Any = jnp.float32,
) -> BuiltLayer:
    return build_layer(
        mesh_of(sizes),
        SETTINGS,
        dispatch=dispatch,
        flag=flag,
        rows=rows,
        tokens=tokens,
        model=model,
        hidden=hidden,
        experts=experts,
        dtype=dtype,
    )


def widths(name: str) -> dict[str, Any]:
    config = load_config(name).model
    assert config.moe is not None
    return {
        "model": config.emb_dim,
        "hidden": config.moe.moe_mlp_dim,
        "experts": config.moe.num_experts,
        "dtype": jnp.dtype(config.dtype),
    }


either_model = pytest.mark.parametrize("name", ["mixtral-8x7b", "mixtral-tiny"])


def test_the_large_model_is_the_published_one() -> None:
    expected = {"model": 4096, "hidden": 14336, "experts": 8, "dtype": jnp.dtype("bfloat16")}
    assert widths("mixtral-8x7b") == expected


@either_model
def test_flag_on_moves_tokens_and_nothing_else(name: str, flagged: str) -> None:
    size = widths(name)
    text = build(EXPERT_8, flagged, True, **size).lower().compile().as_text()
    assert verdict_of(text) == "expert-parallel"
    found = collectives(text)
    assert kinds(found) == {"all-to-all": 4, "all-reduce": 1}
    (reduced,) = (c for c in found if c.kind == "all-reduce")
    router = math.prod((size["model"], size["experts"]))
    assert sorted(math.prod(shape) for _, shape in reduced.arrays if shape) == [router]
    # Forward and backward of each exchange, found by the scopes that reports rely on.
    scopes = Counter(
        scope
        for c in found
        if c.kind == "all-to-all"
        for scope in ("dispatch", "combine")
        if scope in c.op_name
    )
    assert scopes == {"dispatch": 2, "combine": 2}


@either_model
def test_flag_off_gathers_the_weights(name: str, flagged: str) -> None:
    size = widths(name)
    text = build(EXPERT_8, flagged, False, **size).lower().compile().as_text()
    assert verdict_of(text) == "weight-gathered"
    found = collectives(text)
    assert kinds(found)["all-to-all"] == 0
    weight = size["experts"] * size["model"] * size["hidden"]
    gathered = [math.prod(shape) for c in found if c.kind == "all-gather" for _, shape in c.arrays]
    assert gathered.count(weight) >= 3  # gate, up, down


def test_flag_on_moves_no_more_than_the_layout_needs(flagged: str) -> None:
    # B8 S128 M256 H512 E8 top-2 float32: 4 exchanges of 262,144 B, the router's gradient, scalars.
    compiled = build(EXPERT_8, flagged, True).lower().compile()
    assert sum(c.bytes for c in collectives(compiled.as_text())) <= 1_057_000
    assert compiled.memory_analysis().temp_size_in_bytes <= 4.5e6


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"context": 8}, {"data": 8}]
)
def test_without_an_expert_axis_the_flag_changes_no_byte(
    sizes: dict[str, int], flagged: str
) -> None:
    # Both from one line of source: the texts hold line numbers.
    lowered = [build(sizes, flagged, flag, tokens=16).lower() for flag in (False, True)]
    off, on = (program.as_text() for program in lowered)
    assert off == on
    off, on = (program.as_text(debug_info=True) for program in lowered)
    assert off == on
    off, on = (program.compile().as_text() for program in lowered)
    assert off == on
    assert "op_name=" in off
    # Sequences split over `context` are exchanged: assigning slots needs whole sequences.
    assert "context" in sizes or kinds(collectives(off))["all-to-all"] == 0


def test_with_an_expert_axis_the_flag_does_change_the_program() -> None:
    off, on = (build(EXPERT_8, "gather", flag).lower().as_text() for flag in (False, True))
    assert off != on


def remat(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    return partial(jax.checkpoint, policy=policy)


def count_primitives(jaxpr: Any) -> Counter[str]:
    """Count the primitives of a jaxpr and of all jaxprs inside it."""
    total: Counter[str] = Counter()
    for equation in jaxpr.eqns:
        total[equation.primitive.name] += 1
        for inner in jaxprs_in_params(equation.params):
            total += count_primitives(inner)
    return total


def choosing(layer: BuiltLayer, **options: Any) -> dict[str, int]:
    """Count how often a step chooses experts and sorts choices, traced and compiled."""
    step = partial(layer.step, **options)
    traced = count_primitives(jax.make_jaxpr(step)(layer.shapes, layer.tokens, layer.tokens).jaxpr)
    text = layer.lower(**options).compile().as_text()
    return {
        "traced sorts": traced["sort"],
        "traced argmaxes": traced["argmax"],
        "compiled sorts": len(re.findall(r" sort\(", text)),
    }


@pytest.mark.parametrize("names", [("routing",), ("routing", "exchanged")])
def test_remat_never_chooses_experts_again(names: tuple[str, ...]) -> None:
    # A second choice could differ from the first: recomputed scores may round differently.
    layer = build(EXPERT_8, "gather", True)
    once = choosing(layer)
    assert min(once.values()) > 0
    assert choosing(layer, wrap=remat(*names)) == once


def test_remat_without_the_saved_choice_would_choose_again() -> None:
    layer = build(EXPERT_8, "gather", True)
    again, once = choosing(layer, wrap=remat()), choosing(layer)
    assert again["traced sorts"] > once["traced sorts"]
    assert again["traced argmaxes"] > once["traced argmaxes"]


@pytest.mark.parametrize(("names", "exchanges"), [(("routing", "exchanged"), 4), (("routing",), 6)])
def test_saving_what_crossed_the_wire_spares_its_second_crossing(
    names: tuple[str, ...], exchanges: int, flagged: str
) -> None:
    layer = build(EXPERT_8, flagged, True)
    found = collectives(layer.lower(wrap=remat(*names)).compile().as_text())
    assert kinds(found)["all-to-all"] == exchanges


@pytest.mark.parametrize(
    ("sizes", "experts"), [({"data": 2, "expert": 4}, 8), (EXPERT_8, 16)], ids=["mesh", "experts"]
)
def test_a_loop_over_blocks_of_several_experts_is_a_product_of_experts(
    sizes: dict[str, int], experts: int
) -> None:
    """Each block's weights are chosen by an index that the router decided."""
    layer = build(sizes, "ragged", True, tokens=64, model=64, hidden=96, experts=experts)
    report = report_from_text(layer.lower().compile().as_text(), mesh=sizes)
    assert report.verdict == "expert-parallel"
    exchanged = [each for each in report.collectives if each.kind == "all-to-all"]
    assert sorted((each.scope, each.pass_) for each in exchanged) == [
        (scope, pass_) for scope in ("combine", "dispatch") for pass_ in ("backward", "forward")
    ]
