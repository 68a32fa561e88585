"""Compare the slots that checkpoints fill, read from the abstract model, with slots by hand."""

from __future__ import annotations

import pytest

from moe_shard.autoep.param_shapes import Slot, slots_of
from moe_shard.config import load_config

TINY = ("base_emb_dim=24", "base_num_query_heads=4", "base_num_kv_heads=2", "head_dim=6")


def test_a_layer_has_no_dim_of_layers_an_expert_none_of_experts() -> None:
    model = load_config(
        "mixtral-tiny",
        [*TINY, "base_moe_mlp_dim=10", "num_experts=3", "vocab_size=40", "attention_bias=true"],
    ).model
    slots = slots_of(model)
    table = Slot((40, 24), 0, ("vocab_size", "base_emb_dim"))
    assert slots.outer["embedding.table"] == table
    (layer,) = slots.layers.values()
    width = ("base_moe_mlp_dim", "base_emb_dim")
    assert layer["mlp.experts.gate"] == layer["mlp.experts.up"] == Slot((24, 10), 1, width)
    assert layer["mlp.experts.down"] == Slot((10, 24), 1, width)
    assert layer["mlp.router.kernel"] == Slot((24, 3), 1, ("num_experts", "base_emb_dim"))
    heads = ("base_num_query_heads", "head_dim", "base_emb_dim")
    assert layer["attention.query"] == Slot((24, 4, 6), 1, heads)
    assert layer["attention.out"] == Slot((4, 6, 24), 2, heads)
    assert layer["attention.key_bias"] == Slot((2, 6), 0, ("base_num_kv_heads", "head_dim"))
    assert layer["mlp_norm.scale"] == Slot((24,), 0, ("base_emb_dim",))


def test_gate_and_up_are_apart_however_the_model_keeps_them() -> None:
    apart = load_config("mixtral-tiny", ["mlp_bias=true"]).model
    as_one = load_config("mixtral-tiny", ["mlp_bias=true", "prefuse_moe_weights=true"]).model
    assert slots_of(as_one) == slots_of(apart)


@pytest.mark.parametrize("rank", [0, 12])
def test_latent_attention_names_its_own_settings(rank: int) -> None:
    model = load_config(
        "deepseek2-16b",
        [
            *("base_emb_dim=24", "base_num_query_heads=4", "base_num_kv_heads=4"),
            *(f"q_lora_rank={rank}", "kv_lora_rank=8"),
        ],
    ).model
    dense, moe = slots_of(model).layers.values()
    for layer in (dense, moe):
        latent = ("kv_lora_rank", "qk_rope_head_dim", "base_emb_dim")
        assert layer["attention.latent_down"] == Slot((24, 8 + 64), 1, latent)
        assert layer["attention.latent_norm.scale"] == Slot((8,), 0, ("kv_lora_rank",))
        up = layer["attention.latent_up"]
        assert up[:2] == ((8, 4, 128 + 128), 1)
        assert {*up.keys} >= {"kv_lora_rank", "v_head_dim", "qk_nope_head_dim"}
        query = layer["attention.query_up" if rank else "attention.query"]
        assert query[:2] == ((rank or 24, 4, 128 + 64), 1)
        assert ("q_lora_rank" in query.keys) == bool(rank)
        assert layer["attention.out"].keys == (
            "base_num_query_heads",
            "v_head_dim",
            "base_emb_dim",
        )
    assert dense["mlp.gate"].keys == ("base_mlp_dim", "base_emb_dim")
    assert moe["mlp.shared.gate"].keys[:2] == ("shared_experts", "shared_expert_mlp_dim")
