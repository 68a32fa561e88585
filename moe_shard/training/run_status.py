"""Read how a run is doing from the files in its folder; the run may still be going on."""

from __future__ import annotations

import fcntl
import json
import re
import shutil
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from moe_shard.checkpoints.run_files import address_of, checkpoint_bytes, checkpoint_names
from moe_shard.errors import UserError
from moe_shard.files import read_small
from moe_shard.training.goodput import Goodput, goodput, read_starts
from moe_shard.training.layer_history import LayerRecord, finite, read_layers
from moe_shard.training.metrics import LAYERS, METRICS, Record, read_metrics

CURVES = {
    "loss": "loss",
    "grad_norm": "gradient norm",
    "tokens_per_sec_per_device": "tokens/s of a device",
    "mfu": "MFU",
    "dropped_token_fraction": "share of dropped token choices",
    "expert_load_max_over_mean": "load of the busiest expert, x the mean",
    "learning_rate": "learning rate",
}
"""Metrics that are drawn, in this order, with their names for people."""

_RECENT = 50


@dataclass(frozen=True)
class RunStatus:
    """Hold how a run is doing.

    Attributes:
        name: name of its folder.
        running: whether a process holds the folder now.
        updates: updates that were made and recorded.
        steps: updates that it is to make; None where config.yml cannot be read.
        left_s: seconds that the rest takes at the recent pace; None where there is none.
        records: the lines of metrics.jsonl.
        verdict: verdict on the lowering of its step; None where it is not known.
        age_s: seconds since a step was recorded, or since the step was compiled if that is later;
            None where neither was.
        evaluations: the lines of eval.jsonl.
        layers: records of layers and norms, thinned.
        goodput: where its time went; None where it is not known.
        checkpoints: updates after which a checkpoint is there, ascending.
        set_aside: names of checkpoints that were found damaged.
        post_mortems: names of the files about steps that ended a start of the run.
        newest_bytes: size of the newest checkpoint; None where there is none.
        disk_free_bytes: room on the disk of its checkpoints; None where that is not known.
    """

    name: str
    running: bool
    updates: int
    steps: int | None
    left_s: float | None
    age_s: float | None
    records: Sequence[Record]
    evaluations: Sequence[Record]
    layers: Sequence[LayerRecord]
    verdict: str | None
    goodput: Goodput | None
    checkpoints: tuple[int, ...]
    set_aside: tuple[str, ...]
    post_mortems: tuple[str, ...]
    newest_bytes: int | None
    disk_free_bytes: int | None

    def to_json(self) -> dict[str, Any]:
        """Return the object of `moe-shard status --json`: the last of the records, not all."""
        listed = ("records", "evaluations", "layers")
        content = {
            each.name: getattr(self, each.name) for each in fields(self) if each.name not in listed
        }
        return content | {
            "goodput": asdict(self.goodput) if self.goodput else None,
            "last": self.records[-1] if self.records else None,
            "skipped_steps": len(self.skipped()),
            "last_evaluations": list(self.last_evaluations().values()),
            "last_layers": asdict(self.layers[-1]) if self.layers else None,
        }

    def skipped(self) -> list[int]:
        """List the steps that were skipped."""
        return [int(each["step"] or 0) for each in self.records if each.get("skipped")]

    def last_evaluations(self) -> dict[str, Record]:
        """Return {dataset: its last evaluation}."""
        return {str(each.get("dataset")): each for each in self.evaluations}

    def step_seconds(self, most: int | None = None) -> float | None:
        """Return the median time of a step, of the newest ones; None where none has a time."""
        newest = self.records if most is None else self.records[-most:]
        known = [x for each in newest if (x := finite(each.get("step_time_s"))) is not None]
        return statistics.median(known) if known else None

    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """Return {name for people: (step, value) of each record that has a finite one}."""
        found = {}
        for key, name in CURVES.items():
            points = [
                (int(each["step"] or 0), value)
                for each in self.records
                if (value := finite(each.get(key))) is not None
            ]
            if points:
                found[name] = points
        return found


def read_status(folder: Path) -> RunStatus:
    """Read a run's folder.

    Raises:
        UserError: it is not the folder of a run, or its metrics cannot be read.
    """
    if not folder.is_dir() or not any((folder / name).exists() for name in ("config.yml", ".lock")):
        raise UserError(
            f"{folder} is not the folder of a run\n"
            "fix: <base_output_directory>/<run_name>, which every run prints at its end"
        )
    records = read_metrics(folder / METRICS)
    updates = int(records[-1]["step"] or 0) + 1 if records else 0
    steps, left = _steps(folder / "config.yml"), None
    if steps is not None and records and updates < steps:
        recent = [finite(each.get("step_time_s")) or 0.0 for each in records[-_RECENT:]]
        left = statistics.median(recent) * (steps - updates)
    names = checkpoint_names(folder)
    checkpoints = tuple(sorted(int(name) for name in names if name.isdecimal()))
    return RunStatus(
        name=folder.resolve().name,
        running=_is_held(folder / ".lock"),
        updates=updates,
        steps=steps,
        left_s=left,
        age_s=_age(folder),
        records=records,
        evaluations=read_metrics(folder / "eval.jsonl"),
        layers=read_layers(folder / LAYERS),
        verdict=_verdict(folder / "lowering.json"),
        goodput=goodput(read_starts(folder)),
        checkpoints=checkpoints,
        set_aside=tuple(sorted(name for name in names if ".damaged" in name)),
        post_mortems=tuple(
            sorted(each for each in _names(folder) if re.fullmatch(r"bad_step_\d+\.json", each))
        ),
        newest_bytes=checkpoint_bytes(folder, str(checkpoints[-1])) if checkpoints else None,
        disk_free_bytes=None if address_of(folder) else _disk_free(folder),
    )


def spark(points: Sequence[tuple[int, float]], width: int) -> str:
    """Draw a curve in one line of text, the mean of each part of it.

    Args:
        points: (step, value), by step.
        width: characters, at most.
    """
    parts = min(width, len(points))
    edges = [len(points) * at // parts for at in range(parts + 1)]
    means = [
        statistics.fmean(value for _, value in points[start:end]) for start, end in pairwise(edges)
    ]
    low, high = min(means), max(means)
    levels = "▁▂▃▄▅▆▇█"
    scale = (len(levels) - 1) / (high - low) if high > low else 0.0
    return "".join(levels[round((mean - low) * scale)] for mean in means)


def _names(folder: Path) -> list[str]:
    try:
        return [each.name for each in folder.iterdir()]
    except OSError:
        return []


def _age(folder: Path) -> float | None:
    times = []
    for name in (METRICS, "lowering.json"):
        with suppress(OSError):
            times.append((folder / name).stat().st_mtime)
    return max(time.time() - max(times), 0.0) if times else None


def _disk_free(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _steps(path: Path) -> int | None:
    with suppress(OSError, ValueError, yaml.YAMLError, RecursionError):
        content: Any = yaml.safe_load(read_small(path))
        steps = content.get("steps") if isinstance(content, dict) else None
        return steps if type(steps) is int else None
    return None


def _verdict(path: Path) -> str | None:
    with suppress(OSError, ValueError, RecursionError):
        content: Any = json.loads(read_small(path))
        verdict = content.get("verdict") if isinstance(content, dict) else None
        return verdict if isinstance(verdict, str) else None
    return None


def _is_held(lock: Path) -> bool:
    """Return whether a process of this machine trains into the folder."""
    if not lock.is_file():  # opening a pipe would wait
        return False
    try:
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
