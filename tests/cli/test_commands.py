"""Check the installed commands: found by name, quick to start, and easy to paste."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import moe_shard
from moe_shard.cli import COMMANDS, command, main
from moe_shard.errors import UserError

ROOT = Path(__file__).parents[2]
TOOLS = {
    "hlo_report.py": "report",
    "hlo_diff.py": "diff",
    "explain_sharding.py": "explain",
    "compile_for.py": "compile",
    "import_hf.py": "import",
    "export_hf.py": "export",
    "bench_moe.py": "bench",
}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error", "COLUMNS": "200"},
        check=False,
        timeout=60,
    )


def test_help_lists_every_command_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    told = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == told
    listed = re.findall(r"^  (\S+)  +\S.*$", told, re.M)
    assert listed == list(COMMANDS)
    files = (ROOT / "moe_shard" / "cli").glob("[a-z]*.py")
    with_main = {path.stem.rstrip("_") for path in files if "\ndef main(" in path.read_text()}
    assert with_main == set(COMMANDS)
    assert max(map(len, told.splitlines())) <= 80


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_comes_without_jax(name: str) -> None:
    code = (
        "import sys\nfrom moe_shard.cli import main\n"
        f"try:\n    main([{name!r}, '--help'])\nexcept SystemExit as end:\n    code = end.code\n"
        "sys.exit(code or int('jax' in sys.modules))"
    )
    done = run("-c", code)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: moe-shard {name} ")


HEAVY = ("jax", "jaxlib", "flax", "numpy", "yaml", "rich", "moe_shard.lowering.collectives")


@pytest.mark.parametrize("name", ["report", "watch", "diff"])
def test_help_of_a_reader_loads_next_to_nothing(name: str) -> None:
    """Check the loaded modules rather than the time, a quarter of a second, mostly Python's."""
    code = (
        "import sys\nfrom moe_shard.cli import main\n"
        f"try:\n    main([{name!r}, '--help'])\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    assert run("-c", code).stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(("name", "times"), [("report", 1), ("diff", 2)])
def test_a_program_is_read_without_jax(name: str, times: int) -> None:
    file = str(ROOT / "tests" / "lowering" / "fixtures" / "cpu_moe.txt")
    code = (
        "import sys\nfrom moe_shard.cli import main\n"
        f"code = main({[name, *[file] * times]!r})\n"
        "print(code, [name for name in ('jax', 'jaxlib', 'numpy') if name in sys.modules])"
    )
    assert run("-c", code).stdout.splitlines()[-1] == "0 []"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("trian", "did you mean train?"),
        ("reports", "did you mean report?"),
        ("zzz", "there are train, "),
        ("--verbose", "there are train, "),
    ],
)
def test_an_unknown_command_is_two_lines(given: str, told: str) -> None:
    with pytest.raises(UserError) as raised:
        main([given])
    what, fix = str(raised.value).splitlines()
    assert repr(given) in what
    assert told in fix


def test_the_module_is_the_command() -> None:
    done = run("-m", "moe_shard", "--version")
    assert (done.returncode, done.stdout) == (0, f"moe-shard {moe_shard.__version__}\n")
    done = run("-m", "moe_shard", "report", "no/such/file")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: cannot read no/such/file: No such file or directory\n"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"moe-shard": "moe_shard.cli:entry"}
    assert project["version"] == moe_shard.__version__


def test_the_files_of_tools_are_thin() -> None:
    for file, name in TOOLS.items():
        lines = (ROOT / "tools" / file).read_text().splitlines()
        assert f"from {command(name).__module__} import main" in lines
        assert len(lines) <= 9


@pytest.mark.parametrize("start", [("tools/hlo_report.py",), ("-m", "moe_shard.train")])
def test_help_names_the_command_as_it_was_started(start: tuple[str, ...]) -> None:
    done = run(*(str(ROOT / each) if "/" in each else each for each in start), "--help")
    shown = Path(start[-1]).name if "/" in start[-1] else "python -m moe_shard.train"
    assert done.stdout.startswith(f"usage: {shown} ")


def test_no_message_names_a_file_that_only_a_checkout_has() -> None:
    for path in (ROOT / "moe_shard").rglob("*.py"):
        assert not re.search(r"tools/\w+\.py", path.read_text()), path
