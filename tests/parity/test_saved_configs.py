"""Compare the models of published config.json files with those that transformers makes of them.

A file that transformers saves again is of the same model: it fills in what is left out, and spells
some of it in another way. And of the whole model, without memory for its weights, as many numbers
are parameters there as here.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

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
# Their code is published beside their weights: transformers has none for them.
ELSEWHERE = {"bailing_moe_v2"}
NAMES = [name for name, written in WRITTEN.items() if written["model_type"] not in ELSEWHERE]


def model_of(written: str, folder: Path) -> ModelConfig:
    (folder / "config.json").write_text(written, encoding="utf-8")
    return load_model(str(folder / "config.json")).model


@pytest.mark.parametrize("name", NAMES)
def test_a_config_that_transformers_saves_is_of_the_same_model(
    name: str, tmp_path: Path, transformers_models: ModuleType
) -> None:
    saved = transformers_models.saved_again(WRITTEN[name])
    assert model_of(saved, tmp_path) == model_of(json.dumps(WRITTEN[name]), tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_the_model_has_as_many_parameters(
    name: str, tmp_path: Path, transformers_models: ModuleType
) -> None:
    ours = count_parameters(model_of(json.dumps(WRITTEN[name]), tmp_path))
    assert ours == transformers_models.count_numbers(WRITTEN[name])


def test_only_families_with_code_of_their_own_are_left_out(transformers_models: ModuleType) -> None:
    families = {written["model_type"] for written in WRITTEN.values()}
    assert families - transformers_models.FAMILIES == ELSEWHERE
