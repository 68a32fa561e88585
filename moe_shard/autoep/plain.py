"""Turn a quantized model's directory into a plain one: the same files with decoded weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_shard.autoep.headers import INDEX, TensorHeader
from moe_shard.autoep.manifest import new_header
from moe_shard.autoep.quantized import CONFIG_KEY, Quantized
from moe_shard.autoep.strict_json import read_object

_CONFIG = "config.json"
PT_METADATA = {"format": "pt"}
"""Metadata without which transformers refuses a file."""


def is_quantized(headers: Mapping[str, TensorHeader]) -> bool:
    """Return whether a directory has quantized weights."""
    return any(isinstance(entry, Quantized) for entry in headers.values())


def plain_files(headers: Mapping[str, TensorHeader], folder: Path) -> dict[str, str]:
    """Return the headers of the weight files with plain tensors.

    Args:
        headers: all tensors, by the names of their decoded tensors.
        folder: a folder with copies of the model's `config.json` and index, which are changed to
            match.

    Returns:
        Name of each file -> its header. A file with nothing but scales is left out.
    """
    _change(folder / _CONFIG, _without_scheme)
    if (folder / INDEX).is_file():
        _change(folder / INDEX, lambda index: _of_plain(index, headers))
    files: dict[str, dict[str, TensorHeader]] = {}
    for name, tensor in sorted(headers.items(), key=lambda item: (item[1].file, item[1].begin)):
        files.setdefault(tensor.file.name, {})[name] = tensor
    return {name: new_header(tensors, PT_METADATA) for name, tensors in files.items()}


def _without_scheme(config: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_scheme(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name != CONFIG_KEY
    }


def _of_plain(index: dict[str, Any], headers: Mapping[str, TensorHeader]) -> dict[str, Any]:
    notes, size = index.get("metadata"), sum(tensor.nbytes for tensor in headers.values())
    return index | {
        "metadata": {**(notes if isinstance(notes, dict) else {}), "total_size": size},
        "weight_map": {name: headers[name].file.name for name in sorted(headers)},
    }


def _change(file: Path, change: Any) -> None:
    text = json.dumps(change(read_object(file)), indent=2, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")
