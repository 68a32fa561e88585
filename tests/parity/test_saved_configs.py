"""Compare the models of published config.json files with those that transformers makes of them.

A file that transformers saves again is of the same model: it fills in what is left out, and spells
some of it in another way. And of the whole model, without memory for its weights, as many numbers
are parameters there as here.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moe_shard.autoep.param_shapes import count_parameters
from moe_shard.checkpoints.resolve import load_model
from moe_shard.config.model_config import ModelConfig
from tests.autoep.published import CONFIGS
from tests.autoep.published_settings import SETTINGS

pytestmark = pytest.mark.parity

WRITTEN: dict[str, dict[str, Any]] = copy.deepcopy(CONFIGS) | {
    name: {"model_type": family, **settings} for name, (family, settings) in SETTINGS.items()
}
# Published as 4, which transformers 5 refuses.
WRITTEN["Llama-4-Scout-17B-16E"]["text_config"]["attn_temperature_tuning"] = True
NAMES = [name for name, written in WRITTEN.items() if written["model_type"] in CONFIG_MAPPING]


def model_of(written: str, folder: Path) -> ModelConfig:
    (folder / "config.json").write_text(written, encoding="utf-8")
    return load_model(str(folder / "config.json")).model


@pytest.mark.parametrize("name", NAMES)
def test_a_config_that_transformers_saves_is_of_the_same_model(name: str, tmp_path: Path) -> None:
    written = json.dumps(WRITTEN[name])
    # It writes into what it is given, which is a copy here.
    known = CONFIG_MAPPING[WRITTEN[name]["model_type"]].from_dict(json.loads(written))
    assert model_of(known.to_json_string(), tmp_path) == model_of(written, tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_the_model_has_as_many_parameters(name: str, tmp_path: Path) -> None:
    written = json.dumps(WRITTEN[name])
    known = CONFIG_MAPPING[WRITTEN[name]["model_type"]].from_dict(json.loads(written))
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(known.get_text_config())
    kept = made.state_dict().keys()  # with the buffers that files have, such as biases of choices
    numbers = [*made.parameters(), *(each for key, each in made.named_buffers() if key in kept)]
    assert count_parameters(model_of(written, tmp_path)) == sum(each.numel() for each in numbers)


def test_only_families_with_code_of_their_own_are_left_out() -> None:
    assert {WRITTEN[name]["model_type"] for name in WRITTEN.keys() - {*NAMES}} == {"bailing_moe_v2"}
