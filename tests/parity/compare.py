"""Define how close the package must be to live and to recorded results."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from moe_shard.config import Config
from tests.parity.package import Answer


class Known(Protocol):
    """Hold the results of transformers; the fields are those of `reference.Reference`."""

    logits: np.ndarray
    router_logits: np.ndarray
    ce_loss: float
    aux_loss: float | None


def assert_forward(found: Answer, known: Known, config: Config) -> None:
    """Compare logits to 1e-4, router logits to 1e-5 of their largest, and losses to 1e-5."""
    np.testing.assert_allclose(found.logits, known.logits, rtol=1e-4, atol=1e-4)
    assert_near(found.router_logits, known.router_logits, 1e-5)
    np.testing.assert_allclose(found.ce_loss, known.ce_loss, rtol=1e-5)
    moe = config.model.moe
    assert moe is not None
    if known.aux_loss is None:
        assert moe.load_balance_loss_weight == 0
    else:
        weighed = known.aux_loss * moe.load_balance_loss_weight
        np.testing.assert_allclose(found.aux_loss, weighed, rtol=1e-5)


def assert_near(found: Any, known: Any, tolerance: float) -> None:
    """Check that the largest error is at most `tolerance` times the largest value."""
    assert found.shape == known.shape
    error = np.max(np.abs(found - known)) / np.max(np.abs(known))
    assert error <= tolerance, f"relative error {error:.1e}"
