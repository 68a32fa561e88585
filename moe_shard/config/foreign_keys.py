"""Read MaxText's keys where the model is this package's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_shard.config.keys import shown
from moe_shard.config.maxtext import RENAMED, no_meaning, refused
from moe_shard.config.maxtext_data import DATA_KEYS
from moe_shard.config.maxtext_keys import UNSET, MaxTextKeys, without_blocks
from moe_shard.config.overlays import Overlay, unknown_key
from moe_shard.errors import UserError


def sift(
    source: str, written: Mapping[str, Any], base: Mapping[str, Any], keys: MaxTextKeys
) -> Overlay:
    """Sort the keys that a source sets into ours and MaxText's, the latter by their meaning here.

    Args:
        source: a file's name or `COMMAND_LINE`.
        written: key -> value as written.
        base: defaults of `base.yml`, by key.
        keys: what becomes of MaxText's keys.

    Raises:
        UserError: an unknown key, one given twice, or a value that is not supported.
    """
    values: dict[str, Any] = {}
    unbuilt: dict[str, tuple[Any, str] | None] = {}
    idle: dict[str, Any] = {}
    for name, value in without_blocks(written, source).items():
        if name in base:
            values[name] = value
        elif name not in keys:
            raise unknown_key(source, name, list(base), list(keys.defaults))
        elif name in keys.refused:
            refusal = keys.refused[name]
            if refusal.admits(value):
                unbuilt[name] = None
            elif refusal.kind == "run":
                raise refused(source, name, value, keys)
            else:
                unbuilt[name] = (value, refusal.what)
        elif name in keys.translated:
            key, meant = _in_our_words(source, name, value, keys)
            if key in written or key in values:
                raise UserError(
                    f"{source}: {name} and {key} are two names of one key\nfix: keep {key}"
                )
            if key:
                values[key] = meant
        elif name in keys.data and value not in (*UNSET, keys.defaults[name]):
            raise UserError(
                f"{source}: {name}={shown(value)} asks for text read in another way than here\n"
                f"fix: leave it out ({name}={shown(keys.defaults[name])})"
            )
        else:
            idle[name] = value
    return Overlay(source, values, unbuilt, tuple(no_meaning(idle, keys, source)))


def _in_our_words(source: str, name: str, value: Any, keys: MaxTextKeys) -> tuple[str, Any]:
    """Translate one of MaxText's keys; the name is empty where nothing has to change.

    Raises:
        UserError: it has a meaning only together with one of MaxText's model files.
    """
    if name in RENAMED:
        return RENAMED[name], value
    if name in {"init_weights_seed", "data_shuffle_seed"}:
        return "seed", value
    if name == "sparse_matmul" and isinstance(value, bool):
        return "moe_dispatch", "ragged" if value else "gather"
    if name == "profiler" and value in {"", "xplane"}:
        return "profile", value == "xplane"
    if name == "enable_dropout" or value in (*UNSET, keys.defaults[name]):
        return "", None
    if name in DATA_KEYS:
        raise UserError(
            f"{source}: {name}={shown(value)} asks for a dataset of MaxText's pipelines, and this "
            "model is none of its files\nfix: dataset_path=FILES or folders of text, JSON Lines, "
            "Parquet or ArrayRecord"
        )
    raise UserError(
        f"{source}: {name}={shown(value)} means something in MaxText's files, and this model is "
        f"none of them\nfix: {keys.translated[name]}, as configs/base.yml has it"
    )
