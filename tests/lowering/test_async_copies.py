"""What TPU's async collective fusion repeats in the text is one collective, wherever it writes."""

from __future__ import annotations

import re
from pathlib import Path

from moe_shard.lowering.collectives import extract_collectives

TEXT = (Path(__file__).parent / "fixtures" / "tpu_gathered.txt").read_text(encoding="utf-8")


def test_copies_in_another_memory_are_copies() -> None:
    # Newer compilers write the result of the pieces in between into fast memory, S(1), in each of
    # the copies but the first and the last.
    gathers = re.findall(r"(%\S+ = bf16\[[\d,]+\]\{[\d,:T()]+)\} all-gather\(", TEXT)
    assert len(gathers) >= 3
    moved = TEXT
    for gather in gathers[1:-1]:
        moved = moved.replace(f"{gather}}} all-gather(", f"{gather}S(1)}} all-gather(")
    assert moved != TEXT
    counts = [
        [(each.kind, each.count, each.bytes) for each in extract_collectives(text).collectives]
        for text in (TEXT, moved)
    ]
    assert counts[0] == counts[1]
