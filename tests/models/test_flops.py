"""Operations of models whose layers differ equal counts made by hand."""

from __future__ import annotations

import pytest

from moe_shard.config import load_config
from moe_shard.config.mesh_config import MESH_AXES
from moe_shard.models.flops import step_flops_per_token
from moe_shard.models.params import describe
from moe_shard.program.trainable import ADAPTERS, Trainable
from tests.models.build import annotator, flops_per_token, products_per_token, small_config

SMALL = (
    "base_num_decoder_layers=4", "base_emb_dim=16", "base_num_query_heads=4",
    "base_num_kv_heads=2", "head_dim=8", "base_mlp_dim=64", "base_moe_mlp_dim=32",
    "vocab_size=100", "num_experts=8", "num_experts_per_tok=2",
)  # fmt: skip
ATTENTION = 16 * 8 * (4 + 2 + 2 + 4)
DENSE = 3 * 16 * 64
MOE = 16 * 8 + 2 * 3 * 16 * 32
LOGITS = 16 * 100


def active(*overrides: str) -> int:
    return products_per_token(small_config({"data": 8}, *SMALL, *overrides))


@pytest.mark.parametrize(
    ("overrides", "moe_layers"),
    [
        ((), 4),
        (("first_num_dense_layers=1",), 3),
        (("interleave_moe_layer_step=2",), 2),
        (("dense_layers=[3, 0]",), 2),
    ],
)
def test_dense_layers_have_one_wide_mlp(overrides: tuple[str, ...], moe_layers: int) -> None:
    by_hand = 4 * ATTENTION + moe_layers * MOE + (4 - moe_layers) * DENSE + LOGITS
    assert active(*overrides) == by_hand


@pytest.mark.parametrize(
    ("overrides", "each"),
    [
        (("shared_experts=2",), 3 * 16 * 2 * 32),
        (("shared_experts=1", "shared_expert_mlp_dim=80"), 3 * 16 * 80),
        (("shared_experts=1", "shared_expert_gate=true"), 3 * 16 * 32 + 16),
        (("moe_latent_dim=4",), 2 * 16 * 4 - 2 * 3 * (16 - 4) * 32),
    ],
)
def test_shared_experts_and_latents_are_of_every_token(
    overrides: tuple[str, ...], each: int
) -> None:
    assert active(*overrides) == active() + 4 * each


def test_a_gate_is_as_large_as_the_queries() -> None:
    assert active("attention_output_gate=true") == active() + 4 * 16 * 4 * 8


@pytest.mark.parametrize(
    ("rank", "queries"), [(0, 16 * 4 * (6 + 2)), (12, 16 * 12 + 12 * 4 * (6 + 2))]
)
def test_latent_attention(rank: int, queries: int) -> None:
    config = small_config(
        {"data": 8}, *SMALL, "attention_type=mla", f"q_lora_rank={rank}", "kv_lora_rank=10",
        "qk_nope_head_dim=6", "qk_rope_head_dim=2", "v_head_dim=5",
    )  # fmt: skip
    each = queries + 16 * (10 + 2) + 10 * 4 * (6 + 5) + 4 * 5 * 16
    by_hand = 4 * (each + MOE) + LOGITS
    assert products_per_token(config) == by_hand
    # Of 7 tokens' keys (6 + 2) and values (5), for 4 heads: 2 operations forward, 4 backward.
    scores = 4 * 6 * 4 * (6 + 2 + 5) * 7
    assert flops_per_token(config, seq_len=7) == 6 * by_hand + scores


def test_an_indexer_scores_without_a_backward_pass() -> None:
    overrides = (
        *("attention_type=mla", "q_lora_rank=12", "kv_lora_rank=10", "qk_nope_head_dim=6"),
        *("qk_rope_head_dim=2", "v_head_dim=5", "use_indexer=true", "indexer_topk=7"),
        *("indexer_n_heads=3", "indexer_head_dim=4"),
    )
    config = small_config({"data": 8}, *SMALL, *overrides)
    within, beyond = (flops_per_token(config, seq_len=tokens) for tokens in (7, 8))
    # In 4 layers: one token more for 4 heads of 6 + 2 and 5, and 3 heads of 4 against 8 tokens and
    # from a latent of 12.
    assert beyond - within == 4 * (6 * 4 * (6 + 2 + 5) + 2 * 3 * 4 * (8 + 12))


