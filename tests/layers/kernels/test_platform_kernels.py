"""Compare the kernels for TPUs and GPUs, in Pallas's interpreter, with NumPy in float64."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_shard.layers.kernels import cudnn, splash, triton_attention, triton_blocks
from moe_shard.layers.kernels.reach import reach_of
from moe_shard.layers.kernels.rule import AttentionRule, Tokens, seen_tokens
from tests.layers.kernels.numbers import Gradients, make_problem, solve
from tests.layers.kernels.test_attend import CASES, assert_near, call, case

KERNELS: dict[str, Any] = {
    "splash": partial(splash.attend, interpret=True),
    "triton": partial(triton_attention.attend, platform="cpu"),
}
MORE: dict[str, dict[str, Any]] = {
    "several-blocks": {"rows": 1, "tokens": 300, "heads": 2, "kv_heads": 1, "value_dim": 40},
    "several-blocks-sliding": {
        "rows": 1,
        "tokens": 600,
        "heads": 1,
        "kv_heads": 1,
        "span": "sliding",
        "window": 40,
        "one_document": True,
    },
    "sink-cap-window": {"sink": True, "cap": 1.5, "span": "sliding", "window": 7},
}


@pytest.mark.parametrize("which", [*CASES, *MORE])
@pytest.mark.parametrize("name", KERNELS)
def test_equals_numpy(name: str, which: str) -> None:
    problem = make_problem(**(CASES | MORE)[which])
    expected, gradients = solve(problem)
    out, found = call(KERNELS[name], problem, ordered=True)
    assert_near(out, expected, "out")
    for array, grad in zip(Gradients._fields, found, strict=False):
        assert_near(grad, getattr(gradients, array), array)


@pytest.mark.parametrize("name", KERNELS)
def test_bfloat16_products_are_summed_in_float32(name: str) -> None:
    problem = make_problem(one_document=True, tokens=64, dim=16, value_dim=16)
    rule = AttentionRule(scale=problem.scale)
    order = np.arange(64)
    tokens = Tokens(jnp.asarray(problem.positions), jnp.asarray(problem.segment_ids), order)
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in (problem.query, problem.key, problem.value)]
    wide = [np.asarray(x.astype(jnp.float32), np.float64) for x in arrays]
    expected, _ = solve(problem._replace(query=wide[0], key=wide[1], value=wide[2]))
    out = KERNELS[name](*arrays, tokens, tokens, rule=rule, sink=None)
    assert out.dtype == jnp.bfloat16
    error = np.abs(np.asarray(out.astype(jnp.float32)) - expected)
    # Roundings to 8 bits: of the weights, of the output and, for splash, of the scaled queries.
    assert error.max() < 2**-7 * np.abs(expected).max()


@pytest.mark.parametrize(
    "rule",
    [
        AttentionRule(scale=1),
        AttentionRule(scale=1, span="sliding", window=5),
        AttentionRule(scale=1, span="chunked", window=6),
    ],
    ids=lambda rule: rule.span,
)
def test_what_a_query_sees_is_a_range_of_keys(rule: AttentionRule) -> None:
    problem = make_problem(tokens=80)
    tokens = Tokens(jnp.asarray(problem.positions), jnp.asarray(problem.segment_ids), np.arange(80))
    first, last = reach_of(tokens, tokens, rule=rule)
    place = np.arange(80)
    found = (place >= first[..., None]) & (place <= last[..., None])
    np.testing.assert_array_equal(found, seen_tokens(tokens, tokens, rule=rule))


@pytest.mark.parametrize("by_keys", [False, True], ids=["of-queries", "of-keys"])
@pytest.mark.parametrize(
    "which", [{}, {"one_document": True}, {"one_document": True, "window": 40}], ids=str
)
def test_the_blocks_that_are_met_are_those_with_something_to_see(
    which: dict[str, Any], by_keys: bool
) -> None:
    tokens, rows, columns = 96, 8, 16
    problem = make_problem(rows=3, tokens=tokens, **which)
    of = Tokens(jnp.asarray(problem.positions), jnp.asarray(problem.segment_ids), np.arange(tokens))
    window = which.get("window", 0)
    rule = AttentionRule(scale=1, span="sliding" if window else "global", window=window)
    tile = triton_blocks.Tile(rows, columns, warps=4, stages=1)
    table = triton_blocks.blocks_met(reach_of(of, of, rule=rule), tile, tokens, by_keys=by_keys)
    seen = np.asarray(seen_tokens(of, of, rule=rule))
    seen = seen.reshape(3, tokens // rows, rows, tokens // columns, columns)
    seen = np.moveaxis(seen, 3, 1) if by_keys else np.moveaxis(seen, 3, 2)  # blocks come first
    some, every = (np.asarray(each) for each in (seen.any((3, 4)), seen.all((3, 4))))
    for at in np.ndindex(table.shape[:2]):
        first, whole, partly, last = np.asarray(table[at])
        assert np.flatnonzero(some[at]).tolist() == list(range(first, last))
        assert np.flatnonzero(every[at]).tolist() == list(range(whole, partly))


def test_heads_are_cut_into_powers_of_two() -> None:
    sizes = [[piece.size for piece in triton_blocks.head_pieces(dim)] for dim in (192, 80, 128)]
    assert sizes == [[128, 64], [64, 16], [128]]


@pytest.mark.parametrize(
    ("module", "other", "words"),
    [
        (splash, {"platform": "cuda"}, "for TPU"),
        (splash, {"dtype": "float16"}, "not float16"),
        (triton_attention, {"platform": "tpu"}, "for GPUs"),
        (triton_attention, {"dtype": "float64"}, "not float64"),
        (triton_attention, {"key_dim": 512}, "512 elements"),
        (cudnn, {"platform": "rocm"}, "for NVIDIA"),
        (cudnn, {"dtype": "float32"}, "not float32"),
        (cudnn, {"rule": AttentionRule(scale=1, soft_cap=1)}, "no soft cap"),
        (cudnn, {"sink": True}, "no sinks"),
        (cudnn, {"key_dim": 192}, "values of 64 with keys of 192"),
        (cudnn, {}, "only where an NVIDIA GPU is present"),
    ],
)
def test_what_a_kernel_cannot_compute_is_said(
    module: Any, other: dict[str, Any], words: str
) -> None:
    usual = {splash: "tpu", triton_attention: "cuda", cudnn: "cuda"}[module]
    here = {"platform": usual, "dtype": "bfloat16"}
    assert words in module.unsupported(case(**(here | other)))


@pytest.mark.parametrize("span", ["global", "sliding"])
def test_cudnn_is_called_with_a_mask(span: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU with XLA in cuDNN's place: the same function of jax takes the same arguments."""
    plain = jax.nn.dot_product_attention

    def instead(*arrays: Any, implementation: str, **others: Any) -> Any:
        assert implementation == "cudnn"
        return plain(*arrays, **others, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    problem = make_problem(span=span, window=5)
    expected, gradients = solve(problem)
    out, found = call(cudnn.attend, problem, ordered=True)
    assert_near(out, expected, "out")
    for array, grad in zip(Gradients._fields, found, strict=False):
        assert_near(grad, getattr(gradients, array), array)
