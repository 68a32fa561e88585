"""Every model on every kind of hardware, flag on and off: what it lowers to, against the goldens.

    python tools/lowering_matrix.py                       compile all cells, show what has changed
    python tools/lowering_matrix.py --refresh             and keep it (make goldens)
    python tools/lowering_matrix.py --markdown            the README's matrix, nothing compiled

Models are compiled two layers deep, one row of 1024 tokens a device: a scanned stack runs the same
collectives at any depth, and sizes grow in proportion. Needs `make targets`. Exit code 1 when a
cell differs from its golden file in tests/goldens/.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from moe_shard.config import list_models
from moe_shard.errors import EXIT_DONE, EXIT_FINDING, CommandParser, UserError, run_command
from moe_shard.lowering.fingerprint import Fingerprint, Golden, read_golden
from moe_shard.training.files import write_text
from moe_shard.units import human_bytes

TARGETS = ("cpu:8", "v5e:2x4", "v5p:2x2x2", "v6e:2x4", "h100:8", "mi355x:8")
FLAG = "moe_dispatch_no_expert_sharding"
KEYS = ("base_num_decoder_layers=2", "per_device_batch_size=1", "max_target_length=1024")
_ROOT = Path(__file__).resolve().parent.parent
GOLDENS = _ROOT / "tests" / "goldens"
_COMPILERS = ("jax", "jaxlib", "libtpu", "jax-cuda12-pjrt", "jax-rocm7-pjrt")


def main() -> int:
    """Compile, compare or keep, print."""
    arguments = _arguments()
    if arguments.markdown:
        print(markdown({model: read_golden(_file(model)) for model in arguments.model}))
        return EXIT_DONE
    goldens = {
        model: None if arguments.refresh else read_golden(_file(model)) for model in arguments.model
    }
    found = _compile_all(arguments.model, arguments.target)
    if arguments.refresh:
        for model, cells in found.items():
            kept = read_golden(_file(model)).cells if _file(model).exists() else {}
            ordered = {
                name: {**kept, **cells}[name] for name in _cells() if name in {**kept, **cells}
            }
            GOLDENS.mkdir(exist_ok=True)
            write_text(_file(model), Golden(_versions(), KEYS, ordered).to_text())
        print(f"kept in {GOLDENS.relative_to(_ROOT)}: look at the git diff before you commit it")
        return EXIT_DONE
    rows = [
        row
        for model, golden in goldens.items()
        if golden
        for row in _changes(model, golden, found[model])
    ]
    if arguments.json:
        fields = ("model", "cell", "where", "change")
        print(
            json.dumps(
                {"differences": [dict(zip(fields, row, strict=True)) for row in rows]}, indent=1
            )
        )
    else:
        _print(rows, sum(map(len, found.values())))
    for golden in goldens.values():
        if golden and golden.made_with != _versions():
            print(f"note: the goldens were made with {golden.made_with}", file=sys.stderr)
            break
    return EXIT_FINDING if rows else EXIT_DONE


def _cells() -> Iterator[str]:
    return (f"{target} {flag}" for target in TARGETS for flag in ("on", "off"))


def _file(model: str) -> Path:
    return GOLDENS / f"{model}.json"


def _versions() -> dict[str, str]:
    versions = {}
    for package in _COMPILERS:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _compile_all(
    models: Sequence[str], targets: Sequence[str]
) -> dict[str, dict[str, Fingerprint]]:
    """Every cell in a process of its own, two at a time, with the time left."""
    todo = [(m, t, flag) for m in models for t in targets for flag in ("on", "off")]
    found: dict[str, dict[str, Fingerprint]] = {model: {} for model in models}
    started = time.monotonic()
    with ThreadPoolExecutor(max_workers=min(2, os.cpu_count() or 1)) as pool:
        running = {pool.submit(_compile, *cell): cell for cell in todo}
        try:
            for done, each in enumerate(as_completed(running), 1):
                model, target, flag = running[each]
                found[model][f"{target} {flag}"] = each.result()
                left = (time.monotonic() - started) / done * (len(todo) - done)
                print(
                    f"{done}/{len(todo)} {model} {target} {flag}, {left:.0f} s left",
                    file=sys.stderr,
                )
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return found


def _compile(model: str, target: str, flag: str) -> Fingerprint:
    command = [sys.executable, str(_ROOT / "tools" / "compile_for.py"), model, target, *KEYS]
    command += [f"{FLAG}={'true' if flag == 'on' else 'false'}", "--json"]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != EXIT_DONE:
        said = (done.stderr.strip().splitlines() or ["nothing said"])[-3:]
        raise UserError(f"{model} on {target}, flag {flag}: {' '.join(said)[:300]}")
    return Fingerprint.of(json.loads(done.stdout))


def _changes(
    model: str, golden: Golden, found: dict[str, Fingerprint]
) -> Iterator[tuple[str, str, str, str]]:
    for cell, now in found.items():
        if cell not in golden.cells:
            yield model, cell, "cell", "is not in the golden file"
            continue
        for where, change in golden.cells[cell].differences(now):
            yield model, cell, where, change


def _print(rows: list[tuple[str, str, str, str]], cells: int) -> None:
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    if not rows:
        console.print(f"{cells} cells, all as in {GOLDENS.relative_to(_ROOT)}")
        return
    table = Table(title="golden -> now", box=box.SIMPLE_HEAD)
    for name in ("model", "cell", "where", "change"):
        table.add_column(name, no_wrap=name != "change")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print("if this is meant: make goldens, and commit the difference with the reason")


def markdown(goldens: dict[str, Golden]) -> str:
    """The matrix as the README shows it: verdict and bytes of all collectives, on / off."""
    lines = ["| model | flag | " + " | ".join(TARGETS) + " |", "|---|---|" + "---|" * len(TARGETS)]
    for model, golden in goldens.items():
        for flag in ("on", "off"):
            cells = []
            for target in TARGETS:
                each = golden.cells[f"{target} {flag}"]
                exchanged = sum(s.count for key, s in each.sums.items() if "all-to-all" in key[2])
                moved = human_bytes(sum(s.bytes for s in each.sums.values()))
                cells.append(f"{each.verdict}, {exchanged} a2a, {moved}")
            lines.append(f"| {model} | {flag} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = CommandParser(
        prog="lowering_matrix.py", description="What every model lowers to on every target."
    )
    parser.add_argument("--model", nargs="+", choices=list_models(), default=list_models())
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--refresh", action="store_true", help="write the golden files")
    parser.add_argument("--markdown", action="store_true", help="print the README's matrix")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
