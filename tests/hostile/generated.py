"""Generate hostile inputs: command lines, YAML models, rule tables, programs; make any case.

A case follows from its seed alone. Its files are written into an empty folder, which is the current
one when the command runs. What is odd about folders is in `folders.py`, about environments in
`processes.py`.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable

from moe_shard.config import configs_dir
from tests.hostile import folders
from tests.hostile.cases import ROOT, TINY_YML, Case, Files, Special, damaged, odd, setting
from tests.hostile.processes import process

OPTIONS = {
    "train": ["--help"],
    "explain": ["--rules", "--strict", "--json"],
    "detect": ["--json"],
    "compile": ["--expect", "--json", "--dump", "--html"],
    "import": ["--model", "--json"],
    "export": ["--json", "--force"],
    "generate": ["--json", "--no-cache"],
    "report": ["--mesh", "--expect", "--json", "--html", "--beside", "--stages"],
    "diff": ["--mesh", "--mesh-a", "--mesh-b", "--json"],
    "profile": ["--hlo", "--json"],
    "bench": [
        *("--tokens", "--size", "--rounds", "--json", "--tune", "--seconds", "--step"),
        *("--variants", "--variant", "--against", "2x64x32x48", "a: dtype=float32", "maxtext"),
    ],
    "status": ["--html", "--json"],
    "supervise": ["--max-restarts", "--", "train", "mixtral-tiny"],
    "watch": [
        *("--expect", "--stop", "--json", "--mesh", "--expert-axes", "--stages", "--all", "--"),
        *("--keep-cache", "expert-parallel", "data=1,expert=8", "python"),
    ],
    "": ["--version", "--help", "trian", "help"],
}


def make_case(seed: int) -> Case:
    """Make the case of a seed."""
    rng = random.Random(seed)
    makers, weights = zip(*_MAKERS, strict=True)
    maker: Callable[[random.Random], Case] = rng.choices(makers, weights)[0]
    case = maker(rng)
    case.deep = rng.random() < _DEEP
    return case


MODELS = sorted((configs_dir() / "models").glob("*.yml"))
RULES = sorted((configs_dir() / "rules").glob("*.yml"))
HLO = sorted((ROOT / "tests" / "lowering" / "fixtures").glob("*.txt*"))


def _command_line(rng: random.Random) -> Case:
    command = rng.choice(list(OPTIONS))
    pool: list[Callable[[], str]] = [
        lambda: rng.choice(OPTIONS[command]),
        lambda: odd(rng),
        lambda: setting(rng),
        lambda: rng.choice(["mixtral-tiny", "tiny.yml", "file", "folder"]),
    ]
    argv = [rng.choice(pool)() for _ in range(rng.randint(0, 5))]
    files: Files = {"folder": None, "file": rng.randbytes(50), "pipe": Special("pipe")}
    files |= {"link": Special("link", "nowhere"), "loop": Special("link", "loop")}
    files["tiny.yml"] = TINY_YML
    return Case("command line", [*([command] if command else []), *argv], files, stdin=odd(rng))


def _settings(rng: random.Random) -> Case:
    command = rng.choice(["train", "train", "explain", "compile"])
    target = ["h100:8"] if command == "compile" else []
    argv = [command, "tiny.yml", *target, *(setting(rng) for _ in range(rng.choice([1, 1, 2])))]
    return Case("settings", argv, {"tiny.yml": TINY_YML})


def _model(rng: random.Random) -> Case:
    content = rng.choice(MODELS).read_bytes()
    if rng.random() < 0.5:
        content = TINY_YML + setting(rng).replace("=", ": ", 1).encode("utf-8", "replace")
    name = rng.choice(["m.yml", "default.yml", "é.yml", "a b.yml", "base.yml", "None.yml"])
    return Case(
        "YAML model",
        [rng.choice(["train", "explain", "compile"]), name, *rng.choice([[], ["steps=1"]])],
        {name: damaged(content, rng)},
    )


def _rules(rng: random.Random) -> Case:
    content = damaged(rng.choice(RULES).read_bytes(), rng)
    argv = rng.choice(
        [
            ["train", "mixtral-tiny", "custom_mesh_and_rule=r.yml"],
            ["explain", "mixtral-tiny", "--rules", "r.yml"],
            ["explain", "mixtral-tiny", "custom_mesh_and_rule=r.yml", "--strict"],
        ]
    )
    return Case("rule table", argv, {"r.yml": content})


def _program(rng: random.Random) -> Case:
    content = b"HloModule a\n\nENTRY %e () -> f32[] {\n  ROOT %c = f32[] constant(0)\n}\n"
    small = [path for path in HLO if path.suffix == ".txt" and path.stat().st_size < 60_000]
    if small and rng.random() < 0.7:
        content = rng.choice(small).read_bytes()
    options = rng.choice([[], ["--json"], ["--mesh", odd(rng)], ["--expect", odd(rng)]])
    argv = rng.choice([["report", "p.txt"], ["diff", "p.txt", "p.txt"], ["report", "-"]])
    text = damaged(content, rng)
    return Case(
        "program", [*argv, *options], {"p.txt": text}, stdin=text.decode("utf-8", "replace")
    )


def _environment(rng: random.Random) -> Case:
    name = rng.choice(
        [
            *("XDG_CACHE_HOME", "HOME", "COLUMNS", "LINES", "TERM", "NO_COLOR", "FORCE_COLOR"),
            *("JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "SLURM_JOB_ID", "TMPDIR", "LC_ALL"),
        ]
    )
    value = odd(rng).replace("\x00", "")
    argv = rng.choice(
        [["train", "tiny.yml"], ["explain", "tiny.yml"], ["report", "file"], ["--help"]]
    )
    files: Files = {"tiny.yml": TINY_YML, "file": b""}
    return Case("environment", argv, files, {name: os.fsdecode(os.fsencode(value))})


_DEEP = 0.2
_MAKERS: list[tuple[Callable[[random.Random], Case], float]] = [
    (_command_line, 25),
    (_settings, 22),
    (_model, 15),
    (_rules, 8),
    (folders.run_folder, 10),
    (folders.checkpoints, 3),
    (folders.data, 6),
    (folders.hugging_face, 6),
    (_program, 4),
    (_environment, 1),
    (process, 1),
]
