"""Adapters beside weights compute what merged weights would, with the gradients of the chain rule.

The judge is the same model without adapters, whose weights NumPy has merged in float64: its logits,
and its weights' gradients dW, of which dA = s dW B^T and dB = s A^T dW.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from moe_shard.config import load_config
from moe_shard.config.lora_config import LoraConfig
from moe_shard.errors import UserError
from moe_shard.runtime.compile import moe_records
from tests.models.build import (
    NO_DROPS,
    annotator,
    assert_close,
    evaluate,
    random_batch,
    random_params,
    small_config,
)

LORA = ("enable_lora=true", "lora_rank=3", "lora_alpha=6")
SCALE = 2.0
MLA = (
    *("attention_type=mla", "q_lora_rank=16", "kv_lora_rank=16", "qk_nope_head_dim=8"),
    *("qk_rope_head_dim=8", "v_head_dim=8"),
)


def merged(params: Any, dw: Any = None) -> tuple[Any, Any]:
    """Return parameters without adapters, merged in float64, and the adapters' gradients by `dw`.

    Args:
        params: parameters with adapters.
        dw: gradients of the merged weights, or None.
    """
    weights: dict[str, Any] = {}
    grads: dict[str, Any] = {}
    for name, value in params.items():
        if not isinstance(value, dict):
            weights[name] = value
        elif not name.endswith("_lora"):
            below = merged(value, None if dw is None else dw[name])
            weights[name] = below[0]
            if below[1]:
                grads[name] = below[1]
    for name, pair in params.items():
        if not name.endswith("_lora"):
            continue
        owner = name.removesuffix("_lora")
        outs = {"inward": {"b": "gate", "b_up": "up"}}.get(owner, {"b": owner})
        a = pair["a"].astype(np.float64)
        lead = 2 if owner in ("inward", "down") and a.ndim == 4 else 1
        flat_a = a.reshape(*a.shape[:lead], -1, a.shape[-1])
        found = {"a": np.zeros_like(a)}
        for key, weight in outs.items():
            b = pair[key].astype(np.float64)
            flat_b = b.reshape(*b.shape[: lead + 1], -1)
            delta = (flat_a @ flat_b).reshape(weights[weight].shape)
            weights[weight] = (weights[weight] + SCALE * delta).astype(np.float32)
            if dw is not None:
                d = dw[weight].astype(np.float64).reshape(*flat_a.shape[:-1], flat_b.shape[-1])
                found["a"] += SCALE * (d @ flat_b.swapaxes(-1, -2)).reshape(a.shape)
                found[key] = SCALE * (flat_a.swapaxes(-1, -2) @ d).reshape(b.shape)
        grads[name] = found
    return weights, grads


def only_adapters(grads: Any) -> Any:
    found = {}
    for name, value in grads.items():
        if name.endswith("_lora"):
            found[name] = value
        elif isinstance(value, dict) and (below := only_adapters(value)):
            found[name] = below
    return found


@pytest.mark.parametrize(
    ("sizes", "overrides"),
    [
        ({"fsdp": 2, "expert": 4}, ("moe_dispatch_no_expert_sharding=true", NO_DROPS)),
        pytest.param(
            {"fsdp": 2, "tensor": 2, "expert": 2},
            ("moe_dispatch=ragged",),
            marks=pytest.mark.recorded,
        ),
        pytest.param(
            {"data": 2, "tensor": 2, "expert": 2},
            (*MLA, NO_DROPS, "shared_experts=1"),
            marks=[pytest.mark.parity, pytest.mark.parity_all],
        ),
        pytest.param(
            {"fsdp": 4, "tensor": 2},
            ("num_experts=1", "num_experts_per_tok=1", "mlp_bias=true"),
            marks=[pytest.mark.parity, pytest.mark.parity_all],
        ),
    ],
    ids=["experts", "ragged", "mla-shared", "dense"],
)
def test_as_merged_weights(sizes: dict[str, int], overrides: tuple[str, ...]) -> None:
    config = small_config(sizes, "base_num_decoder_layers=1", *overrides, *LORA)
    params, batch = random_params(config), random_batch()
    found = evaluate(config, params, batch)
    plain = small_config(sizes, "base_num_decoder_layers=1", *overrides)
    weights, _ = merged(params)
    jax.tree.map(np.subtract, weights, random_params(plain))  # of one structure
    expected = evaluate(plain, weights, batch)
    assert_close({"logits": found.logits}, {"logits": expected.logits}, 2e-5)
    _, of_adapters = merged(params, expected.grads)
    assert_close(only_adapters(found.grads), of_adapters, 3e-5)


def test_which_weights_have_adapters() -> None:
    def names(*overrides: str) -> set[str]:
        params = random_params(small_config({"fsdp": 8}, *LORA, *overrides))
        leaves = jax.tree_util.tree_leaves_with_path(only_adapters(params))
        return {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves}

    attention = {f"layers/attention/{w}_lora/{m}" for w in ("query", "key", "value", "out")
                 for m in "ab"}  # fmt: skip
    experts = {f"layers/mlp/experts/{w}" for w in
               ("inward_lora/a", "inward_lora/b", "inward_lora/b_up", "down_lora/a",
                "down_lora/b")}  # fmt: skip
    assert names() == attention | experts
    assert names("lora_module_path=attention/(query|value)") == {
        name for name in attention if "query" in name or "value" in name
    }
    theirs = "lora_module_path=decoder/layers/.*(self_attention/(query|key|value|out))"
    assert names(theirs) == attention
    assert names("lora_module_path=MoeBlock_0/(wi_0|wi_1|wo)") == experts
    with pytest.raises(UserError, match="adapts one of gate and up"):
        names("lora_module_path=experts/up")
    with pytest.raises(UserError, match="lora_module_path=experts/gat_ is in the path of no") as no:
        names("lora_module_path=experts/gat_")
    assert "fix: one of attention/query, attention/key" in str(no.value)


DEEPSEEK = (
    r"decoder/(dense_layers|moe_stack)/self_attention/(query|out|wkv_a|wkv_b)"
    r"|decoder/(dense_layers|moe_stack)/(mlp|shared_experts)/(wi_0|wi_1|wo)"
)
"""The patterns of these tests are from MaxText 0.2.5, post_train/lora_module_path.yml."""


@pytest.mark.parametrize(
    ("pattern", "dense", "moe"),
    [
        (r"decoder/layers/.*(self_attention/(query|key|value|out)|mlp/(wi_0|wi_1|wo))",
         {"attention/query", "attention/out", "mlp/gate", "mlp/down"},
         {"attention/query", "attention/out"}),
        (DEEPSEEK,
         {"attention/query", "attention/out", "attention/latent_down", "attention/latent_up",
          "mlp/gate", "mlp/down"},
         {"attention/query", "attention/out", "attention/latent_down", "attention/latent_up",
          "mlp/shared/gate", "mlp/shared/down"}),
        (r"decoder/layers/.*(GptOssAttention/(query|key|value|out)|GptOssMlp/(wi_0|wi_1|wo))",
         {"attention/query", "attention/out"},
         {"attention/query", "attention/out", "mlp/experts/gate", "mlp/experts/down"}),
        (r"decoder/scanned_blocks/layers.*/.*(MoeBlock_0|shared_experts)/(wi_0|wo)", set(),
         {"mlp/experts/gate", "mlp/experts/down", "mlp/shared/gate", "mlp/shared/down"}),
        (r"decoder/dense_layers/.*query", {"attention/query"}, set()),
        (r"DeepSeekMoeBlock_0/MoeBlock_0/wi_0", set(), {"mlp/experts/gate"}),
        (r"decoder/layers/moe_block/wo", set(), {"mlp/experts/down"}),
    ],
    ids=["default", "deepseek", "gpt-oss", "cycles", "dense", "nested", "qwen"],
)  # fmt: skip
def test_patterns_of_maxtexts_models_find_the_same_weights(
    pattern: str, dense: set[str], moe: set[str]
) -> None:
    lora = LoraConfig(enable_lora=True, lora_rank=1, lora_alpha=1.0, lora_module_path=pattern)
    attention = {f"attention/{name}" for name in ("query", "out", "latent_down", "latent_up")}
    experts = {f"mlp/{at}/{name}" for at in ("experts", "shared") for name in ("gate", "down")}
    assert {path for path in attention | experts if lora.adapts(path)} == moe
    mlp = {"mlp/gate", "mlp/down"}
    assert {path for path in attention | mlp if lora.adapts(path, moe=False)} == dense


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (("enable_lora=true",), "lora_rank=0 and lora_alpha=0 would add nothing"),
        (("lora_module_path=query",), "enable_lora=false"),
        (("lora_rank=4",), "lora_rank=4 has no effect: enable_lora=false"),
        ((*LORA, "lora_module_path=("), "no regular expression"),
        ((*LORA, "trainable_parameters_mask=query"), "trains the adapters"),
        ((*LORA, "mtp_num_layers=1"), "adapters are of decoder layers"),
    ],
)
def test_what_does_not_go_together(overrides: tuple[str, ...], part: str) -> None:
    with pytest.raises(UserError, match=part):
        load_config("mixtral-tiny", list(overrides))


def test_the_record_says_that_gate_and_up_stay_apart() -> None:
    config = small_config({"fsdp": 2, "expert": 4}, *LORA)
    for record in moe_records(config, annotator(config)).values():
        assert record.not_taken["fused-gate-up"] == "adapters have products between"
