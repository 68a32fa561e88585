"""Translate MaxText's keys of a run: batch, schedule, optimizer, data, memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_shard.config.keys import shown
from moe_shard.config.maxtext_data import DATA_KEYS, data_values
from moe_shard.config.maxtext_keys import UNSET, MaxTextKeys
from moe_shard.config.maxtext_model import Translation
from moe_shard.errors import UserError

KEYS = frozenset(
    (
        *("base_config", "model_name", "steps", "opt_type", "weight_dtype", "mu_dtype"),
        *("attention", "moe_x_sorted", "muon_consistent_rms", "remat_policy", "profiler"),
        *("init_weights_seed", "data_shuffle_seed"),
        *DATA_KEYS,
        *("cosine_learning_rate_final_fraction", "num_vocab_tiling"),
    )
)
"""Translated keys that only the translation of the run reads, not that of the model."""


def run_values(
    values: dict[str, Any],
    unbuilt: dict[str, tuple[Any, str] | None],
    translation: Translation,
    explicit: Mapping[str, Any],
    given: Mapping[str, Any],
    arguments: Mapping[str, Any],
) -> None:
    """Translate the keys of a run to ours.

    Args:
        values: our values so far; the results are added to them.
        unbuilt: unsupported requests so far; more are added to them.
        translation: the translation of the model; notes are added to it.
        explicit: keys that a file or the command line sets.
        given: all translated keys, with their defaults in MaxText where they are not set.
        arguments: the command line's `key=value`.

    Raises:
        UserError: an unsupported value.
    """
    values.update(learning_rate_rule="maxtext", adam_decay_vectors=True)
    if "cosine_learning_rate_final_fraction" in explicit:
        values["learning_rate_final_fraction"] = explicit["cosine_learning_rate_final_fraction"]
    values.pop("num_vocab_tiling", None)
    if given["num_vocab_tiling"] > 1:  # 1, MaxText's default, leaves the number to this package
        values["num_vocab_tiling"] = given["num_vocab_tiling"]
    values["steps"] = given["steps"]
    if given["steps"] == -1:
        values["steps"] = given["learning_rate_schedule_steps"]
    values["optimizer"] = given["opt_type"]
    if given["opt_type"] == "adam_pax":
        unbuilt["opt_type"] = (given["opt_type"], f"the optimizer {given['opt_type']}")
        values["optimizer"] = "adamw"
    weight_dtype = values["weight_dtype"] = given["weight_dtype"]
    if weight_dtype.startswith("float8"):
        unbuilt["weight_dtype"] = (weight_dtype, "float8 weights")
        values["weight_dtype"] = "bfloat16"
    values["mu_dtype"] = "" if given["mu_dtype"] in (*UNSET, weight_dtype) else given["mu_dtype"]
    rms = given["muon_consistent_rms"]
    values["muon_consistent_rms"] = -1.0 if rms in UNSET else rms
    values["remat_policy"] = given["remat_policy"]
    values["moe_exchanged"] = given["moe_x_sorted"]
    if given["moe_x_sorted"] != "remat":
        translation.words.append(f"moe_x_sorted: moe_exchanged={given['moe_x_sorted']}")
    values["attention"] = given["attention"]
    if given["attention"] == "cudnn_flash_te":
        values["attention"] = "cudnn_flash_jax"
        translation.words.append(
            "attention=cudnn_flash_te: attention=cudnn_flash_jax; cuDNN without Transformer Engine"
        )
    if given["profiler"] == "nsys":
        translation.words.append("profiler=nsys: profile=false; it is nsys that profiles")
    elif profiler := given["profiler"]:
        if profiler != "xplane":
            raise UserError(
                f"profiler={shown(profiler)} is not built in this version\nfix: profiler=xplane"
            )
        values["profile"] = True
    _seeds(values, explicit, given)
    data_values(values, translation, explicit, given, arguments)


def _seeds(values: dict[str, Any], explicit: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Derive one seed from MaxText's two; its synthetic data have a seed of their own."""
    first, data = given["init_weights_seed"], given["data_shuffle_seed"]
    if first != data and "init_weights_seed" in explicit and "data_shuffle_seed" in explicit:
        raise UserError(
            f"init_weights_seed={first}, data_shuffle_seed={data}: there is one seed here\n"
            f"fix: the same for both, for example data_shuffle_seed={first}"
        )
    values["seed"] = first if "init_weights_seed" in explicit else data


def check_data(explicit: Mapping[str, Any], kind: str, keys: MaxTextKeys, source: str) -> None:
    """Refuse keys of another text pipeline than ours, where text is read."""
    for key in sorted(keys.data & set(explicit)):
        if kind == "text" and explicit[key] not in (*UNSET, keys.defaults[key]):
            raise UserError(
                f"{source}: {key}={shown(explicit[key])} asks for text read in another way "
                "than here\n"
                f"fix: leave it out ({key}={shown(keys.defaults[key])})"
            )
