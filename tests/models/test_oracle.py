"""The two oracles judge the decoder, so they judge each other first."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tests.models.build import (
    NO_DROPS,
    architecture,
    assert_close,
    random_batch,
    random_params,
    small_config,
)
from tests.models.oracle import dense_loss, forward


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param((), id="drops"),
        pytest.param((NO_DROPS, "use_qk_norm=true", "logits_via_embedding=true"), id="qk-tied"),
        pytest.param(("num_experts=1", "num_experts_per_tok=1"), id="dense"),
    ],
)
def test_the_numpy_and_the_dense_jax_decoder_agree_to_float64(overrides: tuple[str, ...]) -> None:
    config = small_config({"data": 8}, *overrides)
    params, told = random_params(config), architecture(config)
    batch = {name: a[0] for name, a in random_batch(rows=3).items()}
    expected = forward(params, batch["inputs"], batch["positions"], batch["segment_ids"], told)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: a.astype(np.float64), params)
        loss, logits = jax.device_get(dense_loss(wide, batch, told))
    assert_close(logits, expected.logits, 1e-12)
    log_z = np.log(np.sum(np.exp(expected.logits), axis=-1))
    picked = np.take_along_axis(expected.logits, batch["targets"][..., None], axis=-1)[..., 0]
    aux = 0.0
    if told.moe is not None:
        aux += told.moe.load_balance_weight * expected.load_balance.mean()
        aux += told.moe.z_weight * expected.z_loss.mean()
        assert (expected.dropped.sum() > 0) == (told.moe.capacity_factor > 0)
    np.testing.assert_allclose(loss, np.mean(log_z - picked) + aux, rtol=1e-12)