def test_mtp_layers_are_layers_with_a_projection_and_logits_of_their_own() -> None:
    overrides = ("first_num_dense_layers=1", "mtp_num_layers=2")
    by_hand = 6 * ATTENTION + 5 * MOE + DENSE + 2 * (2 * 16 * 16) + 3 * LOGITS
    assert active(*overrides) == by_hand
    config = small_config({"data": 8}, *SMALL, *overrides)
    scores = 6 * 6 * 4 * (8 + 8) * 7  # of 7 tokens, 4 heads, in 6 layers
    assert flops_per_token(config, seq_len=7) == 6 * by_hand + scores


@pytest.mark.parametrize(
    ("model", "billions"),
    [
        ("deepseek2-16b", 2.4),
        ("deepseek3-671b", 37),
        ("qwen3-30b-a3b", 3.3),
        ("gpt-oss-20b", 3.6),
        ("llama4-17b-16e", 17),
    ],
)
def test_published_models_have_their_published_active_parameters(
    model: str, billions: float
) -> None:
    mesh = [f"ici_{axis}_parallelism={8 if axis == 'expert' else 1}" for axis in MESH_AXES]
    config = load_config(model, mesh)
    assert products_per_token(config) / 1e9 == pytest.approx(billions, rel=0.08)


def trained(*overrides: str, patterns: tuple[str, ...] = ()) -> int:
    """Count the operations for a token of training what patterns name, of sequences of 7."""
    config = small_config({"data": 8}, *SMALL, *overrides)
    specs = describe(config.model, annotator(config)).specs
    some = Trainable(patterns, specs).of(specs)
    return step_flops_per_token(config.model, specs, some, seq_len=7)


SCORES = 2 * 4 * (8 + 8) * 7
"""Operations of a token's scores and values in a layer, forward."""


def test_what_is_not_trained_has_no_gradient_of_its_own() -> None:
    layers = 4 * (ATTENTION + MOE)
    everything = 6 * (layers + LOGITS) + 4 * 3 * SCORES
    assert trained() == everything
    routed, shared = 4 * 2 * 3 * 16 * 32, 4 * 16 * 8 * (4 + 4)  # query and out
    some = trained(patterns=("experts", "attention/(query|out)"))
    assert some == everything - 2 * (layers + LOGITS - routed - shared)
    # Nothing before the head is trained: no gradient passes it.
    forward = 2 * (layers + LOGITS) + 4 * SCORES
    assert trained(patterns=("embedding/kernel",)) == forward + 2 * LOGITS
    assert trained(patterns=("final_norm",)) == forward + 2 * LOGITS
    assert trained(patterns=("embedding/table",)) == 2 * forward - 4 * SCORES + 4 * 2 * SCORES
    tied = trained("logits_via_embedding=true", patterns=("embedding/table",))
    assert tied == trained(patterns=("embedding/table",)) + 2 * LOGITS


def test_no_gradient_passes_layers_before_those_that_are_trained() -> None:
    dense = ("first_num_dense_layers=1",)
    first, rest = ATTENTION + DENSE, 3 * (ATTENTION + MOE)
    found = trained(*dense, patterns=("layers_1/attention/query",))
    query = 3 * 16 * 8 * 4
    assert found == 2 * first + SCORES + 4 * (rest + LOGITS) + 3 * 3 * SCORES + 2 * query


def test_adapters_are_trained_and_their_weights_are_not() -> None:
    rank = 3
    lora = ("enable_lora=true", f"lora_rank={rank}", "lora_alpha=6")
    attention = rank * (3 * 16 + 8 * (4 + 2 + 2) + 8 * 4 + 16)
    # Of the 2 experts of a token: gate and up share A.
    experts = 2 * rank * (16 + 32 + 32 + 32 + 16)
    weights = 4 * (ATTENTION + MOE) + LOGITS
    adapters = 4 * (attention + experts)
    assert trained(*lora, patterns=(ADAPTERS,)) == 4 * weights + 6 * adapters + 4 * 3 * SCORES


def test_mtp_layers_alone() -> None:
    mtp = ("mtp_num_layers=1",)
    layers, ahead = 4 * (ATTENTION + MOE), ATTENTION + MOE + 2 * 16 * 16
    found = trained(*mtp, patterns=("^mtp/",))
    assert found == 2 * (layers + LOGITS) + 4 * SCORES + 6 * ahead + 4 * LOGITS + 3 * SCORES
