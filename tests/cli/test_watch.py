"""Check that under `moe-shard watch` a command runs as it would alone."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from tests.cli.watched import (
    MOE,
    PLAIN,
    ROOT,
    WATCH,
    WRITER,
    environment,
    started,
    watch,
)


def test_a_command_that_compiles_nothing_is_left_alone(tmp_path: Path) -> None:
    code = "import sys; print(input()[::-1]); print('oh', file=sys.stderr); sys.exit(7)"
    alone = subprocess.run([*PLAIN, code], input="abc\n", capture_output=True, text=True)
    found, out, err = watch(tmp_path, "--", *PLAIN, code, stdin="abc\n")
    assert (found, out) == (alone.returncode, alone.stdout) == (7, "cba\n")
    said = [line for line in err.splitlines() if not line.startswith("watch: ")]
    assert said == alone.stderr.splitlines() == ["oh"]
    assert "watch: no compiled program was seen" in err


def test_arguments_descriptors_and_dispositions_are_passed_on(tmp_path: Path) -> None:
    code = 'printf "%s;" "$@"; cat /dev/fd/$1; grep -E "Sig(Blk|Ign)" /proc/self/status'

    ignoring = ("sh", "-c", 'trap "" HUP; exec "$@"', "sh")

    def outcome(*before: str) -> list[int]:
        with tempfile.TemporaryFile() as file:
            file.write(b"through")
            file.seek(0)
            number = str(file.fileno())
            done = subprocess.run(
                [*ignoring, *before, "sh", "-c", code, "sh", number, "--", "a b", ""],
                pass_fds=[file.fileno()],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=environment(tmp_path),
            )
        head, *masks = re.split(r"Sig(?:Blk|Ign):\s+", done.stdout)
        assert head == f"{number};--;a b;;through"
        # Above 31 there are signals that libc reserves.
        return [int(mask, 16) & 0x7FFFFFFF for mask in masks]

    alone = outcome()
    # In the background of a shell, the suite itself ignores more.
    assert alone[1] & 1 << signal.SIGHUP - 1
    assert outcome(*WATCH, "--") == alone


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_reaches_the_command_once(tmp_path: Path, number: signal.Signals) -> None:
    code = WRITER + (
        f"signal.pthread_sigmask(signal.SIG_BLOCK, [{int(number)}])\n"
        f"def take(seconds): return bool(signal.sigtimedwait([{int(number)}], seconds))\n"
        "say('ready'); say(take(20) + take(.3)); sys.exit(75)"
    )
    with started(tmp_path, "--", *PLAIN, code) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        out, _ = process.communicate(timeout=60)
        assert (process.returncode, out) == (75, "1\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV])
def test_it_ends_by_the_signal_that_ends_the_command(
    tmp_path: Path, number: signal.Signals
) -> None:
    code = f"import os; os.kill(os.getpid(), {int(number)})"
    assert watch(tmp_path, "--", *PLAIN, code)[0] == -number


def test_ctrl_c_at_a_terminal_reaches_the_command_once(tmp_path: Path) -> None:
    code = WRITER + (
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])\n"
        "def take(seconds): return bool(signal.sigtimedwait([signal.SIGINT], seconds))\n"
        "say('ready ' + str(os.isatty(0)))\n"
        "say(f'first {take(20)}'); say(f'second {take(1)}'); sys.exit(3)"
    )
    # As a terminal's shell does: start a session, and make the terminal its own.
    at_terminal = (
        "import fcntl, os, sys, termios\nos.setsid()\nfcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*PLAIN, at_terminal, *WATCH, "--", *PLAIN, code],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment(tmp_path),
    )
    os.close(theirs)
    try:
        assert "ready True" in read_terminal(ours, "ready")
        # If watch passed its own signal on late, the command would see it as a second one.
        process.send_signal(signal.SIGSTOP)
        os.write(ours, b"\x03")
        assert "first True" in read_terminal(ours, "first ")
        process.send_signal(signal.SIGCONT)
        assert "second False" in read_terminal(ours, "second ")
        assert process.wait(timeout=30) == 3
    finally:
        process.kill()
        os.close(ours)
        process.wait()
    assert list(tmp_path.iterdir()) == []


def read_terminal(terminal: int, wanted: str) -> str:
    found, until = "", time.monotonic() + 30
    while not re.search(wanted + r".*\n", found):
        assert select.select([terminal], [], [], max(0.0, until - time.monotonic()))[0], found
        found += os.read(terminal, 4096).decode()
    return found


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_closed_descriptors_stay_closed(tmp_path: Path, closed: str) -> None:
    code = "cat; echo one; echo two >&2; exit 5"
    script = f'"$@" {closed}'
    results = []
    for before in ((), (*WATCH, "--")):
        done = subprocess.run(
            ["sh", "-c", script, "sh", *before, "sh", "-c", code],
            input="in\n",
            capture_output=True,
            text=True,
            env=environment(tmp_path),
        )
        err = [line for line in done.stderr.splitlines() if not line.startswith("watch: ")]
        results.append((done.returncode, done.stdout, err))
    assert results[0] == results[1]
    assert results[0][0] == 5


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("--", "no-such-command-anywhere"), 127, "error: no-such-command-anywhere: No such file"),
        (("--", str(ROOT / "README.md")), 126, "README.md: Permission denied"),
        ((), 2, "error: no COMMAND"),
        (("--",), 2, "error: no COMMAND"),
        (("python", "x.py"), 2, "error: COMMAND goes after --: moe-shard watch -- python x.py"),
        (("--expect", "fast", "--", "ls"), 2, "invalid choice: 'fast'"),
        (("--stop", "--", "ls"), 2, "--stop needs --expect"),
        (("--mesh", "a", "--", "ls"), 2, "--mesh: cannot read 'a'"),
        (("--mesh", "ep=8", "--expert-axes", "expert", "--", "ls"), 2, "no axis expert; it has ep"),
        (("--stages", "gate", "--", "ls"), 2, "--stages: cannot read 'gate'"),
        (("extra", "--", "ls"), 2, "unrecognized arguments: extra"),
    ],
)
def test_what_cannot_be_started(
    tmp_path: Path, arguments: tuple[str, ...], code: int, told: str
) -> None:
    found, out, err = watch(tmp_path, *arguments)
    assert (found, out) == (code, "")
    assert told in err
    assert len(err.splitlines()) <= 3


def test_a_reader_that_has_left_does_not_end_it(tmp_path: Path) -> None:
    code = WRITER + f"compiled({str(MOE)!r}); time.sleep(.3); open(sys.argv[1], 'w'); sys.exit(9)"
    mark = tmp_path / "mark"
    folder = tmp_path / "temporary"
    folder.mkdir()
    process = subprocess.Popen(
        [*WATCH, "--", *PLAIN, code, str(mark)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment(folder),
    )
    assert process.stderr is not None
    process.stderr.close()
    assert process.wait(timeout=60) == 9
    assert mark.exists()
    assert list(folder.iterdir()) == []
