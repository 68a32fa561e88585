"""A step that reorders tokens over a context axis has the numbers of one that does not."""

from __future__ import annotations

import numpy as np
import pytest

from moe_shard.layers.attention_record import attention_records
from moe_shard.layers.kernels.load_balance import order_tokens
from tests.models.build import (
    NO_DROPS,
    annotator,
    architecture,
    assert_close,
    random_batch,
    random_params,
    small_config,
)
from tests.models.oracle import dense_grads
from tests.program.test_step import SGD, one_step

SIZES = {"context": 4, "fsdp": 2}
RING = "context_parallel_strategy=ring"


@pytest.mark.parametrize(
    "overrides",
    [(NO_DROPS,), (NO_DROPS, RING, "moe_dispatch=ragged"), ("capacity_factor=1",)],
    ids=["gathered", "ring", "in-order"],
)
def test_gradients_are_those_of_the_oracle(overrides: tuple[str, ...]) -> None:
    config = small_config(SIZES, *SGD, *overrides)
    is_reordered = order_tokens(config.model, annotator(config), 16).order is not None
    assert is_reordered == (NO_DROPS in overrides)
    batch = random_batch()
    gradient, _, metrics = one_step(config, batch)
    of_oracle = {name: a[0] for name, a in batch.items()}
    loss, grads = dense_grads(random_params(config), of_oracle, architecture(config))
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    assert_close(gradient, grads)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ((NO_DROPS,), "reordered (an early and a late chunk on each device)"),
        ((NO_DROPS, "context_parallel_load_balance=false"), "context_parallel_load_balance=false"),
        (("capacity_factor=1.5",), "capacity_factor=1.5 drops by position"),
        (("capacity_factor=1.5", "drop_policy=probability"), "reordered"),
        (
            ("moe_dispatch=ragged", "ragged_buffer_factor=2"),
            "ragged_buffer_factor=2 drops by position",
        ),
        (
            (NO_DROPS, "attention_pattern=[sliding]", "sliding_window_size=4"),
            "every token has the work of its window",
        ),
        ((NO_DROPS, "max_target_length=12"), "12 tokens do not make 8 equal chunks"),
    ],
    ids=str,
)
def test_the_record_says_in_which_order(overrides: tuple[str, ...], words: str) -> None:
    config = small_config(SIZES, *overrides)
    tokens = config.train.max_target_length
    (record,) = attention_records(config.model, annotator(config), (8, tokens)).values()
    assert words in record.context
    assert record.context.startswith("keys and values gathered over context; tokens ")


def test_nothing_is_said_of_order_where_sequences_are_whole() -> None:
    config = small_config({"fsdp": 8}, NO_DROPS)
    (record,) = attention_records(config.model, annotator(config), (8, 16)).values()
    assert record.context == "none"
    assert order_tokens(config.model, annotator(config), 16).order is None


def test_a_ring_is_recorded() -> None:
    config = small_config(SIZES, NO_DROPS, RING)
    records = attention_records(config.model, annotator(config), (8, 16))
    assert list(records) == ["layers 0-2"]
    (record,) = records.values()
    assert record.implementation == "blockwise"
    assert record.context.startswith("keys and values pass round context; tokens reordered")
