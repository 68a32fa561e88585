"""Group parameters by kind from their names; the groups together are the whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from moe_shard.models.params import describe
from moe_shard.program.kinds import PARAM_KINDS, kind_of, kinds_of, norms_by_kind
from tests.models.build import annotator, random_params, small_config

EVERYTHING = (
    "dense_layers=[0]",
    "base_num_decoder_layers=4",
    "mixer_pattern=[attention, gated_delta_net, mamba2, short_convolution]",
    "gdn_num_key_heads=2",
    "gdn_num_value_heads=4",
    "gdn_key_head_dim=8",
    "gdn_value_head_dim=8",
    "shared_experts=1",
    "shared_expert_gate=true",
    "routed_bias=true",
    "use_qk_norm=true",
    "mlp_bias=true",
    "attention_sink=true",
)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("embedding.table", "embedding"),
        ("embedding.kernel", "head"),
        ("final_norm.scale", "norms"),
        ("layers.attention_norm.scale", "norms"),
        ("layers_1.attention.key_norm.scale", "norms"),
        ("layers_1.attention.latent_up", "attention"),
        ("layers_1.attention.sink", "attention"),
        ("layers_1.mlp.router.correction_bias", "router"),
        ("layers_1.mlp.experts.gate_up_bias", "experts"),
        ("layers_1.mlp.latent.down", "experts"),
        ("layers_1.mlp.shared.gate", "shared_experts"),
        ("layers_1.mlp.shared_gate", "shared_experts"),
        ("layers_0.mlp.gate", "dense_mlp"),
        ("layers_0.conv.kernel", "other"),
        ("adapter", "other"),
    ],
)
def test_names_by_hand(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_a_model_with_every_kind_has_no_other_and_loses_nothing() -> None:
    config = small_config({"expert": 8}, *EVERYTHING)
    specs = describe(config.model, annotator(config)).specs
    assert kinds_of(specs) == PARAM_KINDS[:-1]
    params = random_params(config)
    check_whole(params, specs)


def test_a_parameter_of_no_known_kind_counts_as_other() -> None:
    config = small_config({"expert": 8}, "base_num_decoder_layers=1")
    specs = describe(config.model, annotator(config)).specs
    params = random_params(config)
    scale = specs["final_norm"]["scale"]
    specs["novel"] = {"matrix": replace(scale, name="novel.matrix")}
    params["novel"] = {"matrix": np.full(scale.shape, 3, np.float32)}
    assert kinds_of(specs)[-1] == "other"
    found = check_whole(params, specs)
    np.testing.assert_allclose(found[-1], 3 * np.sqrt(scale.shape[0]), rtol=1e-6)


def check_whole(params: Any, specs: Any) -> np.ndarray:
    found = np.asarray(jax.jit(lambda p: norms_by_kind(p, specs))(params))
    whole = np.sqrt(sum(np.sum(np.float64(x) ** 2) for x in jax.tree.leaves(params)))
    np.testing.assert_allclose(np.linalg.norm(np.float64(found)), whole, rtol=1e-6)
    return found
