"""Compile attention for absent accelerators: its kernels, its memory, no array of all pairs.

This needs the compilers of `make targets`: run `make test-targets`. A missing one is a failure.
"""

from __future__ import annotations

import math
import re
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_shard.config import Config, load_config
from moe_shard.config.load import list_models
from moe_shard.layers.kernels.choose import choose_attention
from moe_shard.layers.kernels.rule import AttentionCase, AttentionRule, Tokens
from moe_shard.lowering.collectives import extract_collectives
from moe_shard.lowering.work import product_flops
from moe_shard.runtime.compile_target import compile_for_target
from moe_shard.runtime.targets.target import devices_for, parse_target

pytestmark = pytest.mark.targets

PRIME = 37  # a factor of no other dim
S = 128 * PRIME
GPUS = ["h100:8", "mi355x:8"]
TPUS = ["v5e:2x4", "v6e:2x4"]
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("mi355x:8", *TPUS)]
GPU_KERNELS = {"attention_forward", "attention_dq", "attention_dkv"}
TPU_KERNELS = {
    f"splash_mha_{phase}_segmented_{residuals}"
    for phase, residuals in (("fwd", "residuals"), ("dq", "no_residuals"), ("dkv", "no_residuals"))
}
SCALE = AttentionRule(scale=0.1)
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gpt-oss": {
        "rule": AttentionRule(scale=0.1, span="sliding", window=128),
        "sink": True,
        "kv_heads": 2,
        "dim": 64,
        "value_dim": 64,
    },
    "llama4": {"rule": AttentionRule(scale=0.1, span="chunked", window=2048), "kv_heads": 4},
    "mla": {"dim": 192},
    "soft-cap": {
        "rule": AttentionRule(scale=0.1, soft_cap=30),
        "dtype": "float32",
        "heads": 4,
        "kv_heads": 4,
        "dim": 256,
    },
}


def shapes(hlo: str) -> set[tuple[int, ...]]:
    return {
        tuple(int(size) for size in dims.split(",")) for dims in re.findall(r"\w\[([\d,]+)\]", hlo)
    }


def of_all_pairs(hlo: str) -> list[tuple[int, ...]]:
    """List the shapes of arrays with an element for each pair of tokens, in whatever dims."""

    def squares(shape: tuple[int, ...]) -> bool:
        elements, padded = math.prod(shape), sum(dim >= S for dim in shape) > 1
        return elements >= S * S and (padded or elements % PRIME**2 == 0)

    return sorted(each for each in shapes(hlo) if squares(each))


def test_an_array_of_all_pairs_is_found() -> None:
    kept = f"f32[8,{S},8,512]{{3,2,1,0}} copy(x), bf16[5120,8192] y, s32[{PRIME},{PRIME}] z"
    found = f"pred[2,8,{S},{S}]{{3,2}} a, s32[{PRIME},128,64,{2 * PRIME}] b, u8[{S * S}] c"
    assert of_all_pairs(kept) == [(5120, 8192)]
    assert len(of_all_pairs(found)) == 3


@cache
def attention(target: str, kind: str) -> tuple[str, int]:
    """Compile attention and its gradients, one row a device; return HLO and bytes of scratch."""
    sizes = {"rule": SCALE, "sink": False, "heads": 16, "kv_heads": 16, "dim": 128}
    of: dict[str, Any] = {**sizes, "value_dim": 128, "dtype": "bfloat16", **KINDS[kind]}
    parsed = parse_target(target)
    devices = np.array(devices_for(parsed)).reshape(-1)
    mesh = Mesh(devices, ("data",), axis_types=(AxisType.Auto,))
    kernel = choose_attention(
        "autoselected",
        AttentionCase(
            platform=parsed.platform,
            rule=of["rule"],
            sink=of["sink"],
            rows=1,
            queries=S,
            keys=S,
            heads=of["heads"],
            kv_heads=of["kv_heads"],
            key_dim=of["dim"],
            value_dim=of["value_dim"],
            dtype=of["dtype"],
        ),
    )
    assert kernel.name == "flash", kernel

    def local(q: Any, k: Any, v: Any, positions: Any, segments: Any, sink: Any) -> Any:
        tokens = Tokens(positions, segments, np.arange(S))
        sink = sink if of["sink"] else None
        return kernel.attend(q, k, v, tokens, tokens, rule=of["rule"], sink=sink)

    split = P("data")
    attend = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(*(split,) * 5, P()),
        out_specs=split,
        check_vma=kernel.check_vma,
    )

    def loss(*arrays: Any) -> Any:
        return jnp.sum(attend(*arrays).astype(jnp.float32) ** 2)

    def array(*shape: int, dtype: str = of["dtype"], spec: P = split) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    rows = devices.size
    compiled = (
        jax.jit(jax.grad(loss, (0, 1, 2, 5)))
        .lower(
            array(rows, S, of["heads"], of["dim"]),
            array(rows, S, of["kv_heads"], of["dim"]),
            array(rows, S, of["kv_heads"], of["value_dim"]),
            array(rows, S, dtype="int32"),
            array(rows, S, dtype="int32"),
            array(of["heads"], spec=P()),
        )
        .compile()
    )
    memory, hlo = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None
    assert hlo is not None
    return hlo, memory.temp_size_in_bytes


