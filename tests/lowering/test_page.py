"""The page as text: whole, harmless, and true to the numbers."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from moe_shard.cli.page_file import page_path, write_page
from moe_shard.errors import UserError
from moe_shard.lowering.page import Panel, render_page
from moe_shard.lowering.reports import LoweringReport, report_from_text
from tests.lowering.fixtures_hand_counted import FOLDER, HAND_COUNTED, read

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = "</style></code><script>alert(1)</script><img src=x onerror='alert(2)'>"
VOID = {"meta"}


class Strict(HTMLParser):
    """Every tag closed in order; what was seen."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        assert not any(name.startswith("on") or name in ("src", "href") for name, _ in attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def report(name: str, **memory: int) -> LoweringReport:
    return report_from_text(read(name), mesh=HAND_COUNTED[name][0], memory=memory or None)


@pytest.mark.parametrize("name", sorted(HAND_COUNTED))
def test_a_page_of_every_compiler_is_well_formed_and_needs_nothing(name: str) -> None:
    text = render_page("a & b", [Panel(name, report(name), ["x < y"])])
    page = Strict(text)
    assert not {"script", "link", "img", "iframe", "object", "form"} & set(page.seen)
    assert not re.search(r"url\(|@import|https?:", text)
    assert "default-src 'none'" in text
    for kind, axes, scope, *_ in HAND_COUNTED[name][3]:
        assert kind in page.text
        assert scope in page.text
        assert axes.replace(",", ", ") in page.text


def test_bars_are_as_long_as_their_bytes_on_one_scale() -> None:
    text = render_page("t", [Panel("off", report("cpu_gathered")), Panel("on", report("cpu_moe"))])
    rows = re.findall(r'class="name">(\w+)<.*?class="track">(.*?)</span><span class="size">', text)
    widths = {
        (name, kind): float(width)
        for name, bars in rows
        for kind, width in re.findall(r'class="bar ([\w-]+)" style="width:([\d.]+)%"', bars)
    }
    # Off: 2 gathers of 65,536 B and a reduction of 132,100 B fill the widest bar. On: 2 * 4,096 B.
    whole = 2 * 65_536 + 132_100
    assert widths["experts", "all-gather"] == pytest.approx(100 * 131_072 / whole, abs=1e-3)
    assert widths["experts", "all-reduce"] == pytest.approx(100 * 132_100 / whole, abs=1e-3)
    assert widths["dispatch", "all-to-all"] == pytest.approx(100 * 8192 / whole, abs=1e-3)


def test_memory_is_held_against_what_a_device_has() -> None:
    memory = {
        "argument_bytes": 300,
        "output_bytes": 310,
        "temp_bytes": 200,
        "alias_bytes": 300,
        "total_bytes": 510,
    }
    text = render_page("t", [Panel("on", report("cpu_moe", **memory), hbm_bytes=1000)])
    found = dict(re.findall(r'class="bar (argument|temp|output)" style="width:([\d.]+)%"', text))
    assert found == {"argument": "30.0000", "temp": "20.0000", "output": "1.0000"}
    assert "of 1.0 kB" in text


def test_what_a_program_calls_itself_stays_text() -> None:
    text = read("cpu_moe").replace("jit(", HOSTILE.replace('"', "") + "jit(")
    hostile = report_from_text(text, mesh=HAND_COUNTED["cpu_moe"][0])
    assert any("<script>" in each.op_name for each in hostile.collectives)
    panel = Panel(HOSTILE, hostile, [HOSTILE], refusal=None)
    page = Strict(render_page(HOSTILE, [panel]))
    assert not {"script", "img"} & set(page.seen)
    refused = Strict(render_page("t", [Panel("off", hostile, refusal=HOSTILE)]))
    assert not {"script", "img"} & set(refused.seen)
    assert "alert(1)" in refused.text


def test_a_page_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--html .*\nfix"):
        write_page(tmp_path / "none" / "page.html", "t", [])
    for given in (tmp_path / "none" / "page.html", tmp_path):
        with pytest.raises(UserError, match=r"--html .* cannot be written\nfix"):
            page_path(str(given))
    assert page_path(str(tmp_path / "page.html")) == tmp_path / "page.html"
    assert list(tmp_path.iterdir()) == []


def test_hlo_report_writes_one_program_or_two(tmp_path: Path) -> None:
    tool = [sys.executable, "tools/hlo_report.py", str(FOLDER / "cpu_moe.txt")]
    mesh = ["--mesh", "data=1,fsdp=1,expert=8"]
    page = tmp_path / "page.html"
    beside = ["--beside", str(FOLDER / "cpu_gathered.txt")]
    done = subprocess.run(
        [*tool, *mesh, "--html", str(page), *beside], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    text = page.read_text(encoding="utf-8")
    assert text.index("weight-gathered</p>") < text.index("expert-parallel</p>")
    assert [each.name for each in tmp_path.iterdir()] == ["page.html"]
    alone = subprocess.run([*tool, *mesh, *beside], cwd=ROOT, capture_output=True, text=True)
    assert alone.returncode == 2
    assert "--html" in alone.stderr
