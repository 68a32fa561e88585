"""Count by hand, from shapes, what every token mixer sends along each mesh axis, both passes.

The table asks for few things: a weight is gathered over the axes that store its model dim, and its
gradient is summed; over `tensor` the activations are gathered before projections by head, and
summed after the projection back. Nothing else is gathered, and nothing is exchanged.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_shard.layers import sparse_attention
from moe_shard.lowering.api import verdict
from moe_shard.lowering.collectives import Collective, extract_collectives
from moe_shard.models.mixers import MIXERS
from moe_shard.program.step import make_program
from moe_shard.runtime.targets.target import devices_for, parse_target
from moe_shard.sharding.annotate import Sharding
from moe_shard.sharding.mesh import mesh_from_config
from moe_shard.sharding.rules import RuleTable
from tests.layers.build import Sizes, describe, layer_config
from tests.models.build import QUICK, annotator, label, small_config

ROWS, S, M = 8, 32, 64
T = ROWS // 4 * S
"""Tokens of a device where sequences are over data and fsdp."""
FLOAT = 4
# The loss crosses the axes as a number, and so do its count and the like, merged with others.
SCALARS = 8 * FLOAT
OTHERS = "mi355x:8", "v5e:2x4"
"""Targets beside one that each change is compiled for: minutes more."""
EXPERT, DENSE = {"expert": 8}, {"data": 2, "fsdp": 2, "tensor": 2}


class Mixer(NamedTuple):
    """Describe a mixer, and the elements of what it has; `whole` is what tensor does not split.

    Attributes:
        overrides: its configuration.
        by_head: elements of its matrices by head, which tensor splits.
        projections: matrices by head that read x.
        vectors: elements of its vectors by head.
        norms: elements of norms of a head's output, which all heads share.
        whole_vectors: elements of its other vectors that tensor does not split.
        whole: elements of its matrices from x to what all heads share.
        constant: elements of its matrices without a gradient.
        latents: elements of a token that all heads share, summed forward.
        of_latents: those of them whose gradient is summed.
        chunk: elements of a token, summed over the heads in the backward pass of a chunk.
        statistics: sums of a token over all heads, in either pass.
        vectors_as_whole: whether vectors by head are stored as if tensor did not split heads.
    """

    overrides: tuple[str, ...]
    by_head: int
    projections: int
    vectors: int = 0
    norms: int = 0
    whole_vectors: int = 0
    whole: int = 0
    constant: int = 0
    latents: int = 0
    of_latents: int = 0
    chunk: int = 0
    statistics: int = 0
    vectors_as_whole: bool = False


def delta(keys: int, each: int, d: int, e: int, taps: int) -> Mixer:
    value = each * e
    return Mixer(
        (
            "mixer_pattern=[gated_delta_net]", f"gdn_num_key_heads={keys}", "gdn_chunk_size=16",
            f"gdn_num_value_heads={keys * each}", f"gdn_key_head_dim={d}",
            f"gdn_value_head_dim={e}", f"gdn_conv_kernel_dim={taps}",
        ),
        # Queries, keys, values, gate, out; rate and decay.
        by_head=M * keys * (2 * d + 3 * value + 2 * each),
        projections=6,
        vectors=keys * (taps * (2 * d + value) + 2 * each),
        norms=e,
    )  # fmt: skip


def mamba(groups: int, heads: int, p: int, d: int, taps: int) -> Mixer:
    values, keys = heads * p, 2 * groups * d
    overrides = (
        "mixer_pattern=[mamba2]", f"mamba_num_heads={heads}", f"mamba_head_dim={p}",
        f"mamba_num_groups={groups}", f"mamba_state_dim={d}", f"mamba_conv_kernel_dim={taps}",
        "mamba_chunk_size=16",
    )  # fmt: skip
    of_values = M * (3 * values + heads)  # value, gate, out; step
    # Taps, their biases, and the norm; decay, shift of the step, skip.
    vectors = (taps + 2) * values + 3 * heads
    of_keys = (taps + 1) * keys
    if groups > 1:
        return Mixer(overrides, of_values + M * keys, 5, vectors + of_keys)
    return Mixer(
        overrides,
        of_values,
        3,
        vectors,
        whole_vectors=of_keys,
        whole=M * keys,
        chunk=3 * d,
        statistics=1,
        vectors_as_whole=True,
    )


def gated(heads: int, keys: int, d: int) -> Mixer:
    overrides = (
        "attention_output_gate=true", "use_qk_norm=true", f"base_num_query_heads={heads}",
        f"base_num_kv_heads={keys}", f"head_dim={d}",
    )  # fmt: skip
    return Mixer(overrides, M * d * (3 * heads + 2 * keys), 4, norms=2 * d)


def indexer(heads: int, rq: int, r: int, nope: int, rope: int, v: int, h: int, di: int) -> Mixer:
    overrides = (
        "attention_type=mla", f"base_num_query_heads={heads}", f"q_lora_rank={rq}",
        f"kv_lora_rank={r}", f"qk_nope_head_dim={nope}", f"qk_rope_head_dim={rope}",
        f"v_head_dim={v}", "use_indexer=true", "indexer_topk=8", f"indexer_n_heads={h}",
        f"indexer_head_dim={di}",
    )  # fmt: skip
    return Mixer(
        overrides,
        by_head=heads * (rq * (nope + rope) + r * (nope + v) + v * M),
        projections=0,
        whole_vectors=rq + r,
        whole=M * (rq + r + rope),
        constant=rq * h * di + M * (di + h),
        latents=rq + r + rope + di + h,
        of_latents=rq + r + rope,
    )


MIXED = {
    "gated-delta-net": delta(keys=2, each=2, d=16, e=32, taps=4),
    "mamba2": mamba(groups=2, heads=4, p=32, d=16, taps=4),
    "mamba2-one-group": mamba(groups=1, heads=4, p=32, d=16, taps=4),
    "short-convolution": Mixer(
        ("mixer_pattern=[short_convolution]",), by_head=4 * M * M, projections=3, vectors=3 * M
    ),
    "gated-attention": gated(heads=4, keys=2, d=16),
    "indexer": indexer(heads=4, rq=32, r=32, nope=16, rope=16, v=16, h=4, di=16),
}


def found(case: str, sizes: Sizes, target: str) -> list[Collective]:
    """Compile a mixer and its gradients, and return its collectives."""
    config = layer_config(sizes, f"base_emb_dim={M}", *MIXED[case].overrides)
    sharding = Sharding(
        mesh_from_config(config.mesh, devices_for(parse_target(target))),
        RuleTable(config.mesh.logical_axis_rules),
        "record",
    )
    kind = config.model.layer_kinds[0]
    make = MIXERS[kind.mixer].make
    layer = describe(
        lambda rngs: cast(nnx.Module, make(config.model, kind, sharding, rngs)), sharding
    )
    axes = ("activation_batch", "activation_length", "activation_embed")
    place = sharding.named_sharding("x", axes, (ROWS, S, M))
    rows = sharding.named_sharding("rows", axes[:2], (ROWS, S))

    def loss(params: Any, x: jax.Array, at: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(nnx.merge(layer.graph, params)(x, at, at)[0]))

    def array(shape: Any, placed: Any) -> Any:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=placed)

    compiled = (
        jax.jit(jax.value_and_grad(loss, (0, 1)), out_shardings=(None, (layer.places, place)))
        .lower(
            jax.tree.map(array, layer.shapes, layer.places),
            jax.ShapeDtypeStruct((ROWS, S, M), np.float32, sharding=place),
            jax.ShapeDtypeStruct((ROWS, S), np.int32, sharding=rows),
        )
        .compile(QUICK if target == "cpu:8" else None)
    )
    text = compiled.as_text()
    assert text is not None
    return list(extract_collectives(text, dict(sharding.mesh.shape)).collectives)


def expected(case: str, sizes: Sizes) -> Counter[tuple[str, str]]:
    """Count the bytes of each kind and axis, as XLA's CPU compiler has them."""
    mixer = MIXED[case]
    stored = mixer.by_head + mixer.whole + mixer.constant
    vectors = mixer.vectors + mixer.norms + mixer.whole_vectors
    if sizes == EXPERT:
        learned = mixer.by_head + mixer.whole + vectors
        return Counter(
            {("all-gather", "expert"): stored * FLOAT, ("all-reduce", "expert"): learned * FLOAT}
        )
    part, token = mixer.by_head // 2, T * FLOAT
    of_x = token * M
    gathered = of_x  # the output's gradient
    gathered += of_x if mixer.projections else 0
    gathered += mixer.vectors * FLOAT if mixer.vectors_as_whole else 0
    summed = (1 + mixer.projections) * of_x  # the output, and the gradient of x of each projection
    of_token = mixer.latents + mixer.of_latents + mixer.chunk + 2 * mixer.statistics
    return +Counter(
        {
            ("all-gather", "fsdp"): (stored - part) * FLOAT,
            ("all-gather", "tensor"): gathered,
            ("all-reduce", "tensor"): summed + of_token * token + mixer.norms * FLOAT,
            # Gradients: over fsdp all of it is summed, and the stored half over data.
            ("all-reduce", "fsdp"): part * FLOAT,
            ("all-reduce", "data"): part // 2 * FLOAT,
            ("all-reduce", "data-fsdp"): (vectors - mixer.vectors // 2 + mixer.whole // 2) * FLOAT,
            # They are of x's half of the model dim, and stored as another half.
            ("collective-permute", "fsdp-tensor"): mixer.whole // 2 * FLOAT,
        }
    )


@pytest.fixture(autouse=True)
def blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have several blocks of tokens that attend."""
    monkeypatch.setattr(sparse_attention, "BLOCK", 16)


@pytest.mark.parametrize(
    "sizes", [pytest.param(EXPERT, marks=pytest.mark.targets), DENSE], ids=label
)
@pytest.mark.parametrize("case", MIXED)
def test_bytes_of_every_kind_and_axis(case: str, sizes: Sizes) -> None:
    total: Counter[tuple[str, str]] = Counter()
    for each in found(case, sizes, "cpu:8"):
        total[each.kind, "-".join(each.axes)] += each.count * each.bytes
    known = expected(case, sizes)
    wrong = {
        key: (total[key], known[key])
        for key in total.keys() | known.keys()
        if not 0 <= total[key] - known[key] <= SCALARS
    }
    assert not wrong, f"(found, by hand): {wrong}"


@pytest.mark.recorded
def test_an_indexer_is_no_router() -> None:
    """Scores masked by a choice of tokens are not tokens sent to experts."""
    config = small_config(
        EXPERT, *MIXED["indexer"].overrides, "base_num_decoder_layers=1", "indexer_topk=4"
    )
    program = make_program(config, annotator(config))
    compiled = program.step.lower(program.abstract_state, program.abstract_batch).compile(QUICK)
    assert verdict(compiled) == "expert-parallel"


@pytest.mark.targets
@pytest.mark.parametrize(
    "target", ["h100:8", *(pytest.param(each, marks=pytest.mark.slow) for each in OTHERS)]
)
@pytest.mark.parametrize("sizes", [EXPERT, DENSE], ids=label)
@pytest.mark.parametrize("case", MIXED)
def test_no_more_is_gathered_for_absent_hardware(case: str, sizes: Sizes, target: str) -> None:
    """Sums and gradients have other spellings there; what is gathered is at most the same."""
    total: Counter[tuple[str, str]] = Counter()
    for each in found(case, sizes, target):
        assert each.kind not in ("all-to-all", "ragged-all-to-all"), each
        kind = each.implements or each.kind
        if kind in ("all-gather", "collective-permute"):
            total[kind, "-".join(each.axes)] += each.count * each.bytes
    known = expected(case, sizes)
    # GPUs may gather the output's gradient once for the heads and once for the weight.
    known["all-gather", "tensor"] += T * M * FLOAT
    # Gradients of matrices that all heads share may be summed into parts over tensor: each half is
    # then sent once to where fsdp stores it, by a permutation over both axes.
    known["all-gather", "fsdp-tensor"] += MIXED[case].whole // 2 * FLOAT
    more = {key: (size, known[key]) for key, size in total.items() if size > known[key] + SCALARS}
    assert not more, f"(found, by hand): {more}"
    # TPUs may gather float32 as the bfloat16 that they multiply.
    of_weights = "all-gather", "expert" if sizes == EXPERT else "fsdp"
    assert total[of_weights] >= known[of_weights] // 2
