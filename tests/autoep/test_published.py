"""Detect published models at their real sizes from headers alone, in a second or two."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import pytest
import yaml
from jax.sharding import AbstractMesh, AxisType

from moe_shard.autoep.attributes import Attributes
from moe_shard.autoep.detect import detect
from moe_shard.autoep.family import list_families, load_family
from moe_shard.autoep.settings import model_settings
from moe_shard.checkpoints.resolve import load_model
from moe_shard.config import list_models, load_config
from moe_shard.config.model_config import ModelConfig
from moe_shard.models.params import describe
from moe_shard.sharding.annotate import Sharding
from tests.autoep import published_settings
from tests.autoep.directory import write_model
from tests.autoep.published import CONFIGS, tensors
from tests.autoep.published_settings import SETTINGS
from tests.counted import counted

SAME = {
    "Mixtral-8x7B-v0.1": "mixtral-8x7b",
    "Qwen3-30B-A3B": "qwen3-30b-a3b",
    "OLMoE-1B-7B-0924": "olmoe-1b-7b",
    "DeepSeek-V2-Lite": "deepseek2-16b",
    "DeepSeek-V3": "deepseek3-671b",
    "gpt-oss-20b": "gpt-oss-20b",
    "Llama-4-Scout-17B-16E": "llama4-17b-16e",
    "GLM-4.5-Air": "glm4.5-air",
}
"""Models that configs/models/ has too, written down by another hand."""

SHARED = {
    "bailing_moe": "ling-mini-2.0",  # the router of its first generation
    "ernie4_5_moe_vl": "ernie4.5-21b-a3b",
    "ernie4_5_vl_moe": "ernie4.5-21b-a3b",
    "gemma4": "gemma4-26b-a4b",
    "glm4v_moe": "glm4.5-air",
    "granitemoeshared": "granite4-h-small",  # its layers of attention
    "kimi_k25": "kimi-k2-1t",
    "llama4_text": "llama4-17b-16e",
    "qwen3_5_moe": "qwen3.5-35b-a3b",
    "qwen3_omni_moe": "qwen3-30b-a3b",
    "qwen3_omni_moe_thinker": "qwen3-30b-a3b",
    "qwen3_vl_moe": "qwen3-30b-a3b",
}
"""Family -> a model in configs/models/ that is as large as its own, or made of the same layers."""

TRAINING = {
    *(
        "weight_dtype",
        "remat_policy",
        "moe_dispatch",
        "capacity_factor",
        "moe_dispatch_no_expert_sharding",
    ),
    *("load_balance_loss_weight", "load_balance_loss_type", "router_z_loss_weight"),
    *("routed_bias_update_rate", "prefuse_moe_weights", "max_position_embeddings"),
}
"""What a model file chooses for training, and a checkpoint says nothing about."""

UNREAD = {
    "latent": {"head_dim"},
    "heads": {"mscale"},
    "plain positions": {"rope_factor", "original_max_position_embeddings", "rope_truncate"},
    "one group": {"routing_group_score"},
    "no layers further ahead": {"mtp_after_final_norm"},
}
"""Keys that models of other kinds read."""

PARAMETERS = {
    "Mixtral-8x7B-v0.1": 46_702_792_704,
    "Qwen1.5-MoE-A2.7B": 14_315_784_192,
    "Qwen3-30B-A3B": 30_532_122_624,
    "OLMoE-1B-7B-0924": 6_919_161_856,
    "DeepSeek-V2-Lite": 15_706_484_224,
    "DeepSeek-V3": 671_026_419_200,
    "gpt-oss-20b": 20_914_757_184,
    "granite-3.0-1b-a400m-base": 1_334_628_352,
    "Phi-3.5-MoE-instruct": 41_873_153_344,
    "ERNIE-4.5-21B-A3B-PT": 21_825_437_888,
}
"""As their model cards, or the sums of their indices, have it; DeepSeek-V3's without MTP."""


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Make each published model's directory once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            shapes = tensors(name)
            float32 = {key: "F32" for key in shapes if "correction_bias" in key}
            files = 163 if name == "DeepSeek-V3" else 3
            directory = tmp_path_factory.mktemp("published") / name
            made[name] = write_model(directory, CONFIGS[name], shapes, dtypes=float32, files=files)
        return made[name]

    return get


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_has_its_place(name: str, published: Any) -> None:
    directory = published(name)
    detect(directory)  # the first reads the families' files too
    detected, calls = counted(lambda: detect(directory))
    used = {piece.tensor for piece in detected.plan.pieces}
    shapes = tensors(name)
    assert calls < 500_000 + 150 * len(shapes)
    assert used | set(detected.plan.carried) == set(shapes)
    assert not used & set(detected.plan.carried)
    config = CONFIGS[name]
    extra = {f"model.layers.{config.get('num_hidden_layers')}."} | {
        "multi_modal_projector.",
        "vision_model.",
    }
    assert set(detected.plan.carried) == {n for n in shapes if n.startswith(tuple(extra))}
    elements = sum(math.prod(shapes[n]) for n in used)
    if name in PARAMETERS:
        assert elements == PARAMETERS[name]
    assert f"{elements:,}" in detected.lines[-1]
    assert detected.dtype == detected.settings["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", SAME)
