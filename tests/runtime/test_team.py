"""Processes agree on a step, see a death, and end with a line and a code: without jax."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe_shard.runtime.team import Team
from tests.soak.runs import answers

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, sys, time
from moe_shard.errors import Finding, UserError, run_command
from moe_shard.runtime.team import Team
mode, wait, late = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
def main():
    with Team() as team:
        if mode == "slow" and team.index == 1:
            print("greeted", flush=True)
            time.sleep(60)
        if team.index == late:
            time.sleep(60)
        if team.launch:
            team.join_seconds = wait
            team.meet(team.launch.address, team.launch.index, team.launch.count)
        print("met", flush=True)
        if mode == "start":
            time.sleep(60)
        with team.running(0):
            step = 0
            while not team.reached(step := step + 1):
                time.sleep(0.01 * (1 + team.index))
                print(step, flush=True)
                if mode == "long step":
                    time.sleep(60)
                if mode == "fail" and team.index == 1 and step == 5:
                    raise UserError("it is wrong\\nfix: it")
                if mode == "ask" and team.index == 1 and step == 5:
                    team.ask("a full disk", code=7)
                if mode == "all fail" and step == 5:
                    raise Finding("a finding")
        print("stopped", team.reason, "after", step, flush=True)
    return team.code
run_command(main)
"""

SILENCE = """
import socket, time
from moe_shard.runtime import launch, link
link._CONNECT_SECONDS = 0.2
service = socket.create_server(("127.0.0.1", 0))
listener = link.listen("127.0.0.1", 0, "a free port")
hub = link.Hub(listener, 2, service.getsockname()[1])
address = link.serve_jax(("127.0.0.1", listener.getsockname()[1]))
client = socket.create_connection(launch.split_address(address, "it"))
served, _ = service.accept()
time.sleep(0.6)
words = []
for source, target in ((served, client), (client, served)):
    source.sendall(b"word")
    target.settimeout(10)
    words.append(target.recv(4).decode())
print(*words)
"""


