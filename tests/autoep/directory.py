"""Write model directories for tests: real headers, data that takes no space on disk."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1, "BOOL": 1, "I64": 8}


def write_file(path: Path, tensors: Mapping[str, tuple[str, list[int]]]) -> None:
    """Write a safetensors file of `name -> (dtype, shape)` whose data is sparse."""
    header, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    write_raw(path, json.dumps(header).encode(), at)


def write_raw(path: Path, header: bytes, data_bytes: int, length: int | None = None) -> None:
    """Write a file with this header, valid or not, and as much data."""
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header)
    os.truncate(path, path.stat().st_size + data_bytes)


def write_model(
    directory: Path,
    config: Mapping[str, Any],
    shapes: Mapping[str, list[int]],
    dtype: str = "BF16",
    *,
    dtypes: Mapping[str, str] | None = None,
    files: int = 1,
) -> Path:
    """Write a model directory; several files get an index."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    tensors = {name: ((dtypes or {}).get(name, dtype), shape) for name, shape in shapes.items()}
    if files == 1:
        write_file(directory / "model.safetensors", tensors)
        return directory
    names = list(tensors)
    places: dict[str, str] = {}
    each = -(-len(names) // files)
    for number in range(files):
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        part = names[number * each : (number + 1) * each]
        write_file(directory / file, {name: tensors[name] for name in part})
        places |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def small_models() -> dict[str, dict[str, Any]]:
    """Return the recorded models of transformers, by name."""
    return {
        f"{path.stem}-{number}": model
        for path in sorted((HERE / "small").glob("*.json"))
        for number, model in enumerate(json.loads(path.read_text()))
    }
