"""Every implementation of attention equals NumPy, output and gradients, with every option."""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_shard.errors import UserError
from moe_shard.layers.kernels import blockwise, dot_product
from moe_shard.layers.kernels.block_pairs import (
    PART,
    SKIP,
    WHOLE,
    list_pairs,
    pair_needs,
    split_tokens,
)
from moe_shard.layers.kernels.choose import SHORT, choose_attention
from moe_shard.layers.kernels.rule import AttentionCase, AttentionRule, Tokens
from tests.layers.kernels.numbers import Gradients, Problem, make_problem, solve
from tests.models.build import QUICK

CASES: dict[str, dict[str, Any]] = {
    "documents": {},
    "one-document": {"one_document": True, "tokens": 48},
    "a-key-head-for-each-query-head": {"kv_heads": 4},
    "one-key-head": {"kv_heads": 1, "sink": True},
    "sizes-of-mla": {"kv_heads": 4, "value_dim": 10, "cap": 0.8},
    "sliding": {"span": "sliding", "window": 5},
    "sliding-one-document-sink-cap": {
        "span": "sliding",
        "window": 11,
        "one_document": True,
        "sink": True,
        "cap": 2.0,
    },
    "chunked": {"span": "chunked", "window": 6, "sink": True},
    "chunked-one-document": {"span": "chunked", "window": 20, "one_document": True},
    "fewer-queries": {"queries": 19, "cap": 1.5, "sink": True},
    "one-query": {"queries": 1},
}
IMPLEMENTATIONS: dict[str, Any] = {
    "dot_product": dot_product.attend,
    "blockwise": partial(blockwise.attend, largest_block=16),
}


def call(attend: Any, problem: Problem, *, ordered: bool) -> Any:
    """Return the output and the gradients of `sum(out * probe)`."""
    rule = AttentionRule(
        scale=problem.scale,
        soft_cap=problem.cap,
        span=problem.span,  # type: ignore[arg-type]
        window=max(problem.keys.values()) if problem.span != "global" else 0,
    )
    tokens, queries = problem.key.shape[1], problem.query.shape[1]
    order = np.arange(tokens) if ordered else None
    mine = Tokens(
        jnp.asarray(problem.positions),
        jnp.asarray(problem.segment_ids),
        None if order is None else order[tokens - queries :],
    )
    theirs = Tokens(jnp.asarray(problem.key_positions), jnp.asarray(problem.key_segment_ids), order)
    arrays = [problem.query, problem.key, problem.value]
    arrays += [] if problem.sink is None else [problem.sink]
    narrow = [np.asarray(each, np.float32) for each in arrays]

    def loss(query: Any, key: Any, value: Any, sink: Any = None) -> Any:
        out = attend(query, key, value, mine, theirs, rule=rule, sink=sink)
        return jnp.sum(out * problem.probe.astype(np.float32)), out

    numbers = tuple(range(len(arrays)))
    jitted = jax.jit(
        jax.value_and_grad(loss, argnums=numbers, has_aux=True), compiler_options=QUICK
    )
    (_, out), gradients = jitted(*narrow)
    return np.asarray(out), [np.asarray(each) for each in gradients]


def assert_near(found: np.ndarray, expected: np.ndarray, name: str) -> None:
    error = np.max(np.abs(found - expected)) / max(np.max(np.abs(expected)), 1e-30)
    assert error < 1e-5, f"{name}: relative error {error:.1e}"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "_SMALLEST", 8)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_equals_numpy(name: str, case: str) -> None:
    problem = make_problem(**CASES[case])
    expected, gradients = solve(problem)
    # Half of the cases know the order of tokens, as training does; half do not, as with a cache.
    ordered = list(CASES).index(case) % 2 == 0
    out, found = call(IMPLEMENTATIONS[name], problem, ordered=ordered)
    assert_near(out, expected, "out")
    for which, grad in zip(Gradients._fields, found, strict=False):
        assert_near(grad, getattr(gradients, which), which)


@pytest.mark.parametrize("case", ["sliding-one-document-sink-cap", "chunked", "sizes-of-mla"])
def test_the_gradients_by_hand_are_those_of_differences(case: str) -> None:
    problem = make_problem(**{**CASES[case], "tokens": 12})
    _, gradients = solve(problem)
    rng = np.random.default_rng(3)
    for name, gradient in zip(("query", "key", "value", "sink"), gradients, strict=True):
        at = getattr(problem, name)
        if at is None:
            continue
        direction = rng.standard_normal(at.shape)

        def moved(by: float, name: str = name, d: np.ndarray = direction) -> float:
            other = problem._replace(**{name: getattr(problem, name) + by * d})
            return float(np.sum(solve(other)[0] * problem.probe))

        expected = (moved(1e-5) - moved(-1e-5)) / 2e-5
        np.testing.assert_allclose(np.sum(gradient * direction), expected, rtol=1e-7)


def test_bfloat16_products_are_summed_in_float32() -> None:
    problem = make_problem(one_document=True, tokens=64, dim=16, value_dim=16)
    rule = AttentionRule(scale=problem.scale)
    tokens = Tokens(jnp.asarray(problem.positions), jnp.asarray(problem.segment_ids))
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in (problem.query, problem.key, problem.value)]
    wide = [np.asarray(x.astype(jnp.float32), np.float64) for x in arrays]
    expected, _ = solve(problem._replace(query=wide[0], key=wide[1], value=wide[2]))
    for name, attend in IMPLEMENTATIONS.items():
        out = attend(*arrays, tokens, tokens, rule=rule, sink=None)
        assert out.dtype == jnp.bfloat16
        error = np.abs(np.asarray(out.astype(jnp.float32)) - expected)
        # Two roundings to 8 bits: of weights and of the output.
        assert error.max() < 2**-7 * np.abs(expected).max(), name


