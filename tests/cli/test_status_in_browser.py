"""The page of a run in a real browser: within its window, labels whole, silent, without a network.

Run by `make test-browser`, which brings the browser.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_shard.cli import main
from tests.cli.test_status import evaluation_lines, layer_lines, make_run, record
from tests.lowering.test_page_in_browser import Quiet, look, served
from tests.lowering.test_page_in_browser import browser as browser

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("width", [1280, 390])
def test_curves_maps_and_tables_fit_the_window(browser: str, tmp_path: Path, width: int) -> None:
    records = [record(step, learning_rate=1.2345e-7 * step) for step in range(500)]
    files = {"layers.jsonl": layer_lines(200), "eval.jsonl": evaluation_lines(3.0, 2.5)}
    run = make_run(tmp_path / "run", records, **files)
    assert main(["status", str(run), "--html", str(tmp_path / "page.html")]) == 0
    Quiet.asked = []
    with served(tmp_path) as address:
        found = look(browser, (tmp_path, address, Quiet.asked), width)
    assert found["scroll"] <= found["client"], "the page is wider than the window"
    # Three curves, two of evaluations, memory, five maps, three of norms.
    assert len(found["drawn"]) == 3 + 2 + 1 + 5 + 3
    assert min(found["drawn"]) > 200
    assert found["cut"] == []
    assert found["requests"] == []
    assert set(Quiet.asked) - {"/favicon.ico"} == {"/probe.html", "/page.html"}
