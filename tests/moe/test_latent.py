"""Check experts on a latent: they are the oracle's, with both projections in their weights.

An expert whose gate is P @ gate, its up P @ up and its down down @ Q is one on the latent x @ P
whose sum goes through Q, and the chain rule takes the gradients apart.

    E  experts    M  model dim    L  dim of the latent    H  hidden dim
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from moe_shard.lowering.reports import report_from_text
from tests.moe.build import build_layer, mesh_of
from tests.moe.inputs import Dims, Inputs, random_inputs
from tests.moe.oracle import Answer, Settings, moe_layer
from tests.moe.test_factorisations import assert_equal_to_oracle

DIMS: Dims = {"rows": 8, "tokens": 16, "model": 16, "hidden": 32, "experts": 8}
LATENT = 8
SETTINGS = Settings(capacity_factor=-1.0, load_balance_weight=3.0, z_weight=0.5)
ON_INPUT = dataclasses.replace(SETTINGS, on_input=True)


def inputs_of() -> Inputs:
    inputs = random_inputs(**DIMS)
    rng = np.random.default_rng(11)
    into, out = inputs.params["gate"], inputs.params["down"]
    shapes = {
        "gate": (8, LATENT, into.shape[2]),
        "up": (8, LATENT, into.shape[2]),
        "down": (8, out.shape[1], LATENT),
        "latent_down": (16, LATENT),
        "latent_up": (LATENT, 16),
    }
    for name, shape in shapes.items():
        scale = shape[-2] ** -0.5
        inputs.params[name] = (scale * rng.standard_normal(shape)).astype(np.float32)
    return inputs


def expected_of(inputs: Inputs, settings: Settings) -> Answer:
    """Compute the layer of whole experts, and bring its gradients to the parameters."""
    p = {name: value.astype(np.float64) for name, value in inputs.params.items()}
    into, back = p["latent_down"], p["latent_up"]
    whole = {
        "kernel": p["kernel"],
        "gate": np.einsum("ml,elh->emh", into, p["gate"]),
        "up": np.einsum("ml,elh->emh", into, p["up"]),
        "down": np.einsum("ehl,lm->ehm", p["down"], back),
    }
    found = moe_layer(inputs.x, whole, inputs.cotangent, settings)
    of = found.grads
    grads = {
        "x": of["x"],
        "kernel": of["kernel"],
        "gate": np.einsum("ml,emh->elh", into, of["gate"]),
        "up": np.einsum("ml,emh->elh", into, of["up"]),
        "down": np.einsum("ehm,lm->ehl", of["down"], back),
        "latent_down": sum(np.einsum("emh,elh->ml", of[n], p[n]) for n in ("gate", "up")),
        "latent_up": np.einsum("ehl,ehm->lm", p["down"], of["down"]),
    }
    return dataclasses.replace(found, grads=grads)


@pytest.mark.parametrize(
    ("sizes", "dispatch", "settings"),
    [
        pytest.param({"expert": 8}, "gather", SETTINGS, id="gather"),
        pytest.param(
            {"fsdp": 2, "tensor": 2, "expert": 2}, "ragged", ON_INPUT, id="ragged-on-input"
        ),
    ],
)
def test_outputs_and_gradients(sizes: dict[str, int], dispatch: str, settings: Settings) -> None:
    inputs = inputs_of()
    layer = build_layer(
        mesh_of(sizes), settings, dispatch=dispatch, flag=True, **DIMS, moe_latent_dim=LATENT
    )
    expected = expected_of(inputs, settings)
    assert expected.grads.keys() - {"x"} == inputs.params.keys() == layer.shapes.keys()
    assert_equal_to_oracle(layer.run(inputs), expected)


def test_the_latent_is_what_is_exchanged() -> None:
    sizes = {"expert": 8}
    layer = build_layer(
        mesh_of(sizes), SETTINGS, dispatch="gather", flag=True, **DIMS, moe_latent_dim=LATENT
    )
    report = report_from_text(layer.lower().compile().as_text(), mesh=sizes)
    assert report.verdict == "expert-parallel"
    moved = [each for each in report.collectives if each.kind == "all-to-all"]
    # Each way, forward and backward: a slot of float32 for each of 16 tokens, of 8 experts.
    assert sum(each.count for each in moved) == 4
    assert {each.bytes for each in moved} == {8 * 16 * LATENT * 4}
