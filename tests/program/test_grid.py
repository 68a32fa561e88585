"""Compare a step of two processes with NumPy's; `python -m tests.program.grid` does all cases."""

from __future__ import annotations

from tests.program.grid import LIMIT, in_two_processes


def test_two_processes_and_microbatches_compute_the_gradient_of_numpy() -> None:
    for found in in_two_processes([(8, 2)]):
        for errors in found:
            assert max(errors.values()) <= LIMIT, found
