"""Check the error messages that users see."""

from __future__ import annotations

import pytest

from moe_shard.errors import first_line


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
