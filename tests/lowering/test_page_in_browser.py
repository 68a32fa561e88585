"""The lowering page in a real browser: laid out, readable, silent, and without a network.

Run by `make test-browser`, which brings the browser.
"""

from __future__ import annotations

import functools
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.lowering.fixtures_hand_counted import FOLDER, HAND_COUNTED

ROOT = Path(__file__).resolve().parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")
pytestmark = pytest.mark.browser

# Goes to the page in a frame, so that the page's own policy stays as it is, and writes what the
# browser made of it where --dump-dom shows it.
PROBE = """<!doctype html><meta charset="utf-8">
<iframe id="page" src="page.html" style="border:0;width:{width}px;height:900px"></iframe>
<pre id="found"></pre>
<script>
document.getElementById("page").onload = (event) => {{
  const page = event.target.contentDocument, view = event.target.contentWindow;
  const box = (each) => each.getBoundingClientRect();
  const found = {{
    scroll: page.documentElement.scrollWidth, client: page.documentElement.clientWidth,
    cut: [...page.querySelectorAll("svg text")].filter((text) => {{
      const inner = box(text), outer = box(text.closest("svg"));
      return inner.left < outer.left - 1 || inner.right > outer.right + 1;
    }}).map((text) => text.textContent),
    drawn: [...page.querySelectorAll("svg")].map((each) => box(each).width),
    requests: view.performance.getEntriesByType("resource").map((each) => each.name),
    panels: [...page.querySelectorAll(".panel")].map((panel) => ({{
      left: box(panel).left, top: box(panel).top,
      heading: panel.querySelector("h2").textContent,
      verdict: panel.querySelector(".verdict").textContent,
      colour: view.getComputedStyle(panel.querySelector(".verdict")).color,
      rows: [...panel.querySelectorAll(".row")].map((row) => ({{
        name: row.querySelector(".name").firstChild.textContent,
        size: row.querySelector(".size").textContent,
        track: box(row.querySelector(".track")).width,
        bars: [...row.querySelectorAll(".bar")].map((bar) => [
          bar.className.split(" ")[1], box(bar).width, box(bar).height,
          view.getComputedStyle(bar).backgroundColor]),
      }})),
    }})),
  }};
  document.getElementById("found").textContent = JSON.stringify(found);
}};
</script>
"""


@pytest.fixture(scope="session")
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    assert found, "no browser here: make browser, or apt-get install chromium"
    return found


class Quiet(http.server.SimpleHTTPRequestHandler):
    asked: list[str] = []  # noqa: RUF012

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[Path, str, list[str]]]:
    """The page of two programs, flag off and on, on a server of this machine."""
    Quiet.asked = []
    on, off = FOLDER / "cpu_moe.txt", FOLDER / "cpu_gathered.txt"
    command = [sys.executable, "tools/hlo_report.py", str(on), "--beside", str(off)]
    command += ["--mesh", "data=1,fsdp=1,expert=8", "--html", str(tmp_path / "page.html")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with served(tmp_path) as address:
        yield tmp_path, address, Quiet.asked


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder on this machine while the block runs."""
    handler = functools.partial(Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


class Found(HTMLParser):
    """The text of the probe's <pre>."""

    text = ""
    inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = tag == "pre" and ("id", "found") in attrs

    def handle_endtag(self, _tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        self.text += data if self.inside else ""


def look(
    browser: str, site: tuple[Path, str, list[str]], width: int, *flags: str
) -> dict[str, Any]:
    folder, address, _ = site
    (folder / "probe.html").write_text(PROBE.format(width=width), encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=5000", *flags]
    command += [f"--window-size={width + 60},1000", "--dump-dom", f"{address}/probe.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not said, said
    parser = Found()
    parser.feed(done.stdout)
    assert parser.text, done.stdout[:500]
    return json.loads(parser.text)


@pytest.mark.parametrize(("width", "columns"), [(1280, 2), (390, 1)])
def test_the_page_is_laid_out(
    browser: str, site: tuple[Path, str, list[str]], width: int, columns: int
) -> None:
    found = look(browser, site, width)
    assert found["scroll"] <= found["client"], "the page is wider than the window"
    off, on = found["panels"]
    assert (off["verdict"], on["verdict"]) == ("weight-gathered", "expert-parallel")
    assert off["colour"] != on["colour"]
    assert (off["left"] < on["left"]) == (columns == 2)
    assert (off["top"] < on["top"]) == (columns == 1)

    # One scale for both: a pixel is as many bytes everywhere.
    expected = {
        name: {
            kind: sum(
                c * size for k, _, s, _, c, size in HAND_COUNTED[name][3] if (k, s) == (kind, stage)
            )
            for kind, _, stage, _, _, _ in HAND_COUNTED[name][3]
        }
        for name, stage in (("cpu_gathered", "experts"), ("cpu_moe", "dispatch"))
    }
    stages = {"cpu_gathered": (off, "experts"), "cpu_moe": (on, "dispatch")}
    scales = []
    for name, (panel, stage) in stages.items():
        row = next(row for row in panel["rows"] if row["name"] == stage)
        for kind, pixels, height, colour in row["bars"]:
            assert height > 10
            assert colour != "rgba(0, 0, 0, 0)"
            assert pixels <= row["track"] + 1
            scales.append(pixels / expected[name][kind])
    assert max(scales) == pytest.approx(min(scales), rel=0.02)


def test_the_page_asks_for_nothing(browser: str, site: tuple[Path, str, list[str]]) -> None:
    found = look(browser, site, 1280)
    assert found["requests"] == []
    assert set(site[2]) - {"/favicon.ico"} == {"/probe.html", "/page.html"}


def test_dark_screens_get_dark_paper(
    browser: str, site: tuple[Path, str, list[str]], tmp_path: Path
) -> None:
    """A picture, so that colours are those on the screen: its corner is the paper's colour."""
    shots = {}
    for scheme, value in (("light", 1), ("dark", 0)):
        path = tmp_path / f"{scheme}.png"
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={tmp_path / scheme}", "--window-size=1280,900"]
        command += [f"--blink-settings=preferredColorScheme={value}", f"--screenshot={path}"]
        subprocess.run(
            [*command, f"{site[1]}/page.html"], check=True, capture_output=True, timeout=120
        )
        shots[scheme] = path.read_bytes()
        assert shots[scheme].startswith(b"\x89PNG")
        assert len(shots[scheme]) > 10_000
    assert shots["light"] != shots["dark"]


def test_the_policy_forbids_scripts_and_the_network(site: tuple[Path, str, list[str]]) -> None:
    text = (site[0] / "page.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert not re.search(r"<script|<link|<img|<iframe|src=|url\(|@import|https?:", text)
