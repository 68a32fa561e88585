"""Check the error messages that users see."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_shard.errors import first_line, run_command


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("what\nwhere"), "what"),
        (ValueError(), "ValueError"),  # an empty message has no first line
        (KeyError("x" * 200), "'" + "x" * 159),
    ],
)
def test_the_first_line_of_an_exception(error: Exception, said: str) -> None:
    assert first_line(error) == said


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ENAMETOOLONG, errno.EACCES])
def test_what_the_system_refuses_is_two_lines(
    number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> int:
        raise OSError(number, os.strerror(number), "x" * 300)

    with pytest.raises(SystemExit) as ended:
        run_command(main)
    assert ended.value.code == 2
    what, fix = capsys.readouterr().err.splitlines()
    assert os.strerror(number) in what
    assert fix.startswith("fix: ")


def test_an_error_of_a_library_keeps_its_traceback() -> None:
    def main() -> int:
        raise OSError("not of the system")

    with pytest.raises(OSError, match="not of the system"):
        run_command(main)


PRINTS = "from moe_shard.errors import run_command; run_command(lambda: print('\u2581' * 9) or 0)"
FAILS = """
from moe_shard.errors import UserError, run_command

def main():
    raise UserError("what")

run_command(main)
"""
OPENS = """
import os
from moe_shard.errors import run_command

def main():
    file = os.open("file", os.O_WRONLY | os.O_CREAT)
    os.write(2, b"written to descriptor 2")
    print("to standard output")
    return 0

run_command(main)
"""


@pytest.mark.parametrize(
    ("code", "where", "expected"),
    [
        (PRINTS, ">&-", 0),
        (PRINTS, "2>&-", 0),
        (PRINTS, "| true", 0),
        (PRINTS, "> /dev/full", 2),
        (PRINTS, "> /dev/full 2> /dev/full", 2),
        (FAILS, "2>&-", 2),
        (FAILS, "2> /dev/full", 2),
        (FAILS, "<&- >&- 2>&-", 2),
    ],
)
def test_output_that_takes_nothing(code: str, where: str, expected: int) -> None:
    shell = f'"$@" {where}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", shell, "bash", sys.executable, "-c", code],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == expected
    assert len(done.stderr.splitlines()) <= 3
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_a_file_never_gets_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    shell = '"$@" <&- >&- 2>&-'
    command = ["bash", "-c", shell, "bash", sys.executable, "-c", OPENS]
    assert subprocess.run(command, cwd=tmp_path).returncode == 0
    assert (tmp_path / "file").read_bytes() == b""