def kernels(hlo: str) -> set[str]:
    names = "|".join(sorted(GPU_KERNELS | TPU_KERNELS, key=len, reverse=True))
    calls = [line for line in hlo.splitlines() if " custom-call(" in line]
    return {found[0] for line in calls if (found := re.search(names, line))}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", [*GPUS, *TPUS])
def test_three_kernels_and_no_array_of_all_pairs(target: str, kind: str) -> None:
    hlo, _ = attention(target, kind)
    assert kernels(hlo) == (GPU_KERNELS if target in GPUS else TPU_KERNELS)
    assert of_all_pairs(hlo) == []


@pytest.mark.parametrize("target", [*GPUS, *TPUS])
def test_little_more_memory_than_the_output_is_needed(target: str) -> None:
    # XLA's two products need 1.6 GB on v5e and 2.7 GB on h100 for the same.
    hlo, temp = attention(target, "plain")
    output = S * 16 * 128 * 2
    # v5e's compiler keeps the output on the chip between the passes. v6e's has it in main memory,
    # and a fifth as much again for what it slices ahead of the kernels: read in the program.
    assert temp <= (1.25 if target == "v6e:2x4" else 1.1) * output
    module = extract_collectives(hlo).walk.module
    flops = sum(
        product_flops(computation, computation.instruction(name))
        for computation in module.computations.values()
        for name in computation.opcodes
    )
    # Two, three and four products in the three kernels, of half of all pairs.
    assert flops == 9 * 16 * S * S * 128


# One model of each kind of attention; the test below says that there is no other kind.
MODELS = {
    "mixtral-8x7b": ("num_experts_per_tok=2",),
    "gpt-oss-20b": ("num_experts_per_tok=2", "base_num_decoder_layers=2"),
    "llama4-17b-16e": ("base_num_decoder_layers=4", "chunk_attn_window_size=1024"),
    "deepseek2-16b": ("num_experts_per_tok=2", "base_num_decoder_layers=2"),
    "k-exaone-236b-a23b": ("num_experts_per_tok=2", "base_num_decoder_layers=4"),
    "phi3.5-moe": (),
}
SMALL = (
    "base_num_decoder_layers=1",
    "base_emb_dim=128",
    "base_mlp_dim=128",
    "base_moe_mlp_dim=128",
    "base_num_query_heads=4",
    "vocab_size=256",
    "ici_expert_parallelism=8",
    "num_experts=8",
    "moe_dispatch=gather",
    f"max_target_length={S}",
    "per_device_batch_size=1",
)


def small(model: str) -> Config:
    heads = 4 if load_config(model).model.attention.attention_type == "mla" else 2
    return load_config(model, [*SMALL, f"base_num_kv_heads={heads}", *MODELS[model]])


def kind_of(model: str) -> tuple[Any, ...]:
    """Return what of a model's attention an implementation sees."""
    attention = load_config(model).model.attention
    return (
        attention.attention_type,
        sorted(set(attention.attention_pattern)),
        attention.attention_sink,
        attention.attn_logits_soft_cap > 0,
    )


def test_every_kind_of_attention_is_compiled_below() -> None:
    compiled = [kind_of(model) for model in MODELS]
    assert [model for model in list_models() if kind_of(model) not in compiled] == []


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("target", ["h100:8", "cpu:8", *SLOW])
def test_no_array_of_all_pairs_in_the_step_of_any_model(target: str, model: str) -> None:
    report = compile_for_target(small(model), parse_target(target))
    assert report.hlo is not None, report.refusal
    found = {record.implementation for record in report.attention.values()}
    assert found == {"blockwise" if target == "cpu:8" else "flash"}
    assert of_all_pairs(report.hlo) == []
    assert target == "cpu:8" or kernels(report.hlo) == (
        GPU_KERNELS if target in GPUS else TPU_KERNELS
    )
