"""Fill the disk under a run's checkpoints: said at once, older ones whole, later ones saved."""

from __future__ import annotations

import gc
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest

from moe_shard.checkpoints.checkpoint import Checkpointer
from moe_shard.checkpoints.room import least_bytes
from moe_shard.errors import Finding
from tests.checkpoints.test_damage import abstract, state_of
from tests.models.build import small_config

# pytest has its own hook in the place of `hide_late_callbacks`.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def late_writes() -> Iterator[None]:
    """Let what a failed save has left behind be collected here, not in another test."""
    yield
    gc.collect()


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond a size in bytes, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)


def wait(checkpointer: Checkpointer, lines: list[str]) -> None:
    deadline = time.monotonic() + 60
    while not lines and time.monotonic() < deadline:
        checkpointer.poll()
        time.sleep(0.01)


@pytest.mark.parametrize("mode", ["true", "false"], ids=["async", "sync"])
@pytest.mark.parametrize("size", [0, 300, 4000])
def test_a_save_that_fails_is_said_and_the_next_one_is_saved(
    tmp_path: Path, mode: str, size: int, capfd: pytest.CaptureFixture[str]
) -> None:
    lines: list[str] = []
    config = small_config(
        {"data": 8}, f"async_checkpointing={mode}", "max_num_checkpoints_to_keep=1"
    )
    folder = tmp_path / "checkpoints"
    checkpointer = Checkpointer(folder, config, say=lines.append)
    checkpointer.save(state_of(2), updates=2)
    checkpointer.finish()
    capfd.readouterr()
    with files_of_at_most(size):
        checkpointer.save(state_of(4), updates=4)
        wait(checkpointer, lines)
    assert len(lines) == 1
    assert len(lines[0].splitlines()) == 2
    for part in ("after step 4 was not saved", "File too large", " free, needs about ", "fix: "):
        assert part in lines[0]
    assert capfd.readouterr() == ("", "")
    assert checkpointer.latest() == 2
    with pytest.raises(Finding, match="after step 4 was not saved"):
        checkpointer.finish()
    checkpointer.save(state_of(6), updates=6)
    checkpointer.finish()
    checkpointer.close()
    assert len(lines) == 1
    assert {path.name for path in folder.iterdir()} == {"6"}
    again = Checkpointer(folder, config, say=lines.append)
    restored = again.restore(6, abstract(state_of(6)))
    again.close()
    jax.tree.map(
        np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state_of(6))
    )


def test_what_cannot_fit_is_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    config = small_config({"data": 8})
    checkpointer = Checkpointer(tmp_path / "checkpoints", config, say=lines.append)
    monkeypatch.setattr("moe_shard.checkpoints.place.free_bytes", lambda _: 1000)
    checkpointer.save(state_of(4), updates=4)
    assert "it cannot fit on the disk (1.0 kB free, needs about 6" in lines[0]
    monkeypatch.undo()
    checkpointer.save(state_of(4), updates=4)
    checkpointer.finish()
    checkpointer.close()
    assert len(lines) == 1


@pytest.mark.parametrize(("times", "waits"), [(2, True), (4, False)])
def test_a_step_waits_for_one_that_may_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int, waits: bool
) -> None:
    lines: list[str] = []
    config = small_config({"data": 8})
    checkpointer = Checkpointer(tmp_path / "checkpoints", config, say=lines.append)
    free = times * least_bytes(state_of(2), None)
    monkeypatch.setattr("moe_shard.checkpoints.place.free_bytes", lambda _: free)
    monkeypatch.setattr(checkpointer._manager, "is_saving_in_progress", lambda: True)
    for updates in (2, 4):
        checkpointer.save(state_of(updates), updates=updates)
        assert (updates in checkpointer.complete()) == waits
    checkpointer.finish()
    checkpointer.close()
    assert [line.split(" (")[0] for line in lines] == ["little room for checkpoints"] * waits
