"""A training is run again while it makes progress; signals and codes are passed on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from moe_shard.cli import main
from moe_shard.cli.supervise import _Supervisor, progress
from moe_shard.config import load_config
from moe_shard.errors import UserError

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "docs" / "launch"

# Ends with the next of the codes; a negative one is a signal. Each start makes `steps` steps.
RUN = """
import os, pathlib, sys
folder, steps, *codes = sys.argv[1:]
folder = pathlib.Path(folder)
starts = folder / "starts"
made = len(starts.read_text().split()) if starts.exists() else 0
starts.open("a").write("x\\n")
with (folder / "metrics.jsonl").open("a") as file:
    for step in range(made * int(steps), (made + 1) * int(steps)):
        file.write('{"step": %d}\\n' % step)
code = int(codes[min(made, len(codes) - 1)])
if code < 0:
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("steps", "codes", "ended", "starts"),
    [
        (5, [75, -9, 0], 0, 3),
        (5, [75] * 6 + [0], 0, 7),  # more than max_restarts, each with progress
        (0, [75], 75, 3),
        (0, [-9], 137, 3),
        (5, [1], 1, 1),
        (5, [75, 2], 2, 2),
        (5, [130], 130, 1),
    ],
)
def test_it_restarts_while_progress_is_made(
    tmp_path: Path, steps: int, codes: list[int], ended: int, starts: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("moe_shard.cli.supervise._LONGEST_DELAY_S", 0.1)
    command = [sys.executable, "-c", RUN, str(tmp_path), str(steps), *map(str, codes)]
    assert _Supervisor(command, tmp_path, max_restarts=2 if steps == 0 else 3)() == ended
    assert len((tmp_path / "starts").read_text().split()) == starts


WATCHER = """
import sys
from pathlib import Path
from moe_shard.cli.supervise import _Supervisor
child = (
    "import signal, sys, time\\n"
    "signal.signal(signal.SIGINT, lambda *_: sys.exit(75))\\n"
    "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\\n"
    "import os; print(os.getpid(), flush=True); time.sleep(60)"
)
sys.exit(_Supervisor([sys.executable, "-c", child], Path(sys.argv[1]), 3)())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_is_passed_on_and_nothing_left_behind(
    tmp_path: Path, number: signal.Signals
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WATCHER, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.send_signal(number)
    assert process.wait(30) == (-9 if number == signal.SIGKILL else 75)
    process.stdout.close()
    for _ in range(100):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        state = Path(f"/proc/{child}/stat")
        if state.exists() and ") Z " in state.read_text():  # nobody collects it here
            return
        time.sleep(0.1)
    raise AssertionError("the command goes on without its supervisor")


def test_progress_is_the_newest_checkpoint_or_record(tmp_path: Path) -> None:
    assert progress(tmp_path) == 0
    (tmp_path / "checkpoints" / "7").mkdir(parents=True)
    (tmp_path / "checkpoints" / "12.damaged").mkdir()
    assert progress(tmp_path) == 7
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 8}\n[]\n\xff\n{"step": 9')
    assert progress(tmp_path) == 9


@pytest.mark.parametrize(
    "arguments",
    [[], ["--", "generate", "x"], ["--", "train"], ["--max-restarts", "-1", "--", "train", "x"]],
)
def test_bad_usage(arguments: list[str]) -> None:
    with pytest.raises(UserError):
        main(["supervise", *arguments])
    with pytest.raises(UserError, match="mixtral-tiny"):
        main(["supervise", "--", "train", "mixtral-tinny"])


# The launch files.


@pytest.mark.parametrize("path", sorted(LAUNCH.iterdir()), ids=lambda path: path.name)
def test_a_launch_file_is_whole_and_its_command_exists(path: Path) -> None:
    text = path.read_text()
    if path.suffix == ".yaml":
        spec = yaml.safe_load(text)["spec"]["replicatedJobs"][0]["template"]["spec"]
        (container,) = spec["template"]["spec"]["containers"]
        command = " ".join(container["command"])
        (codes, _) = spec["podFailurePolicy"]["rules"]
        assert 75 not in codes["onExitCodes"]["values"]
        env = {each["name"]: each["value"] for each in container["env"]}
        assert env["JAX_NUM_PROCESSES"] == str(spec["completions"]) == str(spec["parallelism"])
    else:
        subprocess.run(["bash", "-n", str(path)], check=True)
        command = re.sub(r"\\\n", " ", text)
    found = re.search(
        r"moe-shard (?:supervise -- )?train (\S+)((?:\s+\w+=(?:\"[^\"]*\"|\S+))+)", command
    )
    assert found is not None
    keys = [re.sub(r'"[^"]*"', "x", each) for each in found[2].split() if "=" in each]
    assert load_config(found[1], keys).train.steps == 100_000
