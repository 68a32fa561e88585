"""Attention of every kind equals the oracle, outputs and gradients, on one device and on meshes."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_shard.layers import sparse_attention
from moe_shard.layers.cache import Memory
from moe_shard.layers.indexer import best
from moe_shard.layers.kernels import blockwise
from moe_shard.layers.kernels.load_balance import zigzag
from moe_shard.lowering.reports import report_from_text
from moe_shard.models.params import describe as describe_model
from tests.layers import oracle
from tests.layers.build import (
    MLA,
    Sizes,
    assert_gradients,
    attention_layer,
    layer_annotator,
    layer_config,
    packed,
    random_like,
    value_and_grads,
)
from tests.layers.test_rope import LONGROPE, TYPES
from tests.models.build import QUICK, assert_close, label

SLIDING = ("attention_pattern=[sliding]", "sliding_window_size=3")
CHUNKED = ("attention_pattern=[chunked]", "chunk_attn_window_size=3")
NO_ROPE = ("nope_layer_interval=1",)
BIASES = ("attention_bias=true", "attention_out_bias=true")
INDEXER = (
    *(*MLA, "use_indexer=true", "q_lora_rank=24", "indexer_topk=3"),
    *("indexer_head_dim=6", "indexer_n_heads=7"),
)
OWN_WIDTHS = (
    *("share_kv_projections=true", "use_v_norm=true", "use_qk_norm=true", "attention_scale=1"),
    *("global_head_dim=12", "global_num_kv_heads=4", "local_rope_max_timescale=50"),
    *("rope_type=proportional", "partial_rotary_factor=0.35"),
)
CASES = {
    "plain": (),
    "bias": BIASES,
    "sliding": SLIDING,
    "chunked": CHUNKED,
    "sink": ("attention_sink=true",),
    "soft-cap": ("attn_logits_soft_cap=0.8",),
    "scale": ("attention_scale=0.7",),
    "norm-head": ("use_qk_norm=true",),
    "norm-projection": ("use_qk_norm=true", "qk_norm_type=projection"),
    "norm-l2": ("use_qk_norm=true", "qk_norm_type=l2"),
    "norm-l2-without-rope": ("use_qk_norm=true", "qk_norm_type=l2", *NO_ROPE),
    "gate-bias": ("attention_output_gate=true", *BIASES),
    "clip": ("clip_qkv=0.6",),
    "clip-after-norm": ("use_qk_norm=true", "qk_norm_type=projection", "clip_qkv=0.6"),
    "no-rope": NO_ROPE,
    "tempered": ("temperature_tuning=true", "temperature_tuning_floor=2", *NO_ROPE),
    "tempered-only-without-rope": ("temperature_tuning=true", "temperature_tuning_floor=2"),
    "partial-interleaved": ("partial_rotary_factor=0.5", "rope_interleave=true"),
    "yarn": TYPES["yarn"],
    "longrope-at-its-length": LONGROPE,
    "longrope-beyond": (*LONGROPE, "original_max_position_embeddings=11"),
    "sliding-sink-soft-cap-bias": (
        *SLIDING,
        *BIASES,
        "attention_sink=true",
        "attn_logits_soft_cap=2",
    ),
    "values-are-keys": (*OWN_WIDTHS, *BIASES),
    "own-widths-sliding": (*OWN_WIDTHS, *SLIDING),
    "mla": MLA,
    "mla-query-latent-bias-yarn": (
        *MLA,
        *BIASES,
        *TYPES["yarn"],
        "q_lora_rank=24",
        "rope_interleave=true",
        "mscale=0.7",
        "latent_norm_epsilon=0.3",
    ),
    "mla-sliding-sink-soft-cap": (
        *MLA,
        *SLIDING,
        "attention_sink=true",
        "attn_logits_soft_cap=2",
        "attention_scale=0.4",
    ),
    "mla-indexer": INDEXER,
    "mla-indexer-interleaved-sink": (
        *INDEXER,
        *TYPES["yarn"],
        "rope_interleave=true",
        "indexer_rope_interleave=true",
        "attention_sink=true",
    ),
    "mla-equal-sizes-no-rope": (*MLA, *NO_ROPE, "v_head_dim=10"),
}
MESHES: list[Sizes] = [
    {"fsdp": 8},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"fsdp_transpose": 2, "context": 2, "expert": 2},
    {"tensor": 2, "expert": 4},
]
BLOCKWISE = {
    *("plain", "sliding", "chunked", "sink", "soft-cap", "scale", "sliding-sink-soft-cap-bias"),
    *("mla", "mla-query-latent-bias-yarn", "mla-sliding-sink-soft-cap"),
}
ON_MESHES = (
    "plain",
    "norm-projection",
    "sliding-sink-soft-cap-bias",
    "mla-query-latent-bias-yarn",
)


def check(
    sizes: Sizes,
    overrides: tuple[str, ...],
    rows: int,
    order: np.ndarray | None = None,
) -> None:
    """Compare a layer with the oracle, of tokens in this order."""
    config = layer_config(sizes, *overrides)
    sharding = layer_annotator(config, sizes)
    layer = attention_layer(config, sharding)
    kind = config.model.layer_kinds[0]
    keys = oracle.of_span(config.as_flat_dict(), kind.span)
    text, params = packed(rows), random_like(layer.shapes)
    shuffled = np.arange(text.x.shape[1]) if order is None else order
    positions, segment_ids = (
        jnp.asarray(each[:, shuffled]) for each in (text.positions, text.segment_ids)
    )
    probe = np.random.default_rng(3).standard_normal(text.x.shape).astype(np.float32)
    place = sharding.named_sharding(
        "x", ("activation_batch", "activation_length", "activation_embed"), text.x.shape
    )
    y, (of_params, of_x) = value_and_grads(
        lambda module, x: module(x, positions, segment_ids, order=order)[0],
        layer,
        params,
        text.x[:, shuffled],
        probe[:, shuffled],
        place,
    )
    back = np.argsort(shuffled)
    y, grads = y[:, back], (of_params, of_x[:, back])
    masks = [
        oracle.mask(*each, keys, kind.span)
        for each in zip(text.positions, text.segment_ids, strict=True)
    ]

    def forward(at: tuple[Any, np.ndarray]) -> np.ndarray:
        return oracle.attention(at[1], at[0] | choosing, masks, text.positions, keys, kind.rope)

    # What only chooses has no gradient.
    choosing = {name: params.pop(name) for name in ("indexer",) if name in params}
    assert not any(grad.any() for name in choosing for grad in jax.tree.leaves(of_params.pop(name)))
    at = (params, text.x.astype(np.float64))
    assert_close(y, forward(at))
    assert_gradients(grads, at, lambda at: float(np.sum(forward(at) * probe)))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make blocks of 4 tokens or so, of which a test's text has several."""
    monkeypatch.setattr(blockwise, "CPU_BLOCK", 8)
    monkeypatch.setattr(blockwise, "_SMALLEST", 4)
    monkeypatch.setattr(sparse_attention, "BLOCK", 5)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("case", CASES)
