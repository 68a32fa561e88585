"""Translate the keys of MaxText's input pipelines: which files are read, and how."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_shard.config.keys import shown
from moe_shard.config.maxtext_keys import UNSET
from moe_shard.config.maxtext_model import Translation
from moe_shard.config.strict_yaml import parse_yaml
from moe_shard.errors import UserError

DATA_KEYS = (
    *("dataset_type", "dataset_path", "tokenizer_path", "hf_path", "hf_data_dir"),
    *("hf_train_files", "hf_eval_files", "hf_eval_split"),
    *("grain_train_files", "grain_eval_files", "grain_file_type"),
    "grain_train_mixture_config_path",
)
"""MaxText's keys that are translated here."""
_OF = {"hf": "hf_", "grain": "grain_"}
_BUILDERS = ("json", "parquet", "text", "csv", "arrow")
"""Names of Hugging Face's `datasets` that stand for a format, not for a dataset."""
_OURS = "dataset_path=FILES or folders of text, JSON Lines, Parquet or ArrayRecord"


def data_values(
    values: dict[str, Any],
    translation: Translation,
    explicit: Mapping[str, Any],
    given: Mapping[str, Any],
    arguments: Mapping[str, Any],
) -> None:
    """Set `dataset_path` and what belongs to it from MaxText's keys.

    Args:
        values: receives the values of our keys.
        translation: receives notes.
        explicit: keys that were written.
        given: all keys, MaxText's defaults included.
        arguments: the command line's `key=value`.

    Raises:
        UserError: a pipeline or a dataset that is not read here, or files that its `dataset_type`
            does not read.
    """
    kind = given["dataset_type"]
    if arguments.get("dataset_path") not in UNSET and arguments.get("dataset_type", "text") == (
        "text"
    ):
        kind = "text"  # the command line names text to read
    set_here = [key for key in DATA_KEYS if explicit.get(key) not in (*UNSET, given_default(key))]
    for key in set_here:
        prefix = key.partition("_")[0] + "_"
        if prefix in _OF.values() and prefix != _OF.get(kind):
            raise UserError(
                f"{key}={shown(explicit[key])} names a dataset of MaxText's pipelines, and "
                f"dataset_type={shown(kind)} reads none of it\n"
                f"fix: dataset_type={prefix.rstrip('_')}, or {_OURS}"
            )
    paths: Any = given["dataset_path"]
    if kind == "hf":
        paths = _hugging_face(given)
    elif kind == "grain":
        if given["grain_file_type"] not in ("arrayrecord", "parquet"):
            raise _not_read("grain_file_type", given["grain_file_type"])
        paths, weights = _grain(given)
        if weights:
            values["dataset_weights"] = weights
            translation.words.append(f"a mixture: dataset_weights={shown(weights)}")
    elif kind not in {"text", "synthetic"}:
        raise _not_read("dataset_type", kind)
    for key in ("dataset_path", "tokenizer_path"):
        values.pop(key, None)
    values["dataset_type"] = "synthetic" if kind == "synthetic" else "text"
    if kind != "synthetic":
        values["dataset_path"] = paths
        values["tokenizer_path"] = given["tokenizer_path"] or ""
        _evaluation(values, kind, given, arguments)
        if kind in _OF:
            translation.words.append(f"dataset_type={kind}: dataset_path={shown(paths)}")
        return
    translation.words.append(
        "dataset_type=synthetic: one batch of random tokens, the same in every step"
    )
    if "tokenizer_path" in explicit or "dataset_path" in explicit:
        translation.words.append("nothing is read from tokenizer_path or dataset_path")


def given_default(key: str) -> str:
    """Return MaxText's default of a key of its pipelines."""
    return {"grain_file_type": "arrayrecord", "dataset_type": "synthetic"}.get(key, "")


def _not_read(key: str, value: Any) -> UserError:
    return UserError(
        f"{key}={shown(value)} is a pipeline of MaxText's, which is not built here\n"
        f"fix: {_OURS}, or dataset_type=synthetic"
    )


def _hugging_face(given: Mapping[str, Any]) -> list[str]:
    """Return the local files that `datasets.load_dataset` would read by these keys."""
    name, files = given["hf_path"], given["hf_train_files"]
    if name in UNSET:
        raise UserError(f"dataset_type=hf without hf_path\nfix: hf_path=parquet, or {_OURS}")
    if files not in UNSET:
        if isinstance(files, str) and files.startswith("["):  # a list on the command line
            files = parse_yaml(files)
        found = files if isinstance(files, list) else [files]
        if name in _BUILDERS:
            return [str(each) for each in found]
    elif os.path.isdir(os.path.expanduser(name)):
        folder = given["hf_data_dir"]
        return [str(Path(name, folder)) if folder not in UNSET else name]
    raise UserError(
        f"hf_path={shown(name)} is a dataset of the Hugging Face hub; no network is used here\n"
        f"fix: hf download {shown(name)} --repo-type dataset --local-dir DIR, then "
        "dataset_path=DIR (or dataset_path=FILES)"
    )


def _grain(given: Mapping[str, Any]) -> tuple[list[str], list[float]]:
    """Return the patterns of Grain's pipeline, and their weights if there are several."""
    named = given["grain_train_mixture_config_path"]
    if named in UNSET:
        return _patterns("grain_train_files", given["grain_train_files"])
    path = Path(os.path.expanduser(str(named)))
    try:
        parts = list(json.loads(path.read_text(encoding="utf-8")).values())
        weights = [float(each["weight"]) for each in parts]
        return [str(each["path"]) for each in parts], weights if len(parts) > 1 else []
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"grain_train_mixture_config_path={shown(named)} is no mixture: {shown(str(error))}\n"
            'fix: JSON as {"name": {"path": PATTERN, "weight": 0.3}, ...}'
        ) from error


def _patterns(key: str, value: Any) -> tuple[list[str], list[float]]:
    """Return the patterns of a key of Grain's pipeline: `PATTERN` or `PATTERN,WEIGHT;...`."""
    if value in UNSET:
        raise UserError(f"dataset_type=grain without {key}\nfix: {key}=FILES, or {_OURS}")
    entries = [each.strip() for each in str(value).split(";") if each.strip()]
    patterns, weights = [], []
    for entry in entries:
        pattern, comma, weight = entry.rpartition(",")
        is_weight = bool(comma) and weight.strip().replace(".", "", 1).isdecimal()
        if len(entries) > 1 and not is_weight:
            raise UserError(
                f"{key}={shown(value)}: {shown(entry)} has no weight\n"
                f"fix: {key}=PATTERN,WEIGHT;PATTERN,WEIGHT"
            )
        patterns.append(pattern if is_weight else entry)
        weights += [float(weight)] if is_weight else []
    return patterns, weights if len(patterns) > 1 else []


def _evaluation(
    values: dict[str, Any], kind: str, given: Mapping[str, Any], arguments: Mapping[str, Any]
) -> None:
    if kind not in _OF or arguments.get("eval_dataset_path") not in UNSET:
        return
    files = given["hf_eval_files" if kind == "hf" else "grain_eval_files"]
    if kind == "hf" and given["hf_eval_split"] not in UNSET:
        values["eval_split"] = given["hf_eval_split"]
        if files in UNSET and given["hf_train_files"] in UNSET:
            files = _hugging_face(given)
    if files not in UNSET:
        values["eval_dataset_path"] = (
            [str(each) for each in files]
            if isinstance(files, list)
            else _patterns("eval files", files)[0]
        )
