"""Talk to GKE's replicator service through the files of a folder that it watches on each machine.

A start writes `replicator.yaml`; the service clears the folder of all but its own files, takes that
one away, agrees with the services of the other machines on a checkpoint that is whole, brings it
here from another machine or the bucket, and answers with a link, JOB-sSTEP-nRANK-w0.restore, to
it; with an empty file of step 0 if there is none. From then on it takes every folder whose name is
a number: it renames it, copies it, and removes it when a newer one is safe. `replicator.errors` and
`replicator.failed` are its complaints.

Source: github.com/GoogleCloudPlatform/checkpoint-replicator, and `initialization.py` of Orbax's
multi-tier checkpointing, which also joins the processes; here they are joined already.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from moe_shard.data.corpus import Say
from moe_shard.errors import UserError
from moe_shard.files import read_small, write_text

REQUEST, ERRORS, FAILED = "replicator.yaml", "replicator.errors", "replicator.failed"
_BROUGHT_S = 900.0  # a checkpoint of a large model may come from the bucket
_SAID_S = 30.0


@dataclass(frozen=True)
class Node:
    """Describe this process among those of a run, as the service has to know it.

    Attributes:
        job: names the run; the service keeps its copies in the bucket under this name.
        rank: of this process.
        nodes: number of processes, each on a machine of its own.
        groups: groups of processes that hold the same, of consecutive ranks.
        minutes: minutes between copies to the bucket; 0: `steps` counts.
        steps: updates between copies to the bucket.
    """

    job: str
    rank: int
    nodes: int
    groups: int
    minutes: int
    steps: int

    @property
    def peers(self) -> list[int]:
        """Return the ranks of the other processes that hold the same as this one."""
        size = self.nodes // self.groups
        return [rank for rank in range(self.rank % size, self.nodes, size) if rank != self.rank]

    def request(self) -> str:
        """Return the text of `replicator.yaml`."""
        interval = (
            f"backup-interval-minutes: {self.minutes}"
            if self.minutes
            else f"backup-interval-steps: {self.steps}"
        )
        return (
            f"job-name: {json.dumps(self.job)}\nframework: orbax\n"
            f"assume-data-parallelism: {self.groups}\nnode-rank: {self.rank}\n"
            f"nodes: {self.nodes}\npeer-ranks: {self.peers}\n{interval}\n"
        )


class Replicator:
    """Ask the service of this machine, and hear what it complains of.

    Args:
        folder: that it watches.
        node: this process.
    """

    def __init__(self, folder: Path, node: Node) -> None:
        self._folder, self._node = folder, node

    def ask(self, seconds: float) -> str:
        """Write the request and wait until the service has taken it.

        Args:
            seconds: how long to wait.

        Returns:
            Why it was not taken; empty if it was.
        """
        request = self._folder / REQUEST
        deadline = time.monotonic() + seconds
        try:
            # That of a start before this one may be on its way.
            taken = _within(deadline, lambda: not request.exists())
            if taken:
                write_text(request, self._node.request())
                taken = _within(deadline, lambda: not request.exists())
            if taken:
                return ""
            request.unlink(missing_ok=True)
        except OSError as error:
            return f"cannot write to {self._folder}: {error.strerror}"
        return f"nothing has taken {REQUEST} out of {self._folder} in {seconds:g} s"

    def wait(self, say: Say) -> Path | None:
        """Wait for the service's answer.

        Args:
            say: receives a line every half minute.

        Returns:
            The link to the checkpoint that it has brought; None if there is none.

        Raises:
            UserError: it has given up, or does not answer.
        """
        began = time.monotonic()
        said = began + _SAID_S
        while time.monotonic() < began + _BROUGHT_S:
            if failed := self.complaint(FAILED):
                raise UserError(
                    f"GKE's replicator service has given up in {self._folder}: {failed}\n"
                    "fix: what it says, or enable_multi_tier_checkpointing=false"
                )
            found = [path for path in self._folder.iterdir() if self.step_of(path) is not None]
            if found:
                brought = [path for path in found if path.is_symlink()]
                for path in {*found} - {*brought}:
                    path.unlink(missing_ok=True)
                return max(brought, key=lambda path: self.step_of(path) or 0, default=None)
            if time.monotonic() > said:
                said += _SAID_S
                say("waiting for GKE's replicator service to bring the newest checkpoint")
            time.sleep(0.1)
        raise UserError(
            f"GKE's replicator service has brought no checkpoint to {self._folder} in "
            f"{_BROUGHT_S:g} s, nor said that there is none\n"
            "fix: its logs (kubectl logs), or enable_multi_tier_checkpointing=false"
        )

    def step_of(self, path: Path) -> int | None:
        """Return the step that the name of an answer of the service has; None for other files."""
        found = re.fullmatch(
            rf"{re.escape(self._node.job)}-s(\d{{1,18}})-n\d+-w\d+\.restore", path.name
        )
        return int(found.group(1)) if found else None

    def complaint(self, name: str) -> str:
        """Return the last line of a file of complaints, and remove it; empty if there is none."""
        path = self._folder / name
        lines: Sequence[str] = ()
        with suppress(OSError, UserError):
            lines = read_small(path).decode(errors="replace").split("\n")
            path.unlink()
        return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")

    def untaken(self) -> list[int]:
        """Return the numbers of checkpoints that the service has not taken yet."""
        return sorted(int(path.name) for path in self._folder.iterdir() if path.name.isdecimal())


def _within(deadline: float, condition: Callable[[], bool]) -> bool:
    """Return whether a condition holds before a deadline, of `time.monotonic()`."""
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
