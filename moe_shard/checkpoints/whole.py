"""Find the newest checkpoint that is whole, and set aside those that are damaged.

A damaged checkpoint is renamed, `12` to `12.damaged`, and so is never counted again and never
deleted. A run whose checkpoints are all damaged is refused: it does not start from scratch.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all, process_allgather

from moe_shard.checkpoints.checksums import CHECKSUMS, Checksums, Damage
from moe_shard.checkpoints.in_bucket import place_of
from moe_shard.checkpoints.place import CheckpointPlace
from moe_shard.checkpoints.stored_arrays import read_all
from moe_shard.data.corpus import Say
from moe_shard.errors import UserError, first_line
from moe_shard.units import human_bytes

_LONG_S = 5.0
_MESSAGE_BYTES = 1024


@dataclass(frozen=True)
class Whole:
    """Describe a checkpoint that is whole.

    Attributes:
        updates: the number of updates that names it.
        manifest: its manifest; None if it was saved without one.
    """

    updates: int
    manifest: Checksums | None


def find_whole(
    folder: Path | CheckpointPlace,
    *,
    updates: int | None = None,
    verify: bool = True,
    set_aside: bool = False,
    say: Say = lambda _: None,
) -> Whole | None:
    """Find the newest checkpoint of a folder that is whole.

    All processes call it; each reads the checksums of its part of the files, and all get the same
    answer.

    Args:
        folder: `checkpoints/` of a run, in a folder or a bucket; or `params/` of an imported model.
        updates: the only one to consider; None: all.
        verify: whether to read every file and compare checksums; otherwise names and sizes are.
        set_aside: whether to rename damaged ones, and to remove what killed processes left
            unfinished. Only the run itself does; others write nothing.
        say: receives a line on each that is damaged, and on what was assumed.

    Returns:
        The checkpoint; None if the folder holds none, damaged or not.

    Raises:
        UserError: there are some, but none is whole; or the folder cannot be read.
    """
    place = folder if isinstance(folder, CheckpointPlace) else place_of(folder)
    names = on_first(place.numbers)
    if updates is not None:
        names = [name for name in names if int(name) == updates]
    run = on_first(lambda: _run_of(place, names))
    damaged: list[tuple[str, Damage]] = []
    for name in names:
        started = time.perf_counter()
        try:
            with on_all_processes():
                manifest, notes = _examine(place, name, run, verify=verify)
        except Damage as damage:
            damaged.append((name, damage))
            continue
        if (seconds := time.perf_counter() - started) > _LONG_S and manifest is not None:
            notes.append(
                f"verified {human_bytes(manifest.bytes)} of checkpoint {name} in {seconds:.0f} s "
                "(verify_checkpoints=false compares sizes only)"
            )
        # Only now is anything renamed: without a whole one everything is left as it is.
        for at, why in damaged:
            kept = f"; set aside as {on_first(partial(place.set_aside, at))}" if set_aside else ""
            say(f"the checkpoint {place.path / at} is damaged: {why}{kept}")
        for note in notes:
            say(note)
        if set_aside:
            on_first(place.remove_unfinished)
        return Whole(int(name), manifest)
    _refuse(place.path, damaged, [] if updates is not None else on_first(place.aside))
    if set_aside:
        on_first(place.remove_unfinished)
    return None


def _refuse(folder: Path, damaged: list[tuple[str, Damage]], aside: list[str]) -> None:
    """Refuse a folder whose checkpoints are all damaged, or have all been set aside.

    Raises:
        UserError: they are.
    """
    if damaged:
        newest, why = damaged[0]
        many = f"none of the {len(damaged)} checkpoints in {folder} is whole; "
        what = (
            f"{many if len(damaged) > 1 else ''}the checkpoint {folder / newest} is damaged: {why}"
        )
    elif aside:
        what = f"{folder} holds only damaged checkpoints: {', '.join(aside[:3])}"
    else:
        return
    fix = (
        "import the model again"
        if folder.name == "params"
        else "put a whole one there, or another run_name to start anew"
    )
    raise UserError(f"{what}\nfix: {fix}")


def _examine(
    place: CheckpointPlace, name: str, run: str | None, *, verify: bool
) -> tuple[Checksums | None, list[str]]:
    """Return a checkpoint's manifest and notes on it.

    Raises:
        Damage: it is not whole, is of another run, or has another number.
    """
    path = place.path / name
    manifest = place.manifest(name)
    if manifest is None:
        # Saved before there were checksums. What can be said is whether the arrays can be read.
        if jax.process_index() == 0:
            read_all(path)
        return None, [f"{path} has no {CHECKSUMS}: its arrays can be read, but are not verified"]
    if manifest.updates != int(name):
        raise Damage(f"it was saved after step {manifest.updates}")
    if run is not None and manifest.run != run:
        raise Damage("it is of another run than the others there")
    part, parts = jax.process_index(), jax.process_count()
    foreign = place.compare(name, manifest, verify=verify, part=part, parts=parts)
    notes = []
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        notes.append(f"{path} also holds {foreign[0]!r}{more}, not of the checkpoint: ignored")
    return manifest, notes


def _run_of(place: CheckpointPlace, names: list[str]) -> str | None:
    """Return the run that most of the checkpoints are of; None where none tells."""
    runs: Counter[str] = Counter()
    for name in reversed(names):  # of equally many, the run that began here
        try:
            manifest = place.manifest(name)
        except Damage:
            continue
        if manifest is not None and manifest.updates == int(name):
            runs[manifest.run] += 1
    return runs.most_common(1)[0][0] if runs else None


def on_first(work: Callable[[], Any]) -> Any:
    """Run something on the first process, and give all its result, or its error.

    Raises:
        UserError: raised by the work.
    """
    if jax.process_count() == 1:
        return work()
    said: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            said = {"result": work()}
        except UserError as error:
            said = {"error": str(error)}
    own = np.frombuffer(json.dumps(said).encode(), np.uint8)
    length = int(broadcast_one_to_all(np.int32(own.size)))
    sent = broadcast_one_to_all(np.resize(own, length))
    said = json.loads(np.asarray(sent, np.uint8).tobytes())
    if "error" in said:
        raise UserError(said["error"])
    return said["result"]


@contextmanager
def on_all_processes() -> Iterator[None]:
    """Raise on every process the damage that one of them finds in the block.

    Raises:
        Damage: of the first process that found one.
    """
    found = ""
    try:
        yield
    except Damage as damage:
        found = str(damage)
    except Exception as error:  # Orbax and tensorstore raise whatever a damaged file leads to
        found = first_line(error)
    if said := said_by_all(found):
        raise Damage(next(iter(said.values())))


def said_by_all(line: str) -> dict[int, str]:
    """Gather what each process has to say.

    Args:
        line: of this process; empty for nothing.

    Returns:
        Process -> its line, where there is one, in order.
    """
    if jax.process_count() == 1:
        return {0: line} if line else {}
    text = np.zeros(_MESSAGE_BYTES, np.uint8)
    own = np.frombuffer(line.encode()[:_MESSAGE_BYTES], np.uint8)
    text[: own.size] = own
    lines = np.asarray(process_allgather(text), np.uint8)
    each = [line.tobytes().rstrip(b"\0").decode(errors="replace") for line in lines]
    return {process: said for process, said in enumerate(each) if said}
