"""Stand in for GKE's replicator service on several machines, each a folder, and for its bucket.

It follows the files that the service reads and writes, as its published source does (framework
orbax, one worker a node): it knows a checkpoint by its number alone, names its data by a hash of
the arrays, and has nothing in common with the package. What the real one does over the network and
with mounted volumes is done here by copying between folders. Hashes are SHA-256, not BLAKE3.
"""

from __future__ import annotations

import hashlib
import shutil
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import tensorstore
import yaml

_KEPT = (".meta", ".data")


class StandIn:
    """Serve the folders of some nodes from a thread, until the block ends.

    Attributes:
        restored: the step that each start was given, and where its parts came from.
        taken: the steps that all nodes have handed over.
        failure: why it has ended before, if it has.
    """

    def __init__(self, nodes: Sequence[Path], bucket: Path) -> None:
        self.nodes, self.bucket = list(nodes), bucket
        self.restored: list[tuple[int | None, dict[int, str]]] = []
        self.taken: list[int] = []
        self.failure = ""
        self._configs: dict[int, dict[str, Any]] = {}
        self._saved: dict[int, set[int]] = {}
        self._running: set[int] = set()
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> StandIn:
        for folder in (*self.nodes, self.bucket):
            folder.mkdir(parents=True, exist_ok=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        assert not self.failure, self.failure

    def _serve(self) -> None:
        try:
            while not self._stop.is_set():
                with self._lock:
                    self._look()
                time.sleep(0.01)
        except Exception:
            self.failure = traceback.format_exc()

    def _look(self) -> None:
        for node, folder in enumerate(self.nodes):
            if (folder / "replicator.yaml").exists():
                self._configure(node, folder)
            elif node in self._running:
                self._take(node, folder)
        if len(self._configs) == len(self.nodes):
            self._restore()

    def lose(self, *nodes: int) -> None:
        """Empty the folders of nodes, as if their machines had been replaced."""
        with self._lock:
            for node in nodes:
                for path in self.nodes[node].iterdir():
                    remove(path)

    def _configure(self, node: int, folder: Path) -> None:
        """Clear a folder of all but the service's own, and take the request away."""
        config = yaml.safe_load((folder / "replicator.yaml").read_text())
        assert config["framework"] == "orbax"
        assert config["nodes"] == len(self.nodes)
        assert config["node-rank"] == node
        assert config["nodes"] % config["assume-data-parallelism"] == 0
        assert ("backup-interval-minutes" in config) != ("backup-interval-steps" in config)
        for path in folder.iterdir():
            if path.suffix not in _KEPT and path.name != "replicator.yaml":
                remove(path)
        (folder / "replicator.yaml").unlink()
        self._running.discard(node)
        self._configs[node] = config
        self._saved.clear()

    def _restore(self) -> None:
        """Agree on the newest step that is whole, bring its parts, and answer each node."""
        configs = [self._configs[node] for node in range(len(self.nodes))]
        self._configs.clear()
        config = configs[0]
        self.job, self.backup_steps = config["job-name"], config["backup-interval-steps"]
        self.size = len(self.nodes) // config["assume-data-parallelism"]
        step, hashes, source = self._newest()
        brought: dict[int, str] = {}
        for node, folder in enumerate(self.nodes):
            if step is None:
                (folder / f"{self.job}-s0-n{node}-w0.restore").touch()
                continue
            data = f"{hashes[node]}.data"
            if not (folder / data).exists():
                places = [each for each in self.nodes if (each / data).exists()]
                place = places[0] if places else source
                assert place is not None
                shutil.copytree(place / data, folder / f"{data}.tmp")
                (folder / f"{data}.tmp").rename(folder / data)
                brought[node] = "peer" if places else "bucket"
            (folder / self._name(step, node, "meta")).write_text(hashes[node])
        for node, folder in enumerate(self.nodes):
            if step is not None:
                (folder / self._name(step, node, "restore")).symlink_to(f"{hashes[node]}.data")
            self._keep(folder, {step})
        self._running = set(range(len(self.nodes)))
        self.restored.append((step, brought))

    def _newest(self) -> tuple[int | None, dict[int, str], Path | None]:
        backups = sorted((self.bucket / self.job).glob("*"), reverse=True)
        for places in (self.nodes, *([each] for each in backups)):
            meta: dict[int, dict[int, str]] = {}
            for place in places:
                for path in place.glob(f"{self.job}-s*.meta"):
                    step, node = (int(each[1:]) for each in path.stem.split("-")[-3:-1])
                    meta.setdefault(step, {})[node] = path.read_text()
            for step in sorted(meta, reverse=True):
                hashes = meta[step]
                # A node whose part is unknown has that of one in another group.
                for node in range(len(self.nodes)):
                    others = range(node % self.size, len(self.nodes), self.size)
                    known = [hashes[each] for each in others if each in hashes]
                    if known:
                        hashes.setdefault(node, known[0])
                if len(hashes) == len(self.nodes) and all(
                    any((place / f"{each}.data").exists() for place in places)
                    for each in hashes.values()
                ):
                    return step, hashes, None if places is self.nodes else places[0]
        return None, {}, None

    def _take(self, node: int, folder: Path) -> None:
        """Take a folder whose name is a number; go on when all nodes have handed it over."""
        for path in folder.iterdir():
            if not path.name.isdecimal() or path.is_symlink():
                continue
            step = int(path.name)
            save = path.rename(folder / self._name(step, node, "save"))
            data = folder / f"{hash_of(save)}.data"
            assert not data.exists(), "the same as the checkpoint before"
            save.rename(data)
            (folder / self._name(step, node, "meta")).write_text(data.stem)
            self._saved.setdefault(step, set()).add(node)
            if len(self._saved[step]) == len(self.nodes):
                self._sync(step)

    def _sync(self, step: int) -> None:
        metas = [folder / self._name(step, node, "meta") for node, folder in enumerate(self.nodes)]
        groups = [metas[i : i + self.size] for i in range(0, len(metas), self.size)]
        for group in groups[1:]:  # replicas have the same bits, or no part could replace another
            assert [m.read_text() for m in group] == [m.read_text() for m in groups[0]]
        if step % self.backup_steps == 0:
            backup = self.bucket / self.job / f"{len(self.taken):04}"  # the real one's are times
            backup.mkdir(parents=True)
            for meta in metas:
                shutil.copy(meta, backup)
            for meta in groups[-1]:
                data = f"{meta.read_text()}.data"
                shutil.copytree(meta.with_name(data), backup / data)
        for folder in self.nodes:
            self._keep(folder, {step})
        self.taken.append(step)

    def _keep(self, folder: Path, steps: set[int | None]) -> None:
        kept = set()
        for path in folder.glob("*.meta"):
            if int(path.stem.split("-")[-3][1:]) in steps:
                kept.add(path.read_text())
            else:
                path.unlink()
        for path in folder.glob("*.data"):
            if path.stem not in kept:
                remove(path)

    def _name(self, step: int, node: int, suffix: str) -> str:
        return f"{self.job}-s{step}-n{node}-w0.{suffix}"


def hash_of(save: Path) -> str:
    """Return a hash of the arrays of a checkpoint, whatever the files that they are in."""
    store = next(path.parent for path in save.glob("*/manifest.ocdbt"))
    kvs = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{store}/"}).result()
    total = hashlib.sha256()
    for key in sorted(kvs.list().result()):
        total.update(key + b"\t" + hashlib.sha256(kvs.read(key).result().value).digest())
    return "D" + total.hexdigest()


def remove(path: Path) -> None:
    """Remove a file, a link or a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
