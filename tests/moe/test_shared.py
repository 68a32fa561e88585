"""Check shared experts: the oracle's routed experts and, for every token, a gated MLP in NumPy."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from moe_shard.lowering.reports import report_from_text
from tests.moe.build import build_layer, mesh_of
from tests.moe.inputs import Dims, Inputs, random_inputs
from tests.moe.oracle import Answer, Settings, activation, moe_layer
from tests.moe.test_factorisations import assert_equal_to_oracle, label

DIMS: Dims = {"rows": 8, "tokens": 16, "model": 16, "hidden": 32, "experts": 8}
SHARED_DIM = 24
PLAIN = Settings(capacity_factor=-1.0, load_balance_weight=3.0, z_weight=0.5)
CLAMPED = dataclasses.replace(PLAIN, limit=0.7, offset=1.0)
BIASES = ("gate_bias", "up_bias", "down_bias")
MESHES = [{"expert": 8}, {"fsdp": 2, "tensor": 2, "expert": 2}, {"context": 2, "expert": 4}]


def inputs_of(*, biases: bool, score: bool) -> Inputs:
    inputs = random_inputs(**DIMS, biases=BIASES if biases else ())
    rng = np.random.default_rng(7)
    shapes: dict[str, tuple[int, ...]] = {
        "gate": (16, SHARED_DIM),
        "up": (16, SHARED_DIM),
        "down": (SHARED_DIM, 16),
    }
    if biases:
        shapes |= {"gate_bias": (SHARED_DIM,), "up_bias": (SHARED_DIM,), "down_bias": (16,)}
    if score:
        shapes["score"] = (16,)
    for name, shape in shapes.items():
        inputs.params[f"shared_{name}"] = (0.3 * rng.standard_normal(shape)).astype(np.float32)
    return inputs


def with_shared(routed: Answer, inputs: Inputs, settings: Settings) -> Answer:
    """Add the shared experts, and their gradients, to the oracle's outputs."""
    p = {
        name.removeprefix("shared_"): value.astype(np.float64)
        for name, value in inputs.params.items()
        if name.startswith("shared_")
    }
    x = inputs.x.reshape(-1, 16).astype(np.float64)
    cotangent = inputs.cotangent.reshape(-1, 16).astype(np.float64)
    u, w = x @ p["gate"] + p.get("gate_bias", 0), x @ p["up"] + p.get("up_bias", 0)
    act, slope = activation(settings.activation, np.minimum(u, settings.limit))
    lin = np.clip(w, -settings.limit, settings.limit) + settings.offset
    out = (act * lin) @ p["down"] + p.get("down_bias", 0)
    share = 1 / (1 + np.exp(-x @ p["score"]))[:, None] if "score" in p else np.ones((len(x), 1))

    dout = share * cotangent
    dhidden = dout @ p["down"].T
    du = dhidden * lin * slope * (u < settings.limit)
    dw = dhidden * act * (np.abs(w) < settings.limit)
    dx = du @ p["gate"].T + dw @ p["up"].T
    grads = {
        "gate": x.T @ du, "up": x.T @ dw, "down": (act * lin).T @ dout,
        "gate_bias": du.sum(axis=0), "up_bias": dw.sum(axis=0), "down_bias": dout.sum(axis=0),
    }  # fmt: skip
    if "score" in p:
        dscore = np.sum(cotangent * out, axis=1, keepdims=True) * share * (1 - share)
        grads["score"] = (dscore * x).sum(axis=0)
        dx += dscore * p["score"]
    all_grads = dict(routed.grads) | {f"shared_{name}": grads[name] for name in p}
    all_grads["x"] = routed.grads["x"] + dx.reshape(inputs.x.shape)
    y = share * out
    return dataclasses.replace(
        routed,
        y=routed.y + y.reshape(inputs.x.shape),
        total=routed.total + float(np.sum(y * cotangent)),
        grads=all_grads,
    )


@pytest.mark.parametrize("sizes", MESHES, ids=label)
@pytest.mark.parametrize(
    ("dispatch", "settings", "biases", "score"),
    [
        pytest.param("gather", PLAIN, False, False, id="plain"),
        pytest.param("gather", CLAMPED, True, True, id="clamped-biased-scored"),
        pytest.param("ragged", CLAMPED, True, True, id="ragged-clamped-biased-scored"),
    ],
)
def test_outputs_and_gradients(
    sizes: dict[str, int], dispatch: str, settings: Settings, biases: bool, score: bool
) -> None:
    inputs = inputs_of(biases=biases, score=score)
    layer = build_layer(
        mesh_of(sizes), settings, dispatch=dispatch, flag=True, biases=biases, **DIMS,
        shared_experts=2, shared_expert_mlp_dim=SHARED_DIM, shared_expert_gate=score,
    )  # fmt: skip
    routed = moe_layer(inputs.x, inputs.params, inputs.cotangent, settings)
    expected = with_shared(routed, inputs, settings)
    assert expected.grads.keys() - {"x"} == inputs.params.keys() == layer.shapes.keys()
    assert_equal_to_oracle(layer.run(inputs), expected)


def test_the_size_is_that_of_so_many_routed_ones_where_none_is_said() -> None:
    layer = build_layer(
        mesh_of({"expert": 8}), PLAIN, dispatch="gather", flag=True, **DIMS, shared_experts=3
    )
    assert layer.shapes["shared_down"].shape == (3 * 32, 16)


@pytest.mark.parametrize("dispatch", ["gather", "ragged"])
def test_their_gathered_weights_are_no_experts_weights_to_the_verdict(dispatch: str) -> None:
    sizes = {"expert": 8}
    layer = build_layer(
        mesh_of(sizes), PLAIN, dispatch=dispatch, flag=True, **DIMS,
        shared_experts=1, shared_expert_gate=True,
    )  # fmt: skip
    report = report_from_text(layer.lower().compile().as_text(), mesh=sizes)
    assert report.verdict == "expert-parallel"
    gathered = [each.scope for each in report.collectives if each.kind == "all-gather"]
    assert gathered.count("mlp") >= 3  # gate, up, down, which FSDP stores over all axes
    assert "experts" not in gathered
