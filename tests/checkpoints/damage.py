"""Damage a checkpoint at random, in the ways of disks, file systems and people.

`DAMAGES=200 pytest tests/checkpoints/test_damage.py -k "any_kind or go_back" -rP` makes 200 of them
beside an older checkpoint, and 200 without one; the suite makes a few of each kind.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

Harm = Callable[[Path, random.Random], str]


def files_of(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def some_file(checkpoint: Path, rng: random.Random) -> Path:
    return rng.choice([path for path in files_of(checkpoint) if path.stat().st_size])


def truncated(checkpoint: Path, rng: random.Random) -> str:
    path = some_file(checkpoint, rng)
    os.truncate(path, rng.randrange(path.stat().st_size))
    return path.name


def emptied(checkpoint: Path, rng: random.Random) -> str:
    path = some_file(checkpoint, rng)
    path.write_bytes(b"")
    return path.name


def missing(checkpoint: Path, rng: random.Random) -> str:
    found = [path for path in sorted(checkpoint.rglob("*")) if path != checkpoint]
    path = rng.choice(found)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    return path.name


def zeroed(checkpoint: Path, rng: random.Random) -> str:
    while True:
        path = some_file(checkpoint, rng)
        content = bytearray(path.read_bytes())
        start = rng.randrange(len(content))
        stop = min(len(content), start + rng.choice([1, 16, 4096]))
        if any(content[start:stop]):  # what is zero already is no damage
            break
    content[start:stop] = bytes(stop - start)
    path.write_bytes(content)
    return path.name


def bit_flipped(checkpoint: Path, rng: random.Random) -> str:
    path = some_file(checkpoint, rng)
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return path.name


def renamed(checkpoint: Path, rng: random.Random) -> str:
    path = _of_a_later_number(checkpoint, rng)
    if rng.random() < 0.5:
        shutil.copytree(checkpoint, path)
    else:
        checkpoint.rename(path)
    return path.name


def _of_a_later_number(checkpoint: Path, rng: random.Random) -> Path:
    """Return a path beside a checkpoint on which nothing lies, of another harm either."""
    number = int(checkpoint.name) + rng.randrange(1, 50)
    while os.path.lexists(path := checkpoint.with_name(str(number))):
        number += 1
    return path


def foreign_inside(checkpoint: Path, rng: random.Random) -> str:
    folder = rng.choice([checkpoint, checkpoint / "state", checkpoint / "state" / "d"])
    path = folder / rng.choice([".nfs0001", "notes.txt", "params", "zarr.json", "0"])
    if rng.random() < 0.3:
        path.mkdir()
        path = path / "x"
    path.write_bytes(rng.randbytes(30))
    return path.name


def foreign_beside(checkpoint: Path, rng: random.Random) -> str:
    """Put something that is no checkpoint where the next one would be."""
    path = _of_a_later_number(checkpoint, rng)
    kind = rng.randrange(4)
    if kind == 0:
        path.write_bytes(rng.randbytes(30))
    elif kind == 1:
        path.mkdir()
    elif kind == 2:
        path.symlink_to("nowhere")
    else:
        (path / "state").mkdir(parents=True)
        (path / "state" / "_METADATA").write_text("{}")
    return path.name


HARMS: dict[str, Harm] = {
    harm.__name__: harm
    for harm in (
        truncated, emptied, missing, zeroed, bit_flipped, renamed, foreign_inside, foreign_beside,
    )
}  # fmt: skip
