"""`moe-shard watch`: a command runs as it would alone, and what it compiles is shown.

Most commands here only write as XLA writes, into the folder that XLA_FLAGS name: a whole text, a
half, the same name twice. Under `-S` Python runs no sitecustomize and sees XLA_FLAGS as C does.
"""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "lowering" / "fixtures"
MOE, GATHERED = FIXTURES / "cpu_moe.txt", FIXTURES / "cpu_gathered.txt"
MESH = ("--mesh", "data=1,fsdp=1,expert=8")
WATCH = (sys.executable, "-m", "moe_shard", "watch")
PLAIN = (sys.executable, "-S", "-c")

# What a command finds: FOLDER, write(name, text), compiled(fixture, name).
WRITER = """
import os, pathlib, re, signal, sys, time
FOLDER = pathlib.Path(re.search("--xla_dump_to=([^ ]*)", os.environ["XLA_FLAGS"])[1])
def write(name, text, mode="w"):
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / name, mode) as file:
        file.write(text)
def compiled(path, name="module_0001.jit_step"):
    write(name + ".cpu_after_optimizations.txt", open(path).read())
def say(text):
    print(text, flush=True)
"""
ONE_DEVICE = """HloModule jit_add

ENTRY %main (p: f32[2]) -> f32[2] {
  ROOT %p = f32[2]{0} parameter(0)
}
"""


def environment(folder: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("XLA_")}
    return {**kept, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder), **more}


@contextmanager
def started(folder: Path, *arguments: str, **more: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*WATCH, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(folder, **more),
    )
    # What does not come is a failure, not a wait without end.
    too_long = threading.Timer(60, process.kill)
    too_long.start()
    try:
        yield process
    finally:
        too_long.cancel()
        process.kill()
        process.communicate()
    assert list(folder.iterdir()) == [], "the folder is gone, however the command ends"


def watch(folder: Path, *arguments: str, stdin: str = "", **more: str) -> tuple[int, str, str]:
    with started(folder, *arguments, **more) as process:
        out, err = process.communicate(stdin, timeout=60)
        return process.returncode, out, err


def read_until(process: subprocess.Popen[str], wanted: str) -> str:
    """Standard error up to a line with the words that are wanted."""
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if wanted in line:
            return "".join(lines)
    raise AssertionError(f"no {wanted!r} in {lines}")


def test_a_command_that_compiles_nothing_is_left_alone(tmp_path: Path) -> None:
    code = "import sys; print(input()[::-1]); print('oh', file=sys.stderr); sys.exit(7)"
    alone = subprocess.run([*PLAIN, code], input="abc\n", capture_output=True, text=True)
    found, out, err = watch(tmp_path, "--", *PLAIN, code, stdin="abc\n")
    assert (found, out) == (alone.returncode, alone.stdout) == (7, "cba\n")
    said = [line for line in err.splitlines() if not line.startswith("watch: ")]
    assert said == alone.stderr.splitlines() == ["oh"]
    assert "watch: XLA compiled no program" in err


