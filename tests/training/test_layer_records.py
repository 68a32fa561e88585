"""Make the record of layers: loads by hand, every kind and layer by name."""

from __future__ import annotations

import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_shard.program.step import make_program
from moe_shard.training.device_memory import memory_in_use
from moe_shard.training.layer_records import LayerRecords, expert_loads
from tests.models.build import annotator, small_config


def test_loads_by_hand() -> None:
    counts = np.array([[4, 0, 0, 0], [3, 3, 3, 3], [4, 2, 2, 0]], np.float32)
    found = expert_loads(counts)
    np.testing.assert_array_equal(found["expert_load_max_over_mean"], [4, 1, 2])
    np.testing.assert_array_equal(found["expert_load_min_over_mean"], [0, 1, 0])
    # 4/8, 2/8, 2/8: 1.5 bits of 2.
    np.testing.assert_allclose(found["expert_load_entropy"], [0, 1, 0.75], rtol=1e-15)
    assert expert_loads(np.ones((2, 1), np.float32))["expert_load_entropy"].tolist() == [1, 1]


def metrics_of(kinds: int, layers: int) -> dict[str, Any]:
    by_kind = {
        f"{name}_norm_by_kind": jnp.arange(kinds, dtype=jnp.float32) + at
        for at, name in enumerate(("grad", "param", "update"))
    }
    return by_kind | {
        "loss": jnp.ones(()),
        "expert_counts": jnp.tile(jnp.arange(8.0), (layers, 1)),
        "dropped_by_layer": jnp.array([0.1, math.nan][:layers]),
        "router_z_by_layer": jnp.array([2.0, math.inf][:layers]),
    }


def test_a_record_names_layers_and_kinds() -> None:
    config = small_config({"data": 8}, "dense_layers=[1]", "base_num_decoder_layers=3")
    program = make_program(config, annotator(config))
    records = LayerRecords(config.model, program)
    metrics = metrics_of(7, 2)
    found = json.loads(json.dumps(records.record(5, metrics), allow_nan=False))
    assert found["step"] == 5
    assert found["layers"] == [0, 2]
    kinds = ["norms", "attention", "router", "experts", "dense_mlp", "embedding", "head"]
    assert found["grad_norm"] == dict(zip(kinds, range(7), strict=True))
    assert found["update_norm"]["head"] == 8
    assert found["expert_load_max_over_mean"] == [2, 2]
    assert found["dropped_token_fraction"] == [0.1, None]
    assert found["router_z"] == [2, None]
    assert "router_bias_norm" not in found
    biased = records.record(5, metrics | {"router_bias_norm_by_layer": jnp.array([1.0, 2.0])})
    assert biased["router_bias_norm"] == [1, 2]


def test_a_dense_model_has_no_layers_in_its_record() -> None:
    config = small_config({"data": 8}, "num_experts=1", "num_experts_per_tok=1")
    program = make_program(config, annotator(config))
    metrics = metrics_of(5, 0)
    found = LayerRecords(config.model, program).record(0, metrics)
    assert set(found) == {"step", "memory", "grad_norm", "param_norm", "update_norm"}


def test_memory_of_the_host_where_devices_tell_nothing() -> None:
    found = memory_in_use()
    assert found["of"] == "host"
    assert 2**24 < found["in_use_bytes"] <= found["peak_bytes"] < 2**38


@pytest.mark.parametrize("device_tells", [True, False])
def test_memory_is_that_of_the_fullest_device(
    monkeypatch: pytest.MonkeyPatch, device_tells: bool
) -> None:
    class Device:
        def __init__(self, peak: int) -> None:
            self.peak = peak

        def memory_stats(self) -> dict[str, int]:
            if not device_tells:
                raise jax.errors.JaxRuntimeError("UNIMPLEMENTED")
            return {"bytes_in_use": 5, "peak_bytes_in_use": self.peak, "bytes_limit": 100}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device(7), Device(9)])
    found = memory_in_use()
    if device_tells:
        assert found == {"of": "device", "in_use_bytes": 5, "peak_bytes": 9, "limit_bytes": 100}
    else:
        assert found["of"] == "host"