def test_on_one_device(case: str) -> None:
    # Blocks for what changes scores and masks; the default for what comes before them.
    implementation = "blockwise" if case in BLOCKWISE else "autoselected"
    check({}, (f"attention={implementation}", *CASES[case]), rows=3)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("sizes", MESHES, ids=label)
@pytest.mark.parametrize("case", ON_MESHES)
def test_on_meshes(case: str, sizes: Sizes) -> None:
    implementation = "autoselected" if case == "norm-projection" else "blockwise"
    check(sizes, (f"attention={implementation}", *CASES[case]), rows=8)


@pytest.mark.usefixtures("small_blocks")
def test_values_that_are_keys_on_a_mesh() -> None:
    check({"data": 2, "fsdp": 2, "tensor": 2}, CASES["values-are-keys"], rows=8)


@pytest.mark.usefixtures("small_blocks")
def test_an_indexer_on_a_mesh() -> None:
    check({"data": 2, "fsdp": 2, "tensor": 2}, CASES["mla-indexer"], rows=8)


def test_the_best_are_exactly_so_many_the_first_of_equal_ones() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(-2, 3, (40, 9)).astype(np.float32)
    scores[0] = -np.inf
    for most in (1, 4, 9):
        order = np.argsort(-scores, axis=1, kind="stable")[:, :most]
        expected = np.zeros(scores.shape, bool)
        np.put_along_axis(expected, order, True, axis=1)
        np.testing.assert_array_equal(best(jnp.asarray(scores), most), expected)


def test_devices_choose_for_their_own_rows() -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    rows = jax.ShapeDtypeStruct((8, 4, 16), np.float32, sharding=place)
    lowered = jax.jit(lambda scores: best(scores, 3), out_shardings=place).lower(rows)
    text = lowered.compile(QUICK).as_text()
    assert text is not None
    assert "all-gather" not in text


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("case", ["sliding-sink-soft-cap-bias", "mla-query-latent-bias-yarn"])
def test_round_a_ring(case: str) -> None:
    ring = "context_parallel_strategy=ring"
    check({"fsdp": 2, "tensor": 2, "context": 2}, (ring, *CASES[case]), rows=8)


@pytest.mark.parametrize("strategy", ["all_gather", "ring"])
def test_latents_of_tokens_in_another_order(strategy: str) -> None:
    overrides = (f"context_parallel_strategy={strategy}", *CASES["mla-query-latent-bias-yarn"])
    check({"fsdp": 4, "context": 2}, overrides, rows=8, order=zigzag(12, 2))


@pytest.mark.parametrize("heads", [(4, 1), (6, 2), (6, 3)], ids=str)
def test_tensor_axes_that_do_not_divide_key_heads(heads: tuple[int, int]) -> None:
    # Key heads on every device, of which each takes its own: one, a whole group's, or one by one.
    sizes = {"tensor": 2, "fsdp": 4}
    number, kv = heads
    overrides = (f"base_num_query_heads={number}", f"base_num_kv_heads={kv}", "attention_sink=true")
    alone = ("logical_axis_rules=[[kv_heads,[]],[activation_kv_heads,[]]]",)
    check(sizes, (*overrides, *alone), rows=8)


