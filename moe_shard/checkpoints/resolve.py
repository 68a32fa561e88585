"""Load the MODEL of a command: a name, a YAML file, or a Hugging Face model directory."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_shard.autoep.config_alone import Described, describe_config
from moe_shard.autoep.detect import CONFIG, Detected, detect
from moe_shard.autoep.headers import OUTSIDE_KEY
from moe_shard.autoep.mtp_layers import MTP_KEY
from moe_shard.autoep.not_a_model import refuse_foreign
from moe_shard.config.load import base_settings, list_models, load_config, load_settings
from moe_shard.config.overlays import Overlay, parse_overrides
from moe_shard.config.schema import Config
from moe_shard.errors import UserError
from moe_shard.files import expanded
from moe_shard.maxtext.folders import find_items

_LAYERS = "base_num_decoder_layers"
MODEL_HELP = (
    "a name in configs/models/, a .yml file, a Hugging Face model directory, or its config.json "
    "for the model without its weights"
)
"""The help text of MODEL on command lines."""


def load_model(model: str, overrides: Sequence[str] = ()) -> Config:
    """Load one run's configuration.

    Args:
        model: see `load_config`; or a directory with `config.json`, which then also provides the
            initial parameters; or that file, which does not.
        overrides: `key=value` arguments, which override all else.

    Raises:
        UserError: anything that a person got wrong, with the fix, in at most three lines.
    """
    directory = expanded(model)
    if model in list_models():
        return load_config(model, overrides)
    if directory.name == CONFIG and os.path.isfile(directory):
        return load_without_weights(directory, overrides)[0]
    if not os.path.isdir(directory):  # False where the name is too long
        if not model.endswith((".yml", ".yaml")):
            refuse_foreign(model)
        return load_config(model, overrides)
    if not (directory / CONFIG).is_file():
        if (directory / "config.yml").is_file():
            return load_config(str(directory), overrides)
        if find_items(directory) is not None:
            raise UserError(
                f"{model}: a MaxText checkpoint, which does not record which model it is of\n"
                f"fix: MODEL load_parameters_path={model}, or moe-shard import --model MODEL"
            )
        refuse_foreign(str(directory))
        raise UserError(
            f"{model}: a directory without {CONFIG}\n"
            "fix: a Hugging Face model directory, or what `moe-shard import` makes of one"
        )
    return load_directory(directory, overrides)[0]


def load_directory(directory: Path, overrides: Sequence[str] = ()) -> tuple[Config, Detected]:
    """Load one run's configuration from a Hugging Face directory, and what was found there.

    Args:
        directory: the directory of the model.
        overrides: `key=value` arguments, which override all else.

    Raises:
        UserError: as `load_model`.
    """
    asked = parse_overrides(overrides, base_settings())
    layers, ahead = _layers_asked(asked)
    outside = asked.get(OUTSIDE_KEY) is True
    detected = detect(
        directory, asked.get("hf_family", ""), layers=layers, outside=outside, ahead=ahead
    )
    overlay = Overlay(str(directory / CONFIG), directory_settings(directory, detected), {}, ())
    config = load_settings(overlay, overrides, name=directory.resolve().name)
    said = "weight_dtype" in asked or detected.settings["weight_dtype"] != "float32"
    config = replace(
        config,
        detected=detected.lines,
        warnings=(*config.warnings, *detected.notes),
        stored_dtype="" if said else detected.dtype,
    )
    return config, detected


def load_without_weights(where: Path, overrides: Sequence[str] = ()) -> tuple[Config, Described]:
    """Load one run's configuration from a `config.json` alone, and what was found there.

    Args:
        where: the file.
        overrides: `key=value` arguments, which override all else.

    Raises:
        UserError: as `load_model`.
    """
    asked = parse_overrides(overrides, base_settings())
    layers, ahead = _layers_asked(asked)
    described = describe_config(where, asked.get("hf_family", ""), layers=layers, ahead=ahead)
    settings = {"tokenizer_path": str(where.parent), **described.settings}
    overlay = Overlay(str(where), settings, {}, ())
    config = load_settings(overlay, overrides, name=where.resolve().parent.name)
    return replace(config, detected=(described.line,)), described


def _layers_asked(asked: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Return how many layers are asked for, and how many of multi-token prediction."""
    # Of another type or below these bounds they are refused later, by name.
    layers, ahead = (
        value if type(value := asked.get(key)) is int and value >= least else None
        for key, least in ((_LAYERS, 1), (MTP_KEY, 0))
    )
    return layers, ahead


def directory_settings(directory: Path, detected: Detected) -> dict[str, Any]:
    """Return the settings of a Hugging Face directory: its model, parameters and tokenizer.

    Args:
        directory: the directory of the model.
        detected: what `detect` found in it.
    """
    settings = {**detected.settings, "load_parameters_path": str(directory)}
    # Its tokenizer, or the error that it has none, where text is read: never bytes unasked for.
    settings.setdefault("tokenizer_path", str(directory))
    return settings