def test_arguments_descriptors_and_dispositions_are_passed_on(tmp_path: Path) -> None:
    code = 'printf "%s;" "$@"; cat /dev/fd/$1; grep -E "Sig(Blk|Ign)" /proc/self/status'

    ignoring = ("sh", "-c", 'trap "" HUP; exec "$@"', "sh")

    def outcome(*before: str) -> list[int]:
        with tempfile.TemporaryFile() as file:
            file.write(b"through")
            file.seek(0)
            number = str(file.fileno())
            done = subprocess.run(
                [*ignoring, *before, "sh", "-c", code, "sh", number, "--", "a b", ""],
                pass_fds=[file.fileno()],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=environment(tmp_path),
            )
        head, *masks = re.split(r"Sig(?:Blk|Ign):\s+", done.stdout)
        assert head == f"{number};--;a b;;through"
        # Beyond 31 there are those that libc keeps for itself.
        return [int(mask, 16) & 0x7FFFFFFF for mask in masks]

    alone = outcome()
    assert alone == [0, 1 << signal.SIGHUP - 1]
    assert outcome(*WATCH, "--") == alone


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_reaches_the_command_once(tmp_path: Path, number: signal.Signals) -> None:
    code = WRITER + (
        f"signal.pthread_sigmask(signal.SIG_BLOCK, [{int(number)}])\n"
        f"def take(seconds): return bool(signal.sigtimedwait([{int(number)}], seconds))\n"
        "say('ready'); say(take(20) + take(.3)); sys.exit(75)"
    )
    with started(tmp_path, "--", *PLAIN, code) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        out, _ = process.communicate(timeout=60)
        assert (process.returncode, out) == (75, "1\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV])
def test_it_ends_by_the_signal_that_ends_the_command(
    tmp_path: Path, number: signal.Signals
) -> None:
    code = f"import os; os.kill(os.getpid(), {int(number)})"
    assert watch(tmp_path, "--", *PLAIN, code)[0] == -number


def test_ctrl_c_at_a_terminal_reaches_the_command_once(tmp_path: Path) -> None:
    code = WRITER + (
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])\n"
        "def take(seconds): return bool(signal.sigtimedwait([signal.SIGINT], seconds))\n"
        "say('ready ' + str(os.isatty(0)))\n"
        "say(f'first {take(20)}'); say(f'second {take(1)}'); sys.exit(3)"
    )
    # What a terminal's shell does: a session of its own, whose terminal it is.
    at_terminal = (
        "import fcntl, os, sys, termios\nos.setsid()\nfcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*PLAIN, at_terminal, *WATCH, "--", *PLAIN, code],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment(tmp_path),
    )
    os.close(theirs)
    try:
        assert "ready True" in read_terminal(ours, "ready")
        # Passed on late, it would not be one with that of the terminal.
        process.send_signal(signal.SIGSTOP)
        os.write(ours, b"\x03")
        assert "first True" in read_terminal(ours, "first ")
        process.send_signal(signal.SIGCONT)
        assert "second False" in read_terminal(ours, "second ")
        assert process.wait(timeout=30) == 3
    finally:
        process.kill()
        os.close(ours)
        process.wait()
    assert list(tmp_path.iterdir()) == []


def read_terminal(terminal: int, wanted: str) -> str:
    found, until = "", time.monotonic() + 30
    while not re.search(wanted + r".*\n", found):
        assert select.select([terminal], [], [], max(0.0, until - time.monotonic()))[0], found
        found += os.read(terminal, 4096).decode()
    return found


def test_a_program_is_shown_while_the_command_waits(tmp_path: Path) -> None:
    code = WRITER + f"compiled({str(MOE)!r}); say('step 0 ' + input())"
    with started(tmp_path, *MESH, "--", *PLAIN, code) as process:
        shown = read_until(process, "verdict:")
        assert "watch: jit_loss, " in shown
        assert "all-to-all" in shown
        assert "verdict: expert-parallel" in shown
        (folder,) = (path for path in tmp_path.glob("*/*") if path.is_dir())
        out, err = process.communicate("runs\n", timeout=60)
    assert (process.returncode, out) == (0, "step 0 runs\n")
    assert err == "watch: 1 program shown\n"
    assert folder.name == "0"


def test_half_a_program_is_waited_for(tmp_path: Path) -> None:
    # Cut behind a computation, where the half looks like a text that has ended.
    code = WRITER + (
        f"text = open({str(MOE)!r}).read(); at = text.index('\\n}}', len(text) // 2) + 3\n"
        "name = 'module_0001.jit_step.cpu_after_optimizations.txt'\n"
        "write(name, text[:at]); time.sleep(.5); say('half'); write(name, text[at:], 'a'); input()"
    )
    with started(tmp_path, *MESH, "--", *PLAIN, code) as process:
        assert "verdict: expert-parallel" in read_until(process, "verdict:")
        assert process.communicate("\n", timeout=60) == ("half\n", "watch: 1 program shown\n")


