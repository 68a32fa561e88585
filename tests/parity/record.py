"""Record the first shape of every family for machines without torch: `make record-parity`.

    python -m tests.parity.record dots1 flex_olmo      (only these)

Weights are not kept: `weights.tensor` makes them again from their names, shapes and the seed.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from tests.parity import weights
from tests.parity.families import FAMILIES, SHAPES, Shape
from tests.parity.reference import Reference, make

RECORDED = Path(__file__).parents[1] / "autoep" / "recorded"
LONG_AGO = (1980, 1, 1, 0, 0, 0)


def record(shape: Shape, reference: Reference) -> bytes:
    """Return one shape's fixture: a zip of NumPy arrays as `np.savez` makes it, reproducible."""
    (path,) = reference.directory.glob("*.safetensors")
    model = {
        "config": json.loads((reference.directory / "config.json").read_text()),
        "file": path.name,
        "seed": shape.seed,
        **({"zero_centered": shape.zero_centered} if shape.zero_centered else {}),
        "tensors": {
            name: {"dtype": "F32", "shape": values.shape}
            for name, values in weights.read(reference.directory).items()
        },
    }
    aux = np.nan if reference.aux_loss is None else reference.aux_loss
    arrays = {
        "model": np.array(json.dumps(model, sort_keys=True)),
        "inputs": reference.inputs.astype(np.uint8),
        "targets": reference.targets.astype(np.uint8),
        "logits": reference.logits,
        "router_logits": reference.router_logits,
        "ce_loss": np.float64(reference.ce_loss),
        "aux_loss": np.float64(aux),
        "greedy": reference.greedy.astype(np.uint8),
    }
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, values in arrays.items():
            content = io.BytesIO()
            np.save(content, np.asarray(values), allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy", LONG_AGO)
            archive.writestr(entry, content.getvalue(), zipfile.ZIP_DEFLATED, 9)
    return out.getvalue()


def main() -> None:
    """Write the fixtures of the families that are named; of all where none is."""
    RECORDED.mkdir(exist_ok=True)
    for family in sys.argv[1:] or FAMILIES:
        shape = next(shape for shape in SHAPES if shape.family == family)
        with tempfile.TemporaryDirectory() as folder:
            content = record(shape, make(shape, Path(folder)))
        path = RECORDED / f"{family}.npz"
        path.write_bytes(content)
        print(f"{path.relative_to(Path.cwd())}: {len(content) / 1000:.0f} kB")


if __name__ == "__main__":
    main()
