"""Which collectives a compiled program runs, over which mesh axis, and how many bytes each moves.

    python tools/hlo_report.py step.txt --mesh data=1,fsdp=1,expert=8 --expect expert-parallel

PATH is an HLO text file, "-" for standard input, a folder written by XLA's --xla_dump_to, or the
folder of a run (whose lowering.json gives the mesh). Exit code 1 when --expect does not hold.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from moe_shard.errors import EXIT_DONE, EXIT_FINDING, UserError, run_command
from moe_shard.lowering.expect import VERDICTS
from moe_shard.lowering.report import report_from_text

_HLO_SUFFIX = "after_optimizations.txt"


def main() -> int:
    """Read the module, print the report, compare the verdict."""
    arguments = _arguments()
    path = None if arguments.path == "-" else _module_file(Path(arguments.path))
    text = _read(path)
    mesh = _mesh(arguments.mesh) if arguments.mesh else _recorded_mesh(path)
    if arguments.expect and mesh is None:
        raise UserError("--expect needs the mesh: add --mesh data=1,fsdp=1,expert=8 (your sizes)")
    expert_axes = _expert_axes(arguments.expert_axes, mesh or {})
    report = report_from_text(text, mesh=mesh, expert_axes=expert_axes)
    if arguments.json:
        print(json.dumps(report.to_json(), indent=2))
        for warning in report.warnings:
            print(f"warning: {warning}", file=sys.stderr)
    else:
        # A pipe has no width: 80 columns would fold the table.
        report.render_table(Console(width=None if sys.stdout.isatty() else 120))
    if arguments.expect and report.verdict != arguments.expect:
        print(f"expected {arguments.expect}, found {report.verdict}", file=sys.stderr)
        return EXIT_FINDING
    return EXIT_DONE


class _Parser(argparse.ArgumentParser):
    """Answers bad usage with one line instead of the whole usage text."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing."""
        raise UserError(f"{message}; try --help")


def _arguments() -> argparse.Namespace:
    parser = _Parser(prog="hlo_report.py", description="The collectives of a compiled program.")
    parser.add_argument("path", metavar="PATH", help="HLO text, dump folder, run folder, or -")
    parser.add_argument("--mesh", help="axis=size,... in device order, e.g. data=1,fsdp=1,expert=8")
    parser.add_argument("--expert-axes", help="mesh axes of the experts (default: expert)")
    parser.add_argument("--expect", choices=VERDICTS, help="exit with 1 on any other verdict")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


def _expert_axes(text: str | None, mesh: dict[str, int]) -> list[str]:
    if text is None:
        return ["expert"]
    axes = [axis.strip() for axis in text.split(",")]
    unknown = [axis for axis in axes if mesh and axis not in mesh]
    if unknown:
        raise UserError(
            f"--expert-axes: the mesh has no axis {', '.join(unknown)}; it has {', '.join(mesh)}"
        )
    return axes


def _mesh(text: str) -> dict[str, int]:
    mesh: dict[str, int] = {}
    for item in text.split(","):
        axis, _, size = (part.strip() for part in item.partition("="))
        if not axis or axis in mesh or not size.isdecimal() or int(size) < 1:
            raise UserError(f"--mesh: cannot read {item!r}; write it as data=1,fsdp=1,expert=8")
        mesh[axis] = int(size)
    return mesh


def _recorded_mesh(path: Path | None) -> dict[str, int] | None:
    """The mesh of the run that wrote the module, from its lowering.json."""
    if path is None:
        return None
    folders = [path.parent, *([path.parent.parent] if path.parent.name == "hlo" else [])]
    for folder in folders:
        record = folder / "lowering.json"
        if record.is_file():
            try:
                mesh = json.loads(record.read_text(encoding="utf-8"))["mesh"]
                return {str(axis): int(size) for axis, size in mesh.items()}
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{record} holds no mesh: give --mesh") from error
    return None


def _module_file(path: Path) -> Path:
    """The file itself, or the module of the step in a folder: the largest one."""
    if not path.is_dir():
        return path
    folder = path / "hlo" if (path / "hlo").is_dir() else path
    found = sorted(folder.glob(f"*{_HLO_SUFFIX}"), key=lambda file: file.stat().st_size)
    if not found:
        raise UserError(
            f"{folder} holds no HLO (*{_HLO_SUFFIX}): dump it with dump_hlo=true, or with"
            " XLA_FLAGS=--xla_dump_to=DIR"
        )
    chosen = found[-1]
    print(f"reading {chosen.name}, the largest of {len(found)} modules", file=sys.stderr)
    return chosen


def _read(path: Path | None) -> str:
    name = "standard input" if path is None else str(path)
    try:
        data = sys.stdin.buffer.read() if path is None else path.read_bytes()
        return data.decode("utf-8")
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is no HLO text: it is not UTF-8") from error


if __name__ == "__main__":
    run_command(main)