def test_a_text_that_stays_broken_is_said(tmp_path: Path) -> None:
    code = WRITER + "write('a.after_optimizations.txt', 'HloModule jit_f, num_partitions=8\\n')"
    found, _, err = watch(tmp_path, "--", *PLAIN, code)
    assert found == 0
    assert "watch: cannot read a.after_optimizations.txt: " in err
    code = WRITER + "write('a.after_optimizations.txt', 'HloModule', 'w'); sys.exit(4)"
    found, _, err = watch(tmp_path, "--expect", "mixed", "--", *PLAIN, code)
    assert found == 4
    assert "watch: expected mixed, but no program over several devices was seen" in err


@pytest.mark.parametrize(
    ("expected", "own", "found", "told"),
    [
        ("expert-parallel", 0, 0, None),
        ("weight-gathered", 0, 1, "expected weight-gathered, found expert-parallel in jit_loss"),
        ("no-expert-parallelism", 5, 5, "found expert-parallel in jit_loss"),
    ],
)
def test_expect(tmp_path: Path, expected: str, own: int, found: int, told: str | None) -> None:
    code = WRITER + f"compiled({str(MOE)!r}); say('on'); sys.exit({own})"
    result, out, err = watch(tmp_path, *MESH, "--expect", expected, "--", *PLAIN, code)
    assert (result, out) == (found, "on\n")
    assert ("expected" in err) == (told is not None)
    assert (told or "") in err


def test_stop_ends_the_command(tmp_path: Path) -> None:
    code = WRITER + (
        "signal.signal(signal.SIGTERM, lambda *_: (say('saved'), sys.exit(75)))\n"
        f"compiled({str(GATHERED)!r}); time.sleep(60)"
    )
    options = (*MESH, "--expect", "expert-parallel", "--stop")
    found, out, err = watch(tmp_path, *options, "--", *PLAIN, code)
    assert (found, out) == (1, "saved\n")
    assert "expected expert-parallel, found weight-gathered in jit_loss" in err
    code = WRITER + f"compiled({str(MOE)!r}); time.sleep(.5); sys.exit(6)"
    assert watch(tmp_path, *options, "--", *PLAIN, code)[0] == 6


def test_stop_ends_a_command_that_will_not(tmp_path: Path) -> None:
    code = WRITER + (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"compiled({str(GATHERED)!r}); time.sleep(60)"
    )
    patched = (
        "import sys; from moe_shard.cli import watch; watch._GRACE_S = .3;"
        "sys.exit(watch.main(sys.argv[1:]))"
    )
    options = (*MESH, "--expect", "expert-parallel", "--stop")
    done = subprocess.run(
        [sys.executable, "-c", patched, *options, "--", *PLAIN, code],
        env=environment(tmp_path),
        timeout=30,
        capture_output=True,
    )
    assert done.returncode == 1
    assert list(tmp_path.iterdir()) == []


def test_json_is_alone_on_standard_output(tmp_path: Path) -> None:
    code = WRITER + f"say('mine'); compiled({str(MOE)!r}); sys.exit(3)"
    found, out, err = watch(
        tmp_path, *MESH, "--json", "--expect", "mixed", "--", *PLAIN, code, "more"
    )
    assert found == 3
    data = json.loads(out)
    assert data["command"][-1] == "more"
    assert data["exit_code"] == 3
    assert data["failure"] == "expected mixed, found expert-parallel in jit_loss"
    (program,) = data["programs"]
    assert program["verdict"] == "expert-parallel"
    assert program["program"] == "jit_loss"
    assert program["totals"]["all-to-all"]["count"] == 4
    assert "mine\n" in err


