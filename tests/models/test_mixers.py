"""Which layer has which mixer follows from the keys, and so do parameters, operations, refusals."""

from __future__ import annotations

import jax
import pytest

from moe_shard.config.checks import check_against_mesh
from moe_shard.config.model_config import LayerKind
from moe_shard.errors import UserError
from moe_shard.models.params import describe
from tests.models.build import annotator, flops_per_token, products_per_token, small_config

MIXED = (
    "num_experts=1", "num_experts_per_tok=1", "base_num_decoder_layers=4", "base_emb_dim=16",
    "base_num_query_heads=4", "base_num_kv_heads=2", "head_dim=8", "base_mlp_dim=32",
    "vocab_size=64", "mixer_pattern=[gated_delta_net, attention, none, attention]",
    "layers_without_mlp=[1]", "attention_pattern=[global, sliding]", "sliding_window_size=3",
    "gdn_num_key_heads=2", "gdn_num_value_heads=6", "gdn_key_head_dim=8", "gdn_value_head_dim=5",
    "gdn_conv_kernel_dim=3",
)  # fmt: skip


def test_kinds_of_layers() -> None:
    assert small_config({"data": 8}, *MIXED).model.layer_kinds == (
        LayerKind(moe=False, span="global", rope=False, mixer="gated_delta_net"),
        LayerKind(moe=False, span="sliding", rope=True, mlp=False),
        LayerKind(moe=False, span="global", rope=False, mixer="none"),
        LayerKind(moe=False, span="sliding", rope=True),
    )


def test_parameters_are_named_by_mixer() -> None:
    config = small_config({"data": 8}, *MIXED)
    specs = jax.tree.leaves(describe(config.model, annotator(config)).specs)
    parts: dict[str, set[str]] = {}
    for spec in specs:
        stack, _, rest = spec.name.partition(".")
        if stack.startswith("layers"):
            parts.setdefault(stack, set()).add(rest.partition(".")[0])
    assert parts == {
        "layers_0": {"attention_norm", "delta", "mlp_norm", "mlp"},
        "layers_1": {"attention_norm", "attention"},
        "layers_2": {"mlp_norm", "mlp"},
        "layers_3": {"attention_norm", "attention", "mlp_norm", "mlp"},
    }


def test_operations_are_those_counted_by_hand() -> None:
    model = small_config({"data": 8}, *MIXED)
    # query and key, value and gate, rate and decay, out; then the taps of query, key and value.
    delta = 16 * (2 * 2 * 8 + 2 * 6 * 5 + 2 * 6) + 6 * 5 * 16 + 3 * (2 * 2 * 8 + 6 * 5)
    attention = 16 * 8 * (4 + 2 + 2 + 4)
    products = delta + 2 * attention + 3 * (3 * 16 * 32) + 16 * 64
    assert products_per_token(model) == products
    of_states = 6 * 3 * 6 * 8 * 5
    scores = 2 * 6 * 4 * (8 + 8) * 10
    assert flops_per_token(model, seq_len=10) == 6 * products + of_states + scores


def test_operations_of_convolutions_and_state_spaces() -> None:
    model = small_config(
        {"data": 8}, *MIXED, "mixer_pattern=[mamba2, attention, short_convolution, none]",
        "mamba_num_heads=6", "mamba_head_dim=5", "mamba_num_groups=2", "mamba_state_dim=7",
        "mamba_conv_kernel_dim=3", "short_conv_kernel_dim=4",
    )  # fmt: skip
    # gate, value and out; key and query; step; then the taps of value, key and query.
    mamba = 16 * (3 * 6 * 5 + 2 * 2 * 7 + 6) + 3 * (6 * 5 + 2 * 2 * 7)
    convolution = 16 * 16 * 4 + 4 * 16
    attention = 16 * 8 * (4 + 2 + 2 + 4)
    products = mamba + convolution + attention + 3 * (3 * 16 * 32) + 16 * 64
    assert products_per_token(model) == products
    # Of each state: a value and a key are added, and it is multiplied with the query.
    scores = 6 * 4 * (8 + 8) * 10
    of_states = 6 * 2 * 6 * 5 * 7
    assert flops_per_token(model, seq_len=10) == 6 * products + of_states + scores


def test_a_sequence_of_states_is_not_split() -> None:
    sizes = {"context": 2, "data": 4}
    config = small_config(sizes, *MIXED, "per_device_batch_size=0.5")
    with pytest.raises(UserError) as error:
        check_against_mesh(config, config.mesh.resolve(8))
    lines = str(error.value).splitlines()
    assert "context=2" in lines[0]
    assert "layer 0 (gated_delta_net)" in lines[0]
    assert lines[-1] == "fix: ici_context_parallelism=1"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["mixer_pattern=[]"], "names no mixer"),
        (["mixer_pattern=[mamba]"], "attention, gated_delta_net"),
        (["layers_without_mlp=[4]"], "names layer 4 of 4"),
        (["layers_without_mlp=[1, 2]"], "layer 2 has neither"),
        (["normalization_zero_centered=true", "normalization_type=layer"], "about RMSNorm"),
    ],
)
def test_what_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError) as error:
        small_config({"data": 8}, *MIXED, *overrides)
    assert words in str(error.value)
