"""Every remat policy keeps what it names, recomputes the rest, and changes no number."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_shard.config import check_against_mesh
from moe_shard.config.remat_config import RematConfig
from moe_shard.models.params import describe
from moe_shard.models.remat import kept
from tests.models.build import (
    Evaluated,
    annotator,
    assert_close,
    evaluate,
    random_batch,
    random_params,
    small_config,
)

EXPERT8 = {"expert": 8}
CUSTOM = (
    "remat_policy=custom", "decoder_layer_input=offload", "query_proj=device", "out_proj=offload",
    "moe_exchanged=device", "moe_mlpwi_0=offload",
)  # fmt: skip


@functools.cache
def products(*overrides: str) -> int:
    """Count the products of [rows, features] in loss and gradients, attention's own left out."""
    config = small_config(EXPERT8, "base_num_decoder_layers=1", *overrides)
    model = describe(config.model, annotator(config))
    tokens = jax.ShapeDtypeStruct((8, 16), jnp.int32)
    params = jax.tree.map(lambda spec: spec.abstract(), model.specs)

    def loss(params: object, tokens: jax.Array) -> jax.Array:
        return jnp.sum(model.apply(params)(tokens, tokens, tokens)[0])  # type: ignore[arg-type]

    text = str(jax.make_jaxpr(jax.grad(loss))(params, tokens))
    return len(re.findall(r"\bdot_general\[", text))


@pytest.mark.parametrize(
    ("policy", "saved"),
    [
        ("save_qkv_proj", 3),
        ("qkv_proj_offloaded", 3),
        ("save_out_proj", 1),
        ("save_dot_except_mlp", 4),
        ("save_dot_except_mlpwi", 5),  # the weights' gradients in combine need the experts' output
        ("minimal", 7),
        ("minimal_offloaded", 7),
    ],
)
def test_a_policy_recomputes_fewer_products_than_full(policy: str, saved: int) -> None:
    assert products(f"remat_policy={policy}") == products("remat_policy=full") - saved


def test_what_custom_names_is_not_recomputed() -> None:
    full = products("remat_policy=full")
    assert products("remat_policy=custom") == full
    assert products("remat_policy=custom", "query_proj=device") == full - 1
    assert products("remat_policy=custom", "query_proj=offload", "moe_mlpwi_1=device") == full - 2


@pytest.mark.parametrize(("attention", "saved"), [("dot_product", 1), ("blockwise", 4)])
def test_kept_context_is_not_recomputed(attention: str, saved: int) -> None:
    """Blockwise keeps the weights' sums too, so that no product of a block runs again."""
    how = ("remat_policy=custom", f"attention={attention}")
    assert products(*how, "context=device") == products(*how) - saved


@functools.cache
def evaluated(*overrides: str) -> Evaluated:
    config = small_config(EXPERT8, "base_num_decoder_layers=2", *overrides)
    return evaluate(config, random_params(config), random_batch())


@pytest.mark.parametrize("overrides", [CUSTOM, ("remat_policy=minimal_offloaded",)])
def test_no_number_changes(overrides: tuple[str, ...]) -> None:
    expected, found = evaluated("remat_policy=none"), evaluated(*overrides)
    np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-7)
    assert_close(found.grads, expected.grads, 2e-6)
    assert found.stats is not None
    assert expected.stats is not None
    np.testing.assert_array_equal(found.stats.expert_counts, expected.stats.expert_counts)
    chosen = [len(re.findall(r"\bargmax\[", each.jaxpr)) for each in (expected, found)]
    assert chosen[0] == chosen[1] > 0, "the routing is kept"


def test_a_custom_policy_keeps_its_tensors_where_they_are_named() -> None:
    config = small_config(EXPERT8, *CUSTOM).model
    assert kept(config.remat_policy, config.remat) == (
        ("query_proj", "exchanged"),
        ("decoder_layer_input", "out_proj", "moe_mlpwi_0"),
    )
    assert kept("custom", RematConfig()) == ((), ())


def test_tensors_named_for_another_policy_are_told() -> None:
    config = small_config(EXPERT8, "remat_policy=full", "query_proj=device", "mlpwo=offload")
    notes = check_against_mesh(config, dict(annotator(config).mesh.shape))
    why = "has no effect: remat_policy=full is not custom"
    assert f"query_proj=device, mlpwo=offload {why}" in notes
