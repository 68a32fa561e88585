"""A large module is read in seconds: 1.5 MB in `make test`, any size by MEGABYTES.

MEGABYTES=50 python -m pytest tests/lowering/test_speed.py
"""

from __future__ import annotations

import os
import resource
import time

from moe_shard.lowering.hlo import parse_module
from moe_shard.lowering.reports import report_from_text
from tests.lowering.fixtures_hand_counted import HAND_COUNTED, read
from tests.lowering.large_modules import repeated

MEGABYTES = float(os.environ.get("MEGABYTES", "1.5"))
SECONDS = max(2.0, 60 / 50 * MEGABYTES)
GIGABYTES = 2.0


def peak() -> int:
    """The most bytes that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_a_large_module_is_read_in_seconds() -> None:
    text = repeated(read("tpu_gathered"), int(MEGABYTES * 1e6))
    mesh = HAND_COUNTED["tpu_gathered"][0]
    held, begin = peak(), time.process_time()  # other tests run at the same time
    report = report_from_text(text, mesh=mesh)
    assert time.process_time() - begin < SECONDS
    assert peak() - held < GIGABYTES * 1e9
    # As often as it was repeated, all of it.
    once = report_from_text(read("tpu_gathered"), mesh=mesh)
    copies, rest = divmod(len(report.collectives), len(once.collectives))
    assert rest == 0
    assert copies * len(read("tpu_gathered")) > 0.9 * MEGABYTES * 1e6
    assert report.totals == {
        kind: {key: copies * value for key, value in sums.items()}
        for kind, sums in once.totals.items()
    }
    assert report.verdict == once.verdict


def test_what_is_read_grows_with_the_text_alone() -> None:
    """Four times the text takes four times as long: in the square it would be sixteen."""
    spent = []
    for size in (400_000, 1_600_000):
        text = repeated(read("cpu_moe"), size)
        begin = time.process_time()
        parse_module(text)
        report_from_text(text)
        spent.append(time.process_time() - begin)
    assert spent[1] < 8 * spent[0]
