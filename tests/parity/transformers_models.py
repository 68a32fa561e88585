"""Make transformers' models of published config.json files, without memory for their weights.

The module imports torch, so tests reach it through the fixture of `tests/parity/conftest.py`.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

FAMILIES = frozenset(CONFIG_MAPPING)


def saved_again(written: dict[str, Any]) -> str:
    """Return the text that transformers saves a config.json as."""
    return str(_config(written).to_json_string())


def count_numbers(written: dict[str, Any]) -> int:
    """Return how many numbers the parameters of the model have, with the buffers that it saves."""
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(_config(written).get_text_config())
    kept = made.state_dict().keys()  # such as biases of choices
    numbers = [*made.parameters(), *(each for key, each in made.named_buffers() if key in kept)]
    return sum(each.numel() for each in numbers)


def _config(written: dict[str, Any]) -> Any:
    # It writes into what it is given.
    return CONFIG_MAPPING[written["model_type"]].from_dict(json.loads(json.dumps(written)))
