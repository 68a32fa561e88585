"""Make whole folders that cases copy and harm: checkpoints of a run, an imported model."""

from __future__ import annotations

import functools
import json
import random
import shutil
import tempfile
from atexit import register
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from tests.checkpoints.damage import HARMS as OF_CHECKPOINTS
from tests.checkpoints.damage import files_of
from tests.hostile.cases import (
    TINY_YML,
    Special,
    damaged,
    other_json,
    something,
    write_special,
)


@functools.cache
def template(name: str) -> Path:
    """Return a folder that is made once in each process, and removed at its end."""
    folder = Path(tempfile.mkdtemp(prefix="hostile-template-"))
    register(shutil.rmtree, folder, ignore_errors=True)
    with redirect_stdout(StringIO()):
        return _TEMPLATES[name](folder)


def saved_state(updates: int) -> Any:
    """Return the small state that the checkpoints of the template hold."""
    from tests.checkpoints.test_damage import state_of

    return state_of(updates)


def _checkpoints(folder: Path) -> Path:
    from moe_shard.checkpoints.checkpoint import Checkpointer
    from moe_shard.config import load_config

    (folder / "tiny.yml").write_bytes(TINY_YML)
    checkpointer = Checkpointer(
        folder / "checkpoints", load_config(str(folder / "tiny.yml"), ["steps=20"])
    )
    for updates in (7, 12):
        checkpointer.save(saved_state(updates), updates=updates)
    checkpointer.close()
    return folder / "checkpoints"


def _imported(folder: Path) -> Path:
    from moe_shard.cli import main
    from tests.autoep.directory import small_models, write_model

    model = small_models()["mixtral-0"]
    write_model(folder / "hf", model["config"], model["saved"])
    main(["import", str(folder / "hf"), str(folder / "imported"), "num_simulated_devices=8"])
    return folder / "imported"


_TEMPLATES: dict[str, Callable[[Path], Path]] = {
    "checkpoints": _checkpoints,
    "imported": _imported,
}


def _text_damaged(folder: Path, rng: random.Random) -> None:
    path = rng.choice(files_of(folder))
    path.write_bytes(damaged(path.read_bytes(), rng))


def _other_types(folder: Path, rng: random.Random) -> None:
    found = []
    for path in files_of(folder):
        try:
            found.append((path, json.loads(path.read_bytes())))
        except ValueError:
            continue
    path, content = rng.choice(found)
    path.write_text(json.dumps(other_json(content, rng, rng.randint(1, 3))))


def _replaced(folder: Path, rng: random.Random) -> None:
    path = rng.choice(sorted(folder.rglob("*")))
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    other = something(rng)
    if isinstance(other, Special):
        write_special(path, other)
    elif other is None:
        path.mkdir()
    else:
        path.write_bytes(other)


HARMS: dict[str, Callable[[Path, random.Random], object]] = {
    **OF_CHECKPOINTS,
    "text_damaged": _text_damaged,
    "other_types": _other_types,
    "replaced": _replaced,
}
"""Name -> what harms a folder."""
