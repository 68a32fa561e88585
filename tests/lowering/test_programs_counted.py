"""What programs/expected.yml says of other people's programs is what XLA's own parser finds there.

Nothing of moe_shard is used here: this judges the expectations, which judge moe_shard.
"""

from __future__ import annotations

import gzip
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.lowering.foreign.counted import Counted, collectives_over

FOLDER = Path(__file__).parent / "programs"
EXPECTED: dict[str, dict[str, Any]] = yaml.safe_load((FOLDER / "expected.yml").read_text())
OF_EMBEDDINGS = re.compile("/(gather|scatter-add|while)$")
WHOLE_NUMBERS = re.compile(r"(s|u)\d|pred")


def collectives(name: str) -> list[Counted]:
    entry = EXPECTED[name]
    text = gzip.decompress((FOLDER / f"{name}.txt.gz").read_bytes()).decode()
    options = entry["options"]
    layers = options.get("styles") or options.get("how") or options.get("exchanges") or (True, True)
    loops = len(layers) if options.get("scan") else options.get("microbatches", 1)
    return list(collectives_over(text, entry["mesh"], entry["expert_axis"], loops))


def carries_rows(name: str, each: Counted) -> bool:
    """Whether an all-to-all is of experts' rows: no ids, no weights, no embedding's, no head's."""
    return (
        each.kind in ("all-to-all", "ragged-all-to-all")
        and EXPECTED[name]["program"] != "dense"
        and not WHOLE_NUMBERS.match(each.shape)
        and not OF_EMBEDDINGS.search(each.op_name)
        and bool(each.computed)
    )


@pytest.mark.parametrize("name", EXPECTED)
def test_counted(name: str) -> None:
    entry = EXPECTED[name]
    found = collectives(name)
    exchanges = sum(each.times for each in found if carries_rows(name, each))
    fetched = {path for each in found if "to-all" not in each.kind for path in each.parameters}
    gathered = fetched & set(entry["experts"])
    assert (exchanges, gathered) == (entry["exchanges"], set(entry["gathered"]))
    assert set(entry["reduced"]) <= set(entry["experts"])


@pytest.mark.parametrize("name", EXPECTED)
def test_verdict_follows_from_what_was_counted(name: str) -> None:
    entry = EXPECTED[name]
    moves = bool(entry["exchanges"]), bool(entry["gathered"])
    verdicts = {
        (True, False): {"expert-parallel"},
        (False, True): {"weight-gathered"},
        (True, True): {"mixed"},
        (False, False): {"no-expert-parallelism", "unknown"},
    }
    assert entry["verdict"] in verdicts[moves]
