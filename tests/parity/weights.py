"""Make reproducible weights without torch, and safetensors files by a few lines of NumPy.

The rule: the values of a tensor are drawn by NumPy's PCG64, seeded by the crc32 of its name and the
model's seed, and scaled by its kind, which follows from its name and shape:

- a norm's weight, or another factor: uniform from 0.5 to 1.5, less 1 where the norm multiplies by
  1 + weight;
- a bias, a sink, a correction bias, any other vector, an embedding table: normal, times 0.3;
- a router's matrix: normal, times 2 over the root of its input dim, so that tokens differ in the
  experts they choose, and the chosen scores are well above the others; times 2 alone where its
  input is over that root already;
- any other matrix, or stack of them: normal, over the fourth root of the product of its last two
  dims, which does not depend on which of them is the input.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

ROUTERS = (".gate.weight", ".router.weight", ".router.layer.weight", ".gate.wg.weight")
SMALL_INPUT = ".router.proj.weight"
FACTORS = ("router.scale", "router.per_expert_scale", "layer_scalar")


def tensor(
    name: str, shape: Iterable[int], seed: int, zero_centered: str | None = None
) -> np.ndarray:
    """Return the float32 values of one tensor, by the rule above.

    Args:
        name: the tensor's name in the checkpoint.
        shape: the tensor's shape.
        seed: the model's seed.
        zero_centered: regular expression of the norms that multiply by 1 + weight; None: none do.
    """
    shape = tuple(shape)
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(f"{name} {seed}".encode())))
    kind = name.rsplit(".", 1)[-1]
    if ("norm" in name and kind == "weight") or name.endswith(FACTORS):
        centre = 1.0 if zero_centered is None or not re.search(zero_centered, name) else 0.0
        return rng.uniform(centre - 0.5, centre + 0.5, shape).astype(np.float32)
    if "bias" in kind or kind == "sinks" or "embed" in name or len(shape) < 2:
        scale = 0.3
    elif name.endswith(ROUTERS):
        scale = 2 * shape[-1] ** -0.5
    elif name.endswith(SMALL_INPUT):
        scale = 2.0
    else:
        scale = (shape[-1] * shape[-2]) ** -0.25
    return (rng.standard_normal(shape) * scale).astype(np.float32)


def write(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file of float32 tensors."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, values in tensors.items():
        assert values.dtype == np.float32, name
        end = at + values.nbytes
        header[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for values in tensors.values():
            file.write(np.ascontiguousarray(values).tobytes())


def read(directory: Path) -> dict[str, np.ndarray]:
    """Read all tensors of a directory's safetensors files, which are float32."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        for name, entry in json.loads(content[8:start]).items():
            if name == "__metadata__":
                continue
            assert entry["dtype"] == "F32", name
            begin, end = (start + at for at in entry["data_offsets"])
            found[name] = np.frombuffer(content[begin:end], np.float32).reshape(entry["shape"])
    return found
