"""Keep a run's own files on this machine where its checkpoints are in a bucket.

Records are appended and settings renamed, which a bucket does neither. So the folder of a run in
`gs://BUCKET/PATH/RUN` is `outputs/gs/BUCKET/PATH/RUN` here, and `bucket.json` in it names the
bucket. Copies of the files are in the bucket, with a `bucket.json` that counts how often they were
copied: whichever has the larger count is ahead, and a start on another machine begins by fetching.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from moe_shard.checkpoints.bucket import SCHEME, Bucket, is_address
from moe_shard.config.keys import shown
from moe_shard.errors import UserError
from moe_shard.files import expanded, write_bytes, write_text

COPIED = "bucket.json"
CHECKPOINTS = "checkpoints"
_HF = "hf"
"""Files of the Hugging Face directory that the run began with, of which `export` needs them."""


def here(path: str | Path) -> Path:
    """Return the folder of this machine that a run's path names: itself, or that of an address."""
    if not is_address(path):
        return expanded(path)
    return Path("outputs", "gs", str(path).rstrip("/").removeprefix(SCHEME)).absolute()


def address_of(folder: Path) -> str | None:
    """Return where in a bucket a run's checkpoints are; None where they are in its folder."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        address = json.loads((folder / COPIED).read_text())["address"]
        return address if isinstance(address, str) and is_address(address) else None
    return None


def checkpoints_of(folder: Path) -> Any:
    """Return the path of a run's checkpoints, as Orbax takes it."""
    address = address_of(folder)
    if address is None:
        return folder / CHECKPOINTS
    from etils import epath

    return epath.Path(address) / CHECKPOINTS


def checkpoint_names(folder: Path) -> list[str]:
    """List what is among a run's checkpoints; nothing where that cannot be read.

    In a bucket, one that is not complete has the name of one that is, and is left out.
    """
    address = address_of(folder)
    try:
        if address is None:
            return os.listdir(folder / CHECKPOINTS)
        folders, complete = Bucket(f"{address}/{CHECKPOINTS}").checkpoints()
    except OSError:
        return []
    return [each for each in folders if each in complete or not each.isdecimal()]


def checkpoint_bytes(folder: Path, name: str) -> int:
    """Add up the files of a checkpoint; those that are removed meanwhile are left out."""
    total, address = 0, address_of(folder)
    if address is not None:
        with suppress(OSError):
            found = Bucket(f"{address}/{CHECKPOINTS}").find(name)
            total = sum(each.size for each in found.values())
        return total
    for where, _, names in os.walk(folder / CHECKPOINTS / name):
        for each in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(where, each)).st_size
    return total


def opened(path: str | Path) -> Path:
    """Return the folder on this machine of a run to be read, which may be an address.

    Raises:
        UserError: there is no such run in the bucket, or it cannot be reached.
    """
    if not is_address(path):
        return expanded(path)
    folder = fetch(str(path).rstrip("/"), writes=False)
    if not (folder / COPIED).is_file():
        raise UserError(
            f"{path} holds no run\n"
            "fix: gs://BUCKET/PATH/RUN_NAME, as base_output_directory and run_name were given"
        )
    return folder


def mark(folder: Path, address: str, copies: int) -> bytes:
    """Write a folder's `bucket.json`, and return it."""
    content = json.dumps({"address": address, "copies": copies}) + "\n"
    write_text(folder / COPIED, content)
    return content.encode()


def copies_of(read: Callable[[], bytes]) -> int:
    """Return how often files were copied, by a `bucket.json`; 0 where there is none."""
    try:
        return int(json.loads(read())["copies"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return 0


def fetch(address: str, *, writes: bool = True) -> Path:
    """Fetch a run's files from its bucket if those are ahead, and return its folder here.

    Args:
        address: of the run.
        writes: whether something is to be written there.

    Raises:
        UserError: the bucket cannot be reached, or the files cannot be written here.
    """
    _reach(address, writes=writes)
    folder, bucket = here(address), Bucket(address)
    try:
        there = copies_of(lambda: bucket.read(COPIED))
        if there > copies_of((folder / COPIED).read_bytes):
            folder.mkdir(parents=True, exist_ok=True)
            found = {name: each for name, each in bucket.listed()[0].items() if name[0] != "."}
            del found[COPIED]  # the last to be written
            found |= {f"{_HF}/{name}": each for name, each in bucket.find(_HF).items()}
            # Names in a bucket are any text, and become paths here.
            if leaving := [name for name in found if ".." in Path(name).parts]:
                raise UserError(
                    f"{address} has an object {shown(leaving[0])}, which leaves the run's folder\n"
                    "fix: remove that object; no run has written it"
                )
            for name, each in found.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                write_bytes(folder / name, bucket.read(name))
                os.utime(folder / name, (each.written, each.written))  # `status` tells its age
            mark(folder, address, there)
    except OSError as error:
        raise UserError(
            f"cannot fetch the files of {address} into {folder}: {error.strerror}\n"
            "fix: a current folder that you may write to, and a bucket that you may read"
        ) from error
    return folder


@lru_cache
def _reach(address: str, *, writes: bool) -> None:
    """See once that the bucket can be used."""
    Bucket(address).reach(writes=writes)
