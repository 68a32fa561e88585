"""List the commands that are installed with the package: one file a command, found by its name.

    moe-shard COMMAND ...        python -m moe_shard COMMAND ...

Each file has `main(argv, prog)`, which returns the exit code, and which handles `--help` and bad
usage before it loads what its command needs. The files of `tools/` in a checkout call the same
functions.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from moe_shard import __version__
from moe_shard.errors import EXIT_DONE, UserError, run_command
from moe_shard.runtime.signals import finished

PROG = "moe-shard"

COMMANDS = {
    "train": "train a model; before step 0, show what its step lowers to",
    "status": "show how a run is doing: its curves, its pace, where the time went",
    "supervise": "run a training again while it stops early and makes progress",
    "watch": "run any JAX program, and show what its steps lower to",
    "report": "show the collectives of a compiled program, and its verdict",
    "diff": "report what changed between two lowerings",
    "explain": "explain where every array of a model is on the mesh, and why",
    "compile": "compile the training step for hardware that is not there",
    "detect": "show what a Hugging Face model directory holds",
    "import": "import a Hugging Face model directory",
    "export": "write the Hugging Face directory of an imported model or a run",
    "generate": "continue prompts with a model",
    "profile": "show where the time of profiled steps went, by stage",
    "bench": "time one MoE layer, every dispatch strategy",
}
"""Every command, with a line on what it does, in the order in which a newcomer needs them."""


def main(argv: Sequence[str]) -> int:
    """Run one command.

    Args:
        argv: the command's name and its arguments, or an option of the dispatcher.

    Returns:
        The command's exit code.

    Raises:
        UserError: there is no such command, or the command raises it.
        Finding: as the command raises it.
    """
    name, *rest = argv or ["--help"]
    if name in ("--help", "-h", "help"):
        print(_help())
        return EXIT_DONE
    if name == "--version":
        print(f"{PROG} {__version__}")
        return EXIT_DONE
    if name not in COMMANDS:
        raise UserError(_unknown(name))
    return command(name)(rest)


def command(name: str) -> Callable[[Sequence[str]], int]:
    """Load the `main` of a command, and nothing of the other commands.

    Args:
        name: one of `COMMANDS`.
    """
    # A Python module cannot be called `import`.
    module = import_module(f"{__name__}.{'import_' if name == 'import' else name}")
    found: Callable[[Sequence[str]], int] = module.main
    return found


def entry() -> None:
    """Run the command line of this process, and leave with its exit code."""
    run_command(lambda: finished(main(sys.argv[1:])))


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"usage: {PROG} COMMAND ...", "", "commands:"]
    lines += [f"  {name:{width}}  {line}" for name, line in COMMANDS.items()]
    lines += ["", f"{PROG} COMMAND --help explains it; {PROG} --version prints the version."]
    return "\n".join(lines)


def _unknown(name: str) -> str:
    what = f"{PROG} has no {'option' if name.startswith('-') else 'command'} {name!r}"
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    fix = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
    return f"{what}\nfix: {fix}"