@pytest.mark.parametrize("case", CASES)
def test_activations_and_caches_have_the_dtype_asked_for(case: str) -> None:
    config = layer_config({}, "dtype=bfloat16", *CASES[case])
    layer = attention_layer(config, layer_annotator(config, {}))

    def call(params: Any, x: jax.Array, at: jax.Array) -> Any:
        module = nnx.merge(layer.graph, params)
        memory = Memory(module.empty_cache(1, 4), at[0, 0], at, at)
        return module(x, at, at)[0], module(x, at, at, memory)

    x = jax.ShapeDtypeStruct((1, 4, 16), np.dtype("bfloat16"))
    found = jax.eval_shape(call, layer.shapes, x, jax.ShapeDtypeStruct((1, 4), np.int32))
    assert {str(array.dtype) for array in jax.tree.leaves(found)} == {"bfloat16"}


def test_weight_decay_leaves_biases_sinks_and_norms_alone() -> None:
    normed = ("use_qk_norm=true", "qk_norm_type=projection")
    for expected, overrides in (
        ({"query", "key", "value", "out"}, (*BIASES, *normed, "attention_sink=true")),
        (
            {"query_down", "query_up", "latent_down", "latent_up", "out"},
            (*MLA, *BIASES, "q_lora_rank=8"),
        ),
    ):
        config = layer_config({}, *overrides)
        specs = describe_model(config.model, layer_annotator(config, {})).specs
        matrices = {
            spec.name.rsplit(".")[-1]
            for spec in jax.tree.leaves(specs["layers"]["attention"])
            if len(set(spec.logical_axes) - {"layers", None}) > 1
        }
        assert matrices == expected


def test_queries_begin_small_where_nothing_scales_the_scores() -> None:
    for overrides, expected in (
        ((), 1.0),
        (("attention_scale=1",), 1 / math.sqrt(64)),
        (
            ("attention_scale=1", "use_qk_norm=true"),
            1.0,
        ),  # a norm undoes what a weight is scaled by
    ):
        config = layer_config({}, *overrides, "head_dim=64", "base_num_kv_heads=4")
        sharding = layer_annotator(config, {})
        made = describe_model(config.model, sharding).init(jax.random.key(0))["layers"]["attention"]
        ratio = np.std(made["query"]) / np.std(made["key"])
        np.testing.assert_allclose(ratio, expected, rtol=0.05)


def test_text_shows_what_spans_and_documents_hide() -> None:
    # A test of masks proves nothing on a text that no mask changes.
    text = packed(3)
    assert len(np.unique(text.segment_ids)) > 2
    assert text.positions.max() > 6


def collectives_over_context(rows: int, tokens: int, *overrides: str) -> dict[str, int]:
    """Return {kind: output bytes on a device} of a layer's collectives over a context axis of 2."""
    sizes = {"context": 2, "fsdp": 4}
    config = layer_config(sizes, *overrides)
    sharding = layer_annotator(config, sizes)
    layer = attention_layer(config, sharding)
    place = sharding.named_sharding("x", ("activation_batch", "activation_length"), (rows, tokens))
    at = jax.ShapeDtypeStruct((rows, tokens), np.int32)
    compiled = (
        jax.jit(
            lambda params, x, at: nnx.merge(layer.graph, params)(x, at, at)[0],
            in_shardings=(layer.places, place, place),
        )
        .lower(layer.shapes, jax.ShapeDtypeStruct((rows, tokens, 16), np.float32), at)
        .compile(QUICK)
    )
    found = report_from_text(
        compiled.as_text() or "", mesh=dict(sharding.mesh.shape), backend="cpu"
    ).collectives
    total: dict[str, int] = {}
    for each in found:
        if each.axes == ("context",):
            total[each.kind] = total.get(each.kind, 0) + each.bytes * each.count
    return total


def test_a_context_axis_gathers_the_latents_of_mla_and_not_keys_and_values() -> None:
    rows, tokens = 8, 12
    over = collectives_over_context(rows, tokens, *MLA)
    # Latents of 8 and keys of 4 elements, and the tokens' position and document (one array here),
    # for 12 tokens of 2 sequences a device, in 4 bytes; keys and values would be 22 elements for
    # each head.
    assert over.keys() == {"all-gather"}
    assert over["all-gather"] <= (8 + 4 + 2) * tokens * 2 * 4


def test_a_ring_passes_on_its_own_half_of_keys_and_values() -> None:
    rows, tokens = 8, 12
    over = collectives_over_context(rows, tokens, "context_parallel_strategy=ring")
    # Keys and values of 2 heads of 8, and position and document, which are one array here, for 6
    # tokens of 2 sequences; and the places of the 6.
    assert over.keys() == {"collective-permute"}
    of_tokens = (2 * 2 * 8 + 1) * (tokens // 2) * 2 * 4
    assert over["collective-permute"] == of_tokens + tokens // 2 * 4
