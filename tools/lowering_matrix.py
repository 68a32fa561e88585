"""Compile every model for every kind of hardware, flag on and off, and compare with the goldens.

    python tools/lowering_matrix.py                       compile all cells, show what has changed
    python tools/lowering_matrix.py --refresh             and keep it (make goldens)
    python tools/lowering_matrix.py --markdown            that of docs/results.md, nothing compiled

Models are compiled two layers deep, one sequence of 1024 tokens per device: a scanned stack runs
the same collectives at any depth, and sizes grow in proportion. Models whose strategy always moves
tokens are not included: the flag changes nothing there. Needs `make targets`. Exit code 1 when a
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
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moe_shard.config import list_models, load_config
from moe_shard.config.strategies import find_strategy
from moe_shard.errors import (
    EXIT_DONE,
    EXIT_FINDING,
    EXIT_USAGE,
    CommandParser,
    Finding,
    UserError,
    run_command,
)
from moe_shard.files import write_text
from moe_shard.lowering.fingerprint import Fingerprint, Golden, read_golden
from moe_shard.units import human_bytes

TARGETS = ("cpu:8", "v5e:2x4", "v5p:2x2x2", "v6e:2x4", "h100:8", "mi355x:8")
FLAG = "moe_dispatch_no_expert_sharding"
FLAGS = {"on": "true", "off": "false"}
KEYS = ("base_num_decoder_layers=2", "per_device_batch_size=1", "max_target_length=1024")
_ROOT = Path(__file__).resolve().parent.parent
GOLDENS = _ROOT / "tests" / "goldens"
_COMPILERS = ("jax", "jaxlib", "libtpu", "jax-cuda12-pjrt", "jax-rocm7-pjrt")
# Settings in these variables would change a golden without being recorded in it.
_SETTINGS = ("JAX_", "XLA_", "LIBTPU_", "TPU_")
_LONGEST = 900  # seconds for a cell; the slowest takes three minutes on a busy machine

Row = tuple[str, str, str, str]
"""Model, cell, where, change."""


def main() -> int:
    """Compile, then compare with the goldens or replace them, and print."""
    arguments = _arguments()
    models, targets = arguments.model, arguments.target
    if arguments.markdown:
        print(markdown({model: read_golden(_file(model)) for model in models}, targets))
        return EXIT_DONE
    if arguments.refresh:
        return _refresh(models, targets)
    goldens = {model: read_golden(_file(model)) for model in models}
    for model, golden in goldens.items():
        _require_same_commands(model, golden.commands)
    found = _compile_all(models, targets)
    rows = [
        row for model, golden in goldens.items() for row in _changes(model, golden, found[model])
    ]
    versions = _other_versions(goldens.values())
    if arguments.json:
        fields = ("model", "cell", "where", "change")
        differences = [dict(zip(fields, row, strict=True)) for row in rows]
        print(json.dumps({"differences": differences, "other_versions": versions}, indent=1))
    else:
        _print(rows, sum(map(len, found.values())))
    if versions:
        changes = ", ".join(f"{name} {was}, now {now}" for name, (was, now) in versions.items())
        print(f"note: other compilers than those of the goldens ({changes})", file=sys.stderr)
    return EXIT_FINDING if rows else EXIT_DONE


def _refresh(models: Sequence[str], targets: Sequence[str]) -> int:
    """Write the golden files; the cells of targets that were not asked for are kept."""
    kept = {}
    if set(targets) != set(TARGETS):
        kept = {model: read_golden(_file(model)) for model in models if _file(model).exists()}
    for model, golden in kept.items():
        _require_same_commands(model, golden.commands)
        if golden.made_with != _versions():
            raise UserError(
                f"the other targets in {_file(model).name} were made with other compilers\n"
                "fix: make goldens, which compiles all of them"
            )
    try:
        GOLDENS.mkdir(exist_ok=True)  # before minutes of compiling
        for model, cells in _compile_all(models, targets).items():
            everything = {**(kept[model].cells if model in kept else {}), **cells}
            ordered = {name: everything[name] for name in _cells() if name in everything}
            commands = {name: " ".join(_command(model, name)) for name in ordered}
            write_text(_file(model), Golden(_versions(), commands, ordered).to_text())
    except OSError as error:
        raise UserError(f"cannot write to {GOLDENS}: {error.strerror}") from error
    print(f"written to {GOLDENS}: read the git diff before you commit it")
    return EXIT_DONE


def _cells(targets: Iterable[str] = TARGETS) -> list[str]:
    return [f"{target} {flag}" for target in targets for flag in FLAGS]


def flag_models() -> list[str]:
    """Return the models in which the flag changes the program."""
    layers = {name: load_config(name).model.moe for name in list_models()}
    return [
        name
        for name, moe in layers.items()
        if moe and not find_strategy(moe.moe_dispatch).always_moves_tokens
    ]


def _file(model: str) -> Path:
    return GOLDENS / f"{model}.json"


def _command(model: str, cell: str) -> list[str]:
    """Return the command that shows the whole report of a cell."""
    target, flag = cell.split(" ")
    return ["python", "tools/compile_for.py", model, target, *KEYS, f"{FLAG}={FLAGS[flag]}"]


def _require_same_commands(model: str, commands: dict[str, str]) -> None:
    for cell, command in commands.items():
        if cell in _cells() and command != " ".join(_command(model, cell)):
            raise UserError(
                f"{_file(model).name}, {cell}: made by another command\nfix: make goldens"
            )


def _versions() -> dict[str, str]:
    versions = {}
    for package in _COMPILERS:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _other_versions(goldens: Iterable[Golden]) -> dict[str, tuple[str, str]]:
    """Return {package: (of the goldens, now)} where they differ."""
    return {
        name: (golden.made_with.get(name, "unknown"), now)
        for golden in goldens
        for name, now in _versions().items()
        if golden.made_with.get(name) != now
    }


def _compile_all(
    models: Sequence[str], targets: Sequence[str]
) -> dict[str, dict[str, Fingerprint]]:
    """Compile every cell in a process of its own, two at a time, and print the time left."""
    todo = [(model, cell) for model in models for cell in _cells(targets)]
    found: dict[str, dict[str, Fingerprint]] = {model: {} for model in models}
    started = time.monotonic()
    with ThreadPoolExecutor(max_workers=min(2, os.cpu_count() or 1)) as pool:
        running = {pool.submit(_compile, *each): each for each in todo}
        try:
            for done, each in enumerate(as_completed(running), 1):
                model, cell = running[each]
                found[model][cell] = each.result()
                spent = time.monotonic() - started
                left = spent / done * (len(todo) - done)
                print(f"{done}/{len(todo)} {model} {cell}, {left:.0f} s left", file=sys.stderr)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    print(f"compiled in {time.monotonic() - started:.0f} s", file=sys.stderr)
    return found


def _compile(model: str, cell: str) -> Fingerprint:
    """Compile one cell and return its fingerprint.

    Raises:
        UserError: the command reports bad input, such as a missing compiler.
        Finding: the command failed in another way.
    """
    _, *rest = _command(model, cell)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(_SETTINGS)}
    for _ in "once", "again":
        try:
            done = subprocess.run(
                [sys.executable, *rest, "--json"],
                capture_output=True,
                text=True,
                cwd=_ROOT,
                env=environment,
                timeout=_LONGEST,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise Finding(f"{model} on {cell}: not compiled in {_LONGEST} s") from error
        if done.returncode >= 0:  # else a signal ended it, which does not depend on the program
            break
    if done.returncode == EXIT_USAGE:
        _, _, message = done.stderr.strip().rpartition("error: ")  # notes may come before it
        raise UserError(f"{model} on {cell}: {message}")
    try:
        # A step that does not fit is a finding (exit code 1), and is compared.
        return Fingerprint.of(json.loads(done.stdout))
    except ValueError as error:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise Finding(
            f"{model} on {cell}: no report, exit code {done.returncode}: {last[:200]}\n"
            f"fix: run {' '.join(_command(model, cell))}"
        ) from error


def _changes(model: str, golden: Golden, found: dict[str, Fingerprint]) -> Iterator[Row]:
    for cell, now in found.items():
        if cell not in golden.cells:
            yield model, cell, "cell", "is not in the golden file"
            continue
        for where, change in golden.cells[cell].differences(now):
            yield model, cell, where, change


def _print(rows: list[Row], cells: int) -> None:
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    if not rows:
        console.print(f"{cells} cells, all as in {GOLDENS}", soft_wrap=True)
        return
    table = Table(title="golden -> now", box=box.SIMPLE_HEAD)
    for name in ("model", "cell", "where", "change"):
        table.add_column(name, no_wrap=name != "change")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)
    console.print("if this is intended: make goldens, and commit the difference with the reason")


def markdown(goldens: dict[str, Golden], targets: Sequence[str] = TARGETS) -> str:
    """Format the matrix for the docs: one line per model and flag, sent bytes by target.

    A cell with another verdict or number of exchanges than its line shows its own.

    Raises:
        UserError: a cell is missing.
    """
    head = ["model", "flag", "verdict", "all-to-alls", *targets]
    lines = [head]
    for model, golden in goldens.items():
        for flag in FLAGS:
            cells = [_cell(model, golden, f"{target} {flag}") for target in targets]
            usual = Counter((each.verdict, each.exchanges) for each in cells).most_common(1)[0][0]
            row = [model, flag, f"`{usual[0]}`", str(usual[1])]
            for each in cells:
                sent = human_bytes(each.total.wire_bytes)
                same = (each.verdict, each.exchanges) == usual
                row.append(sent if same else f"`{each.verdict}`, {each.exchanges}, {sent}")
            lines.append(row)
    first, *rows = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join((first, f"|{'---|' * len(head)}", *rows))


def _cell(model: str, golden: Golden, name: str) -> Fingerprint:
    if name not in golden.cells:
        raise UserError(f"there is no {name} in {_file(model)}\nfix: make goldens")
    return golden.cells[name]


def _arguments() -> argparse.Namespace:
    parser = CommandParser(
        prog="lowering_matrix.py",
        description="Compare what every model lowers to on every target with the goldens.",
    )
    models = flag_models()
    parser.add_argument("--model", nargs="+", choices=models, default=models)
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--refresh", action="store_true", help="write the golden files")
    how.add_argument("--markdown", action="store_true", help="print the matrix of docs/results.md")
    how.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