def test_small_programs_are_counted(tmp_path: Path) -> None:
    code = WRITER + (
        f"compiled({str(MOE)!r}); compiled({str(MOE)!r}, 'module_0002.jit_step')\n"
        f"write('module_0003.jit_add.cpu_after_optimizations.txt', {ONE_DEVICE!r})\n"
        "write('module_0003.jit_add.ir-no-opt.ll', 'x' * 1000)\n"
        "time.sleep(.5); say(sum(1 for each in FOLDER.iterdir()))"
    )
    found, out, err = watch(tmp_path, *MESH, "--", *PLAIN, code)
    assert (found, out) == (0, "0\n"), "what has been read is removed, and what nobody reads"
    assert err.splitlines()[-1] == (
        "watch: 1 program shown; 1 small or of one device were not (--all shows them);"
        " 1 had the text of an earlier one"
    )
    _, _, err = watch(tmp_path, *MESH, "--all", "--", *PLAIN, code)
    assert "watch: jit_add, " in err
    assert "watch: 2 programs shown; 1 had the text of an earlier one" in err


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


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("--", "no-such-command-anywhere"), 127, "error: no-such-command-anywhere: No such file"),
        (("--", str(ROOT / "README.md")), 126, "README.md: Permission denied"),
        ((), 2, "error: no COMMAND"),
        (("--",), 2, "error: no COMMAND"),
        (("python", "x.py"), 2, "error: COMMAND stands behind --: moe-shard watch -- python x.py"),
        (("--expect", "fast", "--", "ls"), 2, "invalid choice: 'fast'"),
        (("--stop", "--", "ls"), 2, "--stop needs --expect"),
        (("--mesh", "a", "--", "ls"), 2, "--mesh: cannot read 'a'"),
        (("extra", "--", "ls"), 2, "unrecognized arguments: extra"),
    ],
)
def test_what_cannot_be_started(
    tmp_path: Path, arguments: tuple[str, ...], code: int, told: str
) -> None:
    found, out, err = watch(tmp_path, *arguments)
    assert (found, out) == (code, "")
    assert told in err
    assert len(err.splitlines()) <= 3


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


def test_a_reader_that_has_left_does_not_end_it(tmp_path: Path) -> None:
    code = WRITER + f"compiled({str(MOE)!r}); time.sleep(.3); open(sys.argv[1], 'w'); sys.exit(9)"
    mark = tmp_path / "mark"
    folder = tmp_path / "temporary"
    folder.mkdir()
    process = subprocess.Popen(
        [*WATCH, "--", *PLAIN, code, str(mark)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment(folder),
    )
    assert process.stderr is not None
    process.stderr.close()
    assert process.wait(timeout=60) == 9
    assert mark.exists()
    assert list(folder.iterdir()) == []


# A plain JAX program, which sets its own flags: tokens to experts, a product, tokens back.
STEP = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("expert",))
def exchange(rows):
    return jax.lax.all_to_all(rows, "expert", 0, 0, tiled=True)
def layer(x, w):
    with jax.named_scope("dispatch"):
        rows = exchange(x)
    with jax.named_scope("experts"):
        rows = jnp.tanh(rows @ w[0])
    with jax.named_scope("combine"):
        return exchange(rows)
sharded = jax.shard_map(layer, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
def step(w, x):
    loss, grad = jax.value_and_grad(lambda w: jnp.mean(sharded(x, w) ** 2))(w)
    return loss, w - grad
place = lambda each: jax.device_put(each, NamedSharding(mesh, P("expert")))
w, x = place(np.ones((8, 64, 64), np.float32)), place(np.ones((512, 64), np.float32))
compiled = jax.jit(step).lower(w, x).compile()
print("compiled", input(), flush=True)
loss, w = compiled(w, x)
print("step 0", float(loss), os.environ["XLA_FLAGS"])
"""


def test_a_real_program_is_shown_before_its_first_step(tmp_path: Path) -> None:
    cache, temporary = tmp_path / "cache", tmp_path / "temporary"
    temporary.mkdir()
    more = {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache)}
    more |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = ("--mesh", "expert=8", "--expect", "expert-parallel", "--", sys.executable, "-c")
    with started(temporary, *command, STEP, **more) as process:
        shown = read_until(process, "verdict:")
        assert len(re.findall(r"^ +all-to-all +expert ", shown, re.M)) == 3
        assert "verdict: expert-parallel" in shown
        out, err = process.communicate("now\n", timeout=60)
    assert process.returncode == 0
    assert out == "compiled now\nstep 0 1.0 --xla_force_host_platform_device_count=8\n"
    assert "watch: 1 program shown" in err
    assert not cache.exists() or not list(cache.iterdir()), (
        "nothing comes from or goes to the cache"
    )