class Processes:
    """Start processes of one run, and read what they print; one may be late to meet the others."""

    def __init__(
        self, mode: str, count: int, *, only: int | None = None, wait: float = 60, late: int = -1
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        base = {**os.environ, "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
        env = base | {"PYTHONPATH": str(ROOT)}
        self.all = [
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, mode, str(wait), str(late)],
                env=env | {"JAX_PROCESS_ID": str(index)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(count)
            if only in (None, index)
        ]

    def until(self, line: str) -> None:
        for process in self.all:
            assert process.stdout is not None
            while (found := process.stdout.readline().strip()) != line:
                assert found, self.end()

    def end(self) -> list[tuple[int, str, str]]:
        """Return the code, the last line printed and the lines of errors of each."""
        done = []
        try:
            for process in self.all:
                out, err = process.communicate(timeout=60)
                done.append((process.returncode, (out.splitlines() or [""])[-1], err))
        finally:
            for process in self.all:
                process.kill()
        return done


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("asked", [0, 2])
def test_all_stop_after_the_same_step(number: signal.Signals, asked: int) -> None:
    run = Processes("steps", 3)
    run.until("10")
    run.all[asked].send_signal(number)
    done = run.end()
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    assert [code for code, _, _ in done] == [75] * 3, done
    (last,) = {out for _, out, _ in done}
    assert last.startswith(f"stopped {name} to process {asked} after ")
    assert {err for _, _, err in done} == {""}


def test_code_asks_with_a_code_of_its_own() -> None:
    for code, out, err in Processes("ask", 2).end():
        assert (code, err) == (7, "")
        assert out.startswith("stopped a full disk to process 1 after ")


def test_a_signal_before_the_first_step_ends_all_at_once() -> None:
    run = Processes("start", 2)
    run.until("met")
    started = time.monotonic()
    run.all[1].send_signal(signal.SIGINT)
    for index, (code, _, err) in enumerate(run.end()):
        assert code == 75
        assert err == (
            f"process {index}: stopped by Ctrl-C to process 1 before the first step: "
            "nothing to save; the same command continues\n"
        )
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("mode", ["start", "steps"])
@pytest.mark.parametrize("victim", [0, 1])
def test_the_others_say_who_is_gone(mode: str, victim: int) -> None:
    run = Processes(mode, 3)
    run.until("met")
    run.all[victim].kill()
    pid = run.all[victim].pid
    done = run.end()
    assert done.pop(victim)[0] == -signal.SIGKILL
    for code, _, err in done:
        assert code == 75
        (line,) = err.splitlines()
        assert f"process {victim}" in line
        assert "gone; the same command continues" in line
        assert victim == 0 or f"pid {pid})" in line


@pytest.mark.parametrize("asked", [0, 1])
def test_a_signal_before_they_have_met_ends_both(asked: int) -> None:
    run = Processes("steps", 2, late=1 - asked)
    while not answers(run.all[asked].pid):
        time.sleep(0.001)
    run.all[asked].send_signal(signal.SIGTERM)
    for index, (code, _, err) in enumerate(run.end()):
        assert code == 75
        assert err.startswith(f"process {index}: stopped by SIGTERM to process {asked} before ")


def test_a_process_is_missed_before_it_waits_for_the_others() -> None:
    run = Processes("slow", 2)
    loading = run.all[1]
    assert loading.stdout is not None
    assert loading.stdout.readline() == "greeted\n"
    time.sleep(0.3)  # it connects in a thread
    started = time.monotonic()
    loading.kill()
    (code, _, err), _ = run.end()
    assert time.monotonic() - started < 10
    (line,) = err.splitlines()
    assert code == 75
    assert line.startswith("process 0: ends: process 1 (")
    assert line.endswith(f", pid {loading.pid}) is gone; the same command continues")


def test_the_command_greets_before_it_loads_what_takes_long() -> None:
    code = "import sys, moe_shard.cli.train; print(*{'jax', 'numpy', 'yaml'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, check=True)
    assert done.stdout == b"\n"


def test_an_error_of_one_ends_all_with_its_code() -> None:
    other, failed = Processes("fail", 2).end()
    assert (failed[0], failed[2]) == (2, "error: it is wrong\nfix: it\n")
    assert other[0] == 2
    (line,) = other[2].splitlines()
    assert line.startswith("process 0: ends: process 1 (")
    assert line.endswith(" failed: it is wrong")


def test_an_error_of_all_is_said_by_all() -> None:
    for code, _, err in Processes("all fail", 2).end():
        assert code == 1
        assert err in {"a finding\n"} or err.endswith("failed: a finding\n")


def test_process_0_says_which_did_not_come() -> None:
    ((code, _, err),) = Processes("steps", 3, only=0, wait=6).end()
    key = "jax_distributed_initialization_timeout"
    assert code == 75
    assert err.splitlines() == [
        f"waiting for process 1, 2 of 3; gives up after 6 s ({key})",
        f"process 0: ends: process 1, 2 of 3 did not come within 6 s ({key}); "
        "the same command continues",
    ]


def test_a_coordinator_that_cannot_be_reached_is_said() -> None:
    ((code, _, err),) = Processes("steps", 2, only=1, wait=6).end()
    said, last = err.splitlines()
    assert code == 75
    assert "cannot reach the coordinator, process 0 at 127.0.0.1:" in said
    assert last.startswith("process 1: ends: process 0 could not be reached at 127.0.0.1:")
    assert last.endswith(": Connection refused; the same command continues")


def test_a_second_ctrl_c_ends_at_once() -> None:
    run = Processes("long step", 1)
    run.until("1")
    for _ in range(2):
        run.all[0].send_signal(signal.SIGINT)
        time.sleep(0.2)
    ((code, _, err),) = run.end()
    assert (code, err) == (130, "ended by a second Ctrl-C, nothing saved\n")


def test_jax_may_be_silent_for_longer_than_it_may_take_to_connect() -> None:
    done = subprocess.run([sys.executable, "-c", SILENCE], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "word word\n"), done.stderr


def test_a_request_costs_nothing_until_it_is_made() -> None:
    team = Team(signals=False)
    with team.running(0):
        started = time.perf_counter()
        for step in range(20_000):
            assert not team.reached(step + 1)
        assert (time.perf_counter() - started) / 20_000 < 50e-6  # about 1 us on an idle machine
        team.ask("a reason")
        team.ask("another")
        assert team.reached(20_001)
    assert (team.reason, team.code) == ("a reason", 75)
