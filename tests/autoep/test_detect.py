"""Map every element that transformers writes for small models of each family, exactly once."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moe_shard.autoep.detect import Detected, detect
from moe_shard.checkpoints.resolve import load_model
from moe_shard.models.params import describe
from moe_shard.sharding.annotate import Sharding
from moe_shard.sharding.mesh import mesh_from_config
from moe_shard.sharding.rules import RuleTable
from tests.autoep import oracle
from tests.autoep.directory import small_models, write_model

SMALL = small_models()
FORMS = ("saved", "stacked")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SMALL)
def test_every_element_has_its_place(name: str, form: str, tmp_path: Path) -> None:
    config, shapes = SMALL[name]["config"], SMALL[name][form]
    detected = detect(write_model(tmp_path / name, config, shapes))
    tensors = oracle.numbered(shapes)
    params = assemble(detected, tensors)
    numbers = layer_numbers(detected)
    known = oracle.outer(tensors, config)
    for layer in range(config["num_hidden_layers"]):
        known |= {f"{layer} {key}": a for key, a in oracle.layer(tensors, config, layer).items()}
    found = {
        key if stack not in numbers else f"{numbers[stack][index]} {key}": array
        for (stack, index, key), array in params.items()
    }
    assert found.keys() == known.keys()
    for key, array in known.items():
        np.testing.assert_array_equal(found[key], array, err_msg=key)
    # Each element of each tensor is in exactly one parameter.
    everything = np.concatenate([array.ravel() for array in found.values()])
    carried = [tensors[tensor].ravel() for tensor in detected.plan.carried]
    total = sum(array.size for array in tensors.values())
    np.testing.assert_array_equal(np.sort(np.concatenate([everything, *carried])), np.arange(total))


def assemble(detected: Detected, tensors: oracle.Arrays) -> dict[tuple[str, int, str], np.ndarray]:
    """Return (stack, layer of the stack, parameter) -> its elements, by the plan."""
    params: dict[tuple[str, int, str], np.ndarray] = {}
    experts: dict[tuple[str, int, str], dict[int, np.ndarray]] = defaultdict(dict)
    for piece in detected.plan.pieces:
        seen = piece.layout.view(tensors[piece.tensor])
        assert np.shares_memory(seen, tensors[piece.tensor])
        if not piece.index:
            params["", 0, ".".join(piece.param)] = seen
            continue
        key = (piece.param[0], piece.index[0], ".".join(piece.param[1:]))
        if len(piece.index) == 2:
            assert piece.index[1] not in experts[key]
            experts[key][piece.index[1]] = seen
        else:
            assert key not in params
            params[key] = seen
    for key, parts in experts.items():
        params[key] = np.stack([parts[expert] for expert in range(len(parts))])
    return params


def layer_numbers(detected: Detected) -> dict[str, list[int]]:
    """Return stack -> numbers of its layers, by the names of the tensors that fill it."""
    numbers: dict[str, dict[int, int]] = defaultdict(dict)
    for piece in detected.plan.pieces:
        if piece.index:
            number = int(piece.tensor.split("model.layers.")[1].split(".")[0])
            assert numbers[piece.param[0]].setdefault(piece.index[0], number) == number
    return {stack: [of[index] for index in range(len(of))] for stack, of in numbers.items()}


@pytest.mark.parametrize("name", SMALL)
def test_the_parameters_are_those_of_the_decoder(name: str, tmp_path: Path) -> None:
    directory = write_model(tmp_path / name, SMALL[name]["config"], SMALL[name]["saved"])
    config = load_model(str(directory))
    detected = detect(directory)
    tensors = oracle.numbered(SMALL[name]["saved"])
    shapes: dict[str, Any] = {}
    for (stack, index, key), array in assemble(detected, tensors).items():
        path = f"{stack}.{key}" if stack else key
        layers = shapes.get(path, [0])[0]
        shapes[path] = (max(layers, index + 1), *array.shape) if stack else array.shape
    mesh = mesh_from_config(config.mesh, jax.devices()[:1])
    specs = describe(
        config.model, Sharding(mesh, RuleTable(config.mesh.logical_axis_rules), "record")
    ).specs
    leaves = jax.tree.leaves(specs)
    assert shapes == {spec.name: spec.shape for spec in leaves}
    assert {str(np.dtype(spec.dtype)) for spec in leaves} <= {"bfloat16", "float32"}


def test_layers_of_several_kinds_are_stacks(tmp_path: Path) -> None:
    model = SMALL["qwen2_moe-0"]
    detected = detect(write_model(tmp_path / "model", model["config"], model["saved"]))
    # Sliding, sliding+MoE...: layers 0 and 2 slide (0 and 2 are below 3), 1 and 5 have experts.
    numbers = layer_numbers(detected)
    assert sorted(layer for of in numbers.values() for layer in of) == list(range(6))
    assert all(stack == f"layers_{of[0]}" for stack, of in numbers.items())
    assert detected.settings["attention_pattern"] == [
        *("sliding", "global", "sliding"),
        *("global", "global", "global"),
    ]
    assert detected.settings["sliding_window_size"] == 5
    moe = {key: detected.settings[key] for key in MOE_KEYS}
    assert moe == dict(zip(MOE_KEYS, (0, 2, [3]), strict=True))


MOE_KEYS = ("first_num_dense_layers", "interleave_moe_layer_step", "dense_layers")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("deepseek_v2-0", (1, 1, [])),
        ("ernie4_5_moe-1", (0, 2, [])),
        ("glm4_moe-1", (2, 1, [])),
        ("llama4_text-0", (0, 2, [])),
        ("llama4_text-1", (0, 1, [1])),
        ("qwen3_moe-1", (1, 1, [])),
        ("mixtral-0", (0, 1, [])),
    ],
)
def test_which_layers_have_experts(name: str, expected: Any, tmp_path: Path) -> None:
    detected = detect(write_model(tmp_path / name, SMALL[name]["config"], SMALL[name]["saved"]))
    assert tuple(detected.settings[key] for key in MOE_KEYS) == expected


def test_lines_say_what_was_found(tmp_path: Path) -> None:
    model = SMALL["qwen2_moe-0"]
    lines = detect(write_model(tmp_path / "model", model["config"], model["saved"])).lines
    block = "model.layers.*.mlp"
    assert lines == (
        "family: qwen2_moe; layers: 6, with experts in 2: 1, 5",
        f"experts: 4 of hidden size 12, one by one: {block}.experts.*.gate_proj.weight",
        f"router: softmax scores, top 4: {block}.gate.weight",
        f"shared experts: 1 as one MLP of hidden size 16, weighed by {block}.shared_expert_gate"
        f".weight: {block}.shared_expert.gate_proj.weight",
        "biases: queries, keys, values",
        "weights: 28,104 in 103 tensors, bfloat16",
    )
    model = SMALL["gpt_oss-0"]
    lines = detect(write_model(tmp_path / "other", model["config"], model["saved"])).lines
    assert "[E M 2H] and [E H M], gate and up in turn" in lines[1]
    assert lines[4] == "biases: queries, keys, values, attention output, MLPs and experts, router"


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ({"": "F32"}, "float32"),
        ({"": "F16"}, "float16"),
        ({"": "BF16", "gate.": "F32"}, "bfloat16"),
        ({"": "BF16", "model.norm": "F32"}, "float32"),
        ({"": "BF16", "model.norm": "F16"}, "float32"),
    ],
)
def test_the_dtype_that_holds_all_weights(
    dtypes: dict[str, str], expected: str, tmp_path: Path
) -> None:
    model = SMALL["deepseek_v3-0"]
    each = {
        name: dtype for part, dtype in dtypes.items() for name in model["saved"] if part in name
    }
    directory = write_model(tmp_path / "model", model["config"], model["saved"], dtypes=each)
    found = detect(directory)
    assert found.dtype == found.settings["dtype"] == expected
    assert found.settings["weight_dtype"] == "float32"


def test_buffers_of_old_are_carried(tmp_path: Path) -> None:
    model = SMALL["mixtral-0"]
    buffers = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": [3] for n in range(2)}
    detected = detect(write_model(tmp_path / "model", model["config"], model["saved"] | buffers))
    assert detected.plan.carried == tuple(buffers)