def test_the_same_model_as_the_one_in_configs(name: str, published: Any) -> None:
    assert not differences(load_model(str(published(name))).model, SAME[name])


@pytest.mark.parametrize("name", SETTINGS)
def test_a_config_is_the_model_in_configs(name: str, tmp_path: Path) -> None:
    """Of the models whose tensors are not listed here."""
    family, written = SETTINGS[name]
    attributes = Attributes(written, load_family(family), tmp_path)
    settings = model_settings(attributes, load_family(family))
    (tmp_path / "model.yml").write_text(yaml.safe_dump(settings))
    assert not differences(load_config(str(tmp_path / "model.yml")).model, name)


@pytest.mark.recorded
@pytest.mark.parametrize("name", published_settings.PARAMETERS)
def test_parameters_are_as_many_as_published(name: str) -> None:
    sharding = Sharding(AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,)))
    specs = jax.tree.leaves(describe(load_config(name).model, sharding).specs)
    assert sum(math.prod(spec.shape) for spec in specs) == published_settings.PARAMETERS[name]


def test_every_model_is_compared_and_every_family_has_one() -> None:
    models = {*SAME.values(), *SETTINGS}
    assert models == set(list_models()) - {"mixtral-tiny"}
    families = {family for family, _ in SETTINGS.values()}
    families |= {str(CONFIGS[name]["model_type"]) for name in SAME} | {*SHARED}
    assert families == set(list_families())
    assert models >= set(SHARED.values())


def differences(model: ModelConfig, name: str) -> dict[str, Any]:
    """Return what of a model differs from one in configs/models, by key."""

    def flat(part: Any) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in part.items():
            values |= flat(value) if isinstance(value, dict) else {key: value}
        return values

    found, known = flat(asdict(model)), flat(asdict(load_config(name).model))
    if known["rope_attention_scaling"]:
        # The detected settings give it as a number.
        known |= {"rope_attention_factor": 0.1 * math.log(known["rope_factor"]) + 1}
        known["rope_attention_scaling"] = False
    elif known["rope_attention_factor"] == -1 and found["rope_attention_factor"] == 1:
        known["rope_attention_factor"] = 1.0
    if found["n_routing_groups"] == found["topk_routing_group"] == 1:
        found |= {"n_routing_groups": -1, "topk_routing_group": -1}
    of_others = UNREAD["latent" if known["attention_type"] == "mla" else "heads"]
    if known["rope_type"] == "default":
        of_others = of_others | UNREAD["plain positions"]
    if known["n_routing_groups"] == -1:
        of_others = of_others | UNREAD["one group"]
    if known["mtp_num_layers"] == 0:
        of_others = of_others | UNREAD["no layers further ahead"]
    return {
        key: (found[key], known[key])
        for key in found
        if key not in TRAINING | of_others and found[key] != known[key]
    }


def test_torch_is_not_imported_and_no_device_is_started(published: Any) -> None:
    script = (
        "import sys; from pathlib import Path;"
        "from moe_shard.checkpoints.resolve import load_model;"
        f"config = load_model({str(published('Mixtral-8x7B-v0.1'))!r});"
        "assert config.detected;"
        "print([m for m in ('torch', 'transformers') if m in sys.modules]);"
        "import jax; jax.config.update('jax_num_cpu_devices', 3); print(len(jax.devices()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["[]", "3"]
