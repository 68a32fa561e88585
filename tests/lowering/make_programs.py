"""Regenerate the HLO texts in programs/ as expected.yml says that they were built.

    PYTHONPATH=. python tests/lowering/make_programs.py [NAME ...] [--to DIR]

Those marked `jax: newest` need jax 0.12 (CPU alone), the others jax 0.10.2 and the compilers of
`make targets`. Nothing runs. Whole texts are kept, gzipped; file names in them become program.py.
"""

from __future__ import annotations

import argparse
import gzip
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import numpy as np
import yaml
from jax.sharding import Mesh

from tests.lowering.foreign import PROGRAMS
from tests.lowering.foreign.setup import Place

FOLDER = Path(__file__).parent / "programs"


def devices(target: str) -> Any:
    """Eight devices to compile for."""
    if target == "cpu:8":
        return jax.devices("cpu")[:8]
    from moe_shard.runtime.targets.target import (  # registers the compilers
        devices_for,
        parse_target,
    )

    return devices_for(parse_target(target))


def compile_entry(entry: dict[str, Any]) -> tuple[str, str]:
    """Return the text after optimization, and the one before it."""
    shape = entry["mesh"]
    mesh = Mesh(np.array(devices(entry["target"])).reshape(*shape.values()), tuple(shape))
    place = Place(
        mesh,
        entry["expert_axis"],
        entry.get("fsdp_axis"),
        tuple(entry.get("batch_axes", list(shape))),
        entry.get("scopes", {}),
    )
    options = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in entry.get("options", {}).items()
    }
    step, arguments, layouts = PROGRAMS[entry["program"]](place, **options)
    lowered = jax.jit(step, out_shardings=layouts).lower(*arguments)
    if not entry.get("before"):
        return readable(lowered.compile().as_text() or ""), ""
    with tempfile.TemporaryDirectory() as folder:
        flags: dict[str, str | bool] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        after = lowered.compile(compiler_options=flags).as_text() or ""
        (before,) = Path(folder).glob("*before_optimizations.txt")
        return readable(after), readable(before.read_text())


def readable(text: str) -> str:
    """Replace what is this machine's: folders of file names."""
    return re.sub(r'"[^"\n]*/([\w.]+\.py)"', r'"/\1"', text)


def main() -> None:
    """Compile the programs that are asked for, or all that this jax can."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--table", type=Path, default=FOLDER / "expected.yml")
    parser.add_argument("--to", type=Path, default=FOLDER)
    parser.add_argument("--plain", action="store_true", help="do not gzip")
    asked = parser.parse_args()
    newest = tuple(map(int, jax.__version__.split(".")[:2])) >= (0, 11)
    table = yaml.safe_load(asked.table.read_text())
    for name, entry in table.items():
        if (asked.names and name not in asked.names) or newest != (entry.get("jax") == "newest"):
            continue
        after, before = compile_entry(entry)
        for file, text in {f"{name}.txt": after, f"{name}.before.txt": before}.items():
            if not text:
                continue
            if asked.plain:
                (asked.to / file).write_text(text)
            else:
                (asked.to / f"{file}.gz").write_bytes(gzip.compress(text.encode(), 9, mtime=0))
        print(f"{name:40} {entry['target']:8} {len(after) // 1000:5d} KB", flush=True)


if __name__ == "__main__":
    main()