def test_a_query_that_sees_nothing_gets_zeros() -> None:
    problem = make_problem(tokens=24)
    problem = problem._replace(segment_ids=problem.segment_ids * 0 - 7)
    out, gradients = call(IMPLEMENTATIONS["blockwise"], problem, ordered=False)
    assert np.all(out == 0)
    assert all(np.all(each == 0) for each in gradients)


def needs(tokens: Tokens, rule: AttentionRule, size: int) -> dict[tuple[int, int], int]:
    pairs = list_pairs(tokens, tokens, (size, size), rule=rule)
    blocks, keys = split_tokens(tokens, size, -2), split_tokens(tokens, size, -3)
    found = pair_needs(pairs, blocks, keys, rule=rule)
    return dict(zip(pairs, found.tolist(), strict=True))


def test_what_nobody_sees_is_not_computed() -> None:
    size, blocks = 8, 8
    places = jnp.arange(size * blocks)[None]
    order = np.arange(size * blocks)
    one = Tokens(places, places * 0, order)
    found = needs(one, AttentionRule(scale=1), size)
    assert found == {(i, u): PART if i == u else WHOLE for i in range(blocks) for u in range(i + 1)}
    # A window of 9 reaches into two blocks before.
    found = needs(one, AttentionRule(scale=1, span="sliding", window=10), size)
    assert set(found) == {(i, u) for i in range(blocks) for u in range(max(i - 2, 0), i + 1)}
    # Documents of 3 blocks: nothing is computed across them, though the program has the pairs.
    packed = Tokens(places % 24, places // 24, order)
    found = needs(packed, AttentionRule(scale=1), size)
    needed = {pair for pair, need in found.items() if need != SKIP}
    assert needed == {(i, u) for i in range(blocks) for u in range(i + 1) if i // 3 == u // 3}
    # Without an order, positions and documents rule out the same pairs.
    found = needs(packed._replace(order=None), AttentionRule(scale=1), size)
    assert {pair for pair, need in found.items() if need != SKIP} == needed
    chunks = AttentionRule(scale=1, span="chunked", window=16)
    needed = {pair for pair, need in needs(one, chunks, size).items() if need != SKIP}
    assert needed == {(i, u) for i in range(blocks) for u in range(i + 1) if i // 2 == u // 2}


@pytest.mark.parametrize("remat", [False, True])
def test_no_array_of_all_scores_or_masks(remat: bool) -> None:
    # In a scan over layers JAX keeps, or computes before it, what depends on tokens alone.
    tokens = 1024
    rule = AttentionRule(scale=1, soft_cap=3)

    def loss(x: Any, weights: Any, places: Any) -> Any:
        of = Tokens(places, places * 0, np.arange(tokens))

        def layer(x: Any, weight: Any) -> tuple[Any, None]:
            key = x * weight
            return blockwise.attend(x, key, key, of, of, rule=rule, sink=None), None

        x, _ = jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, weights)
        return jnp.sum(x)

    shapes = (
        jax.ShapeDtypeStruct((1, tokens, 2, 8), jnp.float32),
        jax.ShapeDtypeStruct((3,), jnp.float32),
        jax.ShapeDtypeStruct((1, tokens), jnp.int32),
    )
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).compile(QUICK)
    arrays = re.findall(r"\w+\[([\d,]+)\]", compiled.as_text() or "")
    largest = max(math.prod(int(size) for size in dims.split(",")) for dims in arrays)
    assert largest == 2 * 256 * 256  # the scores of a pair of blocks


def case(**other: Any) -> AttentionCase:
    values: dict[str, Any] = {
        "platform": "cpu",
        "rule": AttentionRule(scale=1),
        "sink": False,
        "rows": 1,
        "queries": 4096,
        "keys": 4096,
        "heads": 4,
        "kv_heads": 2,
        "key_dim": 64,
        "value_dim": 64,
        "dtype": jnp.float32,
    }
    return AttentionCase(**(values | other))


def test_short_sequences_need_no_blocks() -> None:
    assert choose_attention("autoselected", case()).name == "blockwise"
    short = choose_attention("autoselected", case(queries=SHORT, keys=SHORT))
    assert (short.name, short.refused) == ("dot_product", ())
    long = choose_attention("autoselected", case(queries=SHORT))
    assert dict(long.refused)["dot_product"] == "an array of 128 x 4096 scores for each head"
    assert choose_attention("dot_product", case()).reason == "by name"


def test_a_kernel_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="attention=cudnn_flash_jax: cuDNN is a library for NVIDIA"):
        choose_attention("cudnn_flash_jax", case())


@pytest.mark.parametrize(
    ("platform", "name"),
    [("cpu", "blockwise"), ("tpu", "flash"), ("cuda", "flash"), ("rocm", "flash")],
)
def test_each_platform_has_its_kernel(platform: str, name: str) -> None:
    chosen = choose_attention("autoselected", case(platform=platform))
    assert chosen.name == name
    # What runs in Pallas's interpreter, or is another's, cannot be mapped with JAX's check.
    assert chosen.check_vma == (platform != "tpu")
    assert not choose_attention("flash", case()).check_vma
    why_not = dict(chosen.refused).get("cudnn_flash_jax")
    assert why_not == ("documents as a mask of 4096 x 4096" if platform == "cuda" else None)
