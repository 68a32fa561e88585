"""Check a run's folder: one process at a time, and no folder elsewhere."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_shard.config import load_config
from moe_shard.config.schema import RunConfig
from moe_shard.errors import UserError
from moe_shard.training.run_folder import open_run

HOLD = """
import sys
from moe_shard.config.schema import RunConfig
from moe_shard.training.run_folder import open_run
folder, name = sys.argv[1:]
nothing = dict(load_parameters_path="", hf_family="")
with open_run(RunConfig(base_output_directory=folder, run_name=name, model_name="m", **nothing)):
    print("held", flush=True)
    sys.stdin.read()
"""


def run_config(folder: Path, name: str = "run") -> RunConfig:
    return RunConfig(
        base_output_directory=str(folder),
        run_name=name,
        model_name="m",
        load_parameters_path="",
        hf_family="",
    )


def message_of(config: RunConfig) -> str:
    with pytest.raises(UserError) as caught, open_run(config):
        pass
    message = str(caught.value)
    assert len(message.splitlines()) <= 3
    assert "fix: " in message
    return message


def test_the_folder_is_made_and_let_go_again(tmp_path: Path) -> None:
    for _ in range(2):
        with open_run(run_config(tmp_path / "a" / "b")) as folder:
            assert folder == tmp_path / "a" / "b" / "run"
            assert folder.is_dir()


def test_a_relative_folder_is_made_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with open_run(run_config(Path("outputs"))) as folder:
        assert folder == tmp_path / "outputs" / "run"


def test_two_processes_in_one_folder_are_refused_until_the_first_ends(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path), "run"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert "another process" in message_of(run_config(tmp_path))
        with open_run(run_config(tmp_path, "other")):  # another run is free
            pass
        holder.kill()  # without a chance to clean up
    with open_run(run_config(tmp_path)):
        pass


def test_the_folder_is_let_go_when_the_run_fails(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    with pytest.raises(ZeroDivisionError), open_run(config):
        _ = 1 / 0
    with open_run(config):
        pass


def test_a_process_that_does_not_write_shares_the_folder_and_keeps_its_own_errors(
    tmp_path: Path,
) -> None:
    config = run_config(tmp_path)
    with open_run(config) as folder, open_run(config, writer=False) as same:
        assert same == folder
    with pytest.raises(FileNotFoundError), open_run(config, writer=False):
        (tmp_path / "absent").read_text()


def test_an_output_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = message_of(run_config(tmp_path / "file"))
    assert "base_output_directory" in message
    assert str(tmp_path / "file") in message


def test_a_run_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    assert str(tmp_path / "run") in message_of(run_config(tmp_path))


@pytest.mark.parametrize("name", ["a/b", "/a", "..", ".", "../a"])
def test_a_run_name_never_leaves_the_output_directory(name: str) -> None:
    with pytest.raises(UserError, match="run_name"):
        load_config("mixtral-tiny", [f"run_name={name}"])
    # It is checked again where the folder is made, for callers with another configuration.
    config = run_config(Path("unused"))
    object.__setattr__(config, "run_name", name)
    assert "run_name" in message_of(config)


def test_run_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        run_config(Path("a")).run_name = ".."  # type: ignore[misc]


@pytest.mark.parametrize(
    "name", [".lock", "config.yml", "lowering.json", "metrics.jsonl", "goodput.json", "any.jsonl"]
)
@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_something_else_in_the_place_of_a_file_is_refused(
    tmp_path: Path, name: str, make: Callable[[Path], None]
) -> None:
    (tmp_path / "run").mkdir()
    make(tmp_path / "run" / name)
    message = message_of(run_config(tmp_path))
    assert f"{tmp_path / 'run' / name} is no file" in message


@pytest.mark.parametrize("name", ["tensorboard", "checkpoints", "hlo", "profile"])
def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("")
    assert f"{name} is no folder" in message_of(run_config(tmp_path))
    (tmp_path / "run" / name).unlink()
    (tmp_path / "run" / name).symlink_to(tmp_path / "nothing")
    assert "a link to nothing" in message_of(run_config(tmp_path))
