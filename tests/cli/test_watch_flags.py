"""Check the flags that XLA reads under `moe-shard watch`, whatever a program does to them."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

from tests.cli.watched import (
    GATHERED,
    MESH,
    MOE,
    PLAIN,
    ROOT,
    WRITER,
    started,
    watch,
)


def test_the_flags_and_folder_of_a_person_are_kept(tmp_path: Path) -> None:
    theirs, temporary = tmp_path / "theirs", tmp_path / "temporary"
    theirs.mkdir()
    temporary.mkdir()
    old = theirs / "module_0000.jit_old.cpu_after_optimizations.txt"
    old.write_text(GATHERED.read_text())
    os.utime(old, (1, 1))
    code = WRITER + f"compiled({str(MOE)!r}); say(os.environ['XLA_FLAGS'])"
    own = f"--xla_a=1 --xla_dump_to={theirs}"
    _, out, err = watch(temporary, *MESH, "--", *PLAIN, code, XLA_FLAGS=own)
    assert out == f"{own} --xla_dump_hlo_as_text\n"
    assert "watch: 1 program shown\n" in err
    assert len(list(theirs.iterdir())) == 2
    flags = tmp_path / "flags"
    flags.write_text("--xla_a=1\n--xla_b=2\n")
    _, out, _ = watch(temporary, "--", *PLAIN, code, XLA_FLAGS=str(flags))
    assert out.startswith("--xla_a=1 --xla_b=2 --xla_dump_to=")


SHOW_C = (
    "import ctypes, os, sys\nget = ctypes.CDLL(None).getenv; get.restype = ctypes.c_char_p\n"
    "def show(): print(os.environ.get('XLA_FLAGS'), '|', get(b'XLA_FLAGS').decode(), flush=True)\n"
)


def test_a_program_that_assigns_the_flags_is_still_seen(tmp_path: Path) -> None:
    code = SHOW_C + (
        "show()\nos.environ['XLA_FLAGS'] = '--xla_a=1'\nshow()\n"
        "del os.environ['XLA_FLAGS']\nshow()\n"
        "os.environ['XLA_FLAGS'] = '--xla_dump_to=here'\nshow()\nos.environ.clear()\nshow()\n"
        "if os.fork() == 0:\n    show()\n    os._exit(0)\nos.wait()\nprint(sys.path[0])"
    )
    _, out, _ = watch(tmp_path, "--", sys.executable, "-c", code, XLA_FLAGS="--xla_c=3")
    *lines, first_path = (
        re.sub(r"--xla_dump_to=/\S+/(\d+) --xla_dump_hlo_as_text", r"DUMP", line)
        for line in out.splitlines()
    )
    assert lines == [
        "--xla_c=3 | --xla_c=3 DUMP",
        "--xla_a=1 | --xla_a=1 DUMP",
        "None | DUMP",
        "--xla_dump_to=here | --xla_dump_to=here --xla_dump_hlo_as_text",
        "None | DUMP",
        "None | DUMP",
    ]
    assert len(set(re.findall(r"/(\d+) --xla_dump_hlo", out))) == 2, "a fork has its own"
    assert "startup" not in first_path


def test_processes_have_folders_of_their_own(tmp_path: Path) -> None:
    child = SHOW_C + (
        WRITER.replace("os.environ[", "{'XLA_FLAGS': get(b'XLA_FLAGS').decode()}[")
        + "compiled(sys.argv[1])"
    )
    parent = (
        "import subprocess, sys\nstarted = [subprocess.Popen([sys.executable, '-c', sys.argv[1],"
        " path]) for path in sys.argv[2:]]\nsys.exit(sum(each.wait() for each in started))"
    )
    command = (sys.executable, "-c", parent, child, str(MOE), str(GATHERED), str(MOE))
    found, _, err = watch(tmp_path, *MESH, "--", *command)
    assert found == 0
    assert "verdict: expert-parallel" in err
    assert "verdict: weight-gathered" in err
    assert "watch: 2 programs shown; 1 had the text of an earlier one" in err


def test_another_sitecustomize_still_runs(tmp_path: Path) -> None:
    own, temporary = tmp_path / "own", tmp_path / "temporary"
    own.mkdir()
    temporary.mkdir()
    (own / "sitecustomize.py").write_text("import builtins; builtins.there = 'theirs'\n")
    path = os.pathsep.join([str(own), str(ROOT)])
    code = "import sitecustomize; print(there, sitecustomize.__file__)"
    with started(temporary, "--", sys.executable, "-c", code, PYTHONPATH=path) as process:
        out, _ = process.communicate(timeout=60)
    assert out == f"theirs {own / 'sitecustomize.py'}\n"


def test_dumps_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    for flags in ("--xla_dump_to=-", "--xla_dump_to=gs://bucket/dump"):
        found, out, err = watch(tmp_path, "--", "ls", XLA_FLAGS=flags)
        assert (found, out) == (2, "")
        assert "fix: --xla_dump_to=FOLDER" in err
    gone = tempfile.mkdtemp()
    os.rmdir(gone)
    with started(tmp_path, "--", "ls", TMPDIR=gone) as process:
        process.communicate(timeout=60)
    assert process.returncode == 0, "Python then takes another folder"
