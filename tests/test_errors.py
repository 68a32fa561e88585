"""Check the error messages that users see."""

from __future__ import annotations

import errno
import os

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
