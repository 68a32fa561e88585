"""Generate hostile inputs: command lines, YAML models, rule tables, run folders, HLO texts.

A case follows from its seed alone. Its files are written into an empty folder, which is the current
one when the command runs.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from moe_shard.config import configs_dir

ROOT = Path(__file__).parents[2]
TEXTS = [
    *("", " ", "-", "--", "---", "=", "==", "a=b", "x" * 300, "/" + "y" * 5000, "~nouser/x", "~"),
    *("/dev/zero", "/dev/null", "/dev/full", "/", "..", ".", "/proc/self/mem", "/etc/shadow"),
    *(
        "é",
        "模型",
        "🦊",
        "a\nb",
        "a\tb",
        "\x1b[31m",
        "\u202e",
        "\udcff",
        "%s",
        "{}",
        "[/red]",
        "[b]",
    ),
    *("null", "None", "true", "nan", "inf", "-inf", "1e999", "1e-999", "0x1F", "1_000", "-1", "0"),
    *("!!timestamp x", "!!python/object:os.system x", "!!binary =", "&a [*a]", "{a: {b: [1", "'"),
    *("9" * 5000, "0x" + "f" * 4000, "[" * 2000, "1" + "0" * 400, "-0.0", "5e-324", "1:30", "*"),
    *("https://example.org/x", "gs://bucket/x", "C:\\x", "a,b", "v5e:2x4", "h100:8", "cpu:0"),
    *("v5e:99999x99999", "h100:-1", ":8", "cpu:", "mi355x:1e9", "mixtral-tiny", "file", "folder"),
]
NUMBERS = [
    *("0", "-1", "1", "2", "3", "7", "8", "64", "1000", "65536", "2147483647", "2147483648"),
    *("9223372036854775807", "1e30", "1e-30", "0.5", "1.5", "-0.5", "0.1", "1e308", "100000000"),
]
TINY = {
    "base_emb_dim": 32,
    "base_num_decoder_layers": 2,
    "base_num_query_heads": 4,
    "base_num_kv_heads": 2,
    "base_mlp_dim": 64,
    "vocab_size": 320,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
OPTIONS = {
    "train": ["--help"],
    "explain": ["--rules", "--strict", "--json"],
    "compile": ["--expect", "--json", "--dump", "--html"],
    "import": ["--model", "--json"],
    "export": ["--json", "--force"],
    "generate": ["--json", "--no-cache"],
    "report": ["--mesh", "--expect", "--json", "--html", "--beside", "--stages"],
    "diff": ["--mesh", "--mesh-a", "--mesh-b", "--json"],
    "profile": ["--hlo", "--json"],
    "bench": ["--tokens", "--size", "--rounds", "--json"],
    "": ["--version", "--help", "trian", "help"],
}


@dataclass
class Case:
    """Describe one command and the files that it finds.

    Attributes:
        kind: which generator made it.
        argv: arguments of `moe-shard`.
        files: path -> content; None: a folder.
        environment: variables that are set while it runs.
        stdin: what it can read there.
    """

    kind: str
    argv: list[str]
    files: dict[str, bytes | None] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    stdin: str = ""

    def write(self, folder: Path) -> None:
        """Write the files into a folder."""
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                path.mkdir(exist_ok=True)
            else:
                path.write_bytes(content)


def make_case(seed: int) -> Case:
    """Make the case of a seed."""
    rng = random.Random(seed)
    makers, weights = zip(*_MAKERS, strict=True)
    maker: Callable[[random.Random], Case] = rng.choices(makers, weights)[0]
    return maker(rng)


def _keys() -> dict[str, object]:
    found: dict[str, object] = yaml.safe_load((configs_dir() / "base.yml").read_text("utf-8"))
    return found


BASE = _keys()
_PLACES = {"base_output_directory"}
"""Keys whose odd values would be folders outside the case's own."""
MODELS = sorted((configs_dir() / "models").glob("*.yml"))
RULES = sorted((configs_dir() / "rules").glob("*.yml"))
HLO = sorted((ROOT / "tests" / "lowering" / "fixtures").glob("*.txt*"))


def _odd(rng: random.Random) -> str:
    return rng.choice([rng.choice(TEXTS), rng.choice(NUMBERS)])


def _setting(rng: random.Random) -> str:
    key = rng.choice([key for key in BASE if key not in _PLACES])
    if rng.random() < 0.1:
        key = rng.choice([key + "x", key[:-1], key.upper(), _odd(rng), f" {key}"])
    return f"{key}={_odd(rng)}"


def _command_line(rng: random.Random) -> Case:
    command = rng.choice(list(OPTIONS))
    pool: list[Callable[[], str]] = [
        lambda: rng.choice(OPTIONS[command]),
        lambda: _odd(rng),
        lambda: _setting(rng),
        lambda: rng.choice(["mixtral-tiny", "tiny.yml", "file", "folder"]),
    ]
    argv = [rng.choice(pool)() for _ in range(rng.randint(0, 5))]
    files: dict[str, bytes | None] = {"folder": None, "file": rng.randbytes(50)}
    files["tiny.yml"] = yaml.safe_dump(TINY).encode()
    return Case("command line", [*([command] if command else []), *argv], files, stdin=_odd(rng))


def _settings(rng: random.Random) -> Case:
    command = rng.choice(["train", "train", "explain", "compile"])
    target = ["h100:8"] if command == "compile" else []
    argv = [command, "tiny.yml", *target, *(_setting(rng) for _ in range(rng.choice([1, 1, 2])))]
    return Case("settings", argv, {"tiny.yml": yaml.safe_dump(TINY).encode()})


def _damaged(content: bytes, rng: random.Random) -> bytes:
    """Damage a text in one to three ways."""
    for _ in range(rng.randint(1, 3)):
        lines = content.splitlines(keepends=True) or [b""]
        at, where = rng.randrange(len(lines)), rng.randrange(len(content) + 1)
        before, line, after = lines[:at], lines[at], lines[at + 1 :]
        setting = _setting(rng).replace("=", ": ", 1).encode("utf-8", "replace")
        ways = [
            content[:where],
            content[:where] + rng.randbytes(rng.randint(1, 4)) + content[where:],
            b"".join([*before, *after]),
            b"".join([*before, line, line, *after]),
            b"".join([*before, b"  " + line, *after]),
            b"".join([*before, line[: len(line) // 2], *after]),
            content + setting,
            content.replace(b":", rng.choice([b"=", b": -", b"::", b": [", b""]), 3),
            content.replace(b"\n", rng.choice([b"\r\n", b" "])),
        ]
        content = rng.choice(ways)
    return content


def _model(rng: random.Random) -> Case:
    content = rng.choice(MODELS).read_bytes()
    if rng.random() < 0.5:
        content = yaml.safe_dump(TINY).encode() + _setting(rng).replace("=", ": ", 1).encode(
            "utf-8", "replace"
        )
    name = rng.choice(["m.yml", "default.yml", "é.yml", "a b.yml", "base.yml", "None.yml"])
    return Case(
        "YAML model",
        [rng.choice(["train", "explain", "compile"]), name, *rng.choice([[], ["steps=1"]])],
        {name: _damaged(content, rng)},
    )


def _rules(rng: random.Random) -> Case:
    content = _damaged(rng.choice(RULES).read_bytes(), rng)
    argv = rng.choice(
        [
            ["train", "mixtral-tiny", "custom_mesh_and_rule=r.yml"],
            ["explain", "mixtral-tiny", "--rules", "r.yml"],
            ["explain", "mixtral-tiny", "custom_mesh_and_rule=r.yml", "--strict"],
        ]
    )
    return Case("rule table", argv, {"r.yml": content})


_RUN_FILES = ("config.yml", "lowering.json", "metrics.jsonl", "tensorboard", "checkpoints", "hlo")


def _run_folder(rng: random.Random) -> Case:
    run = "outputs/tiny"
    settings = dict(TINY, run_name="tiny", steps=rng.choice([0, 1, 5]))
    records = [{"step": step, "loss": 1.0} for step in range(3)]
    files: dict[str, bytes | None] = {
        "tiny.yml": yaml.safe_dump(TINY).encode(),
        f"{run}/config.yml": yaml.safe_dump(settings).encode(),
        f"{run}/lowering.json": json.dumps({"num_devices": 8, "collectives": []}).encode(),
        f"{run}/metrics.jsonl": "".join(json.dumps(each) + "\n" for each in records).encode(),
    }
    for _ in range(rng.randint(1, 3)):
        name = f"{run}/{rng.choice([*_RUN_FILES, '.lock', 'goodput.json'])}"
        content = files.get(name) or b"{}\n"
        files[name] = rng.choice(
            [None, b"", b"\x00" * 9, rng.randbytes(99), _damaged(content, rng)]
        )
    if rng.random() < 0.3 and files.get(f"{run}/checkpoints") is None:
        files[f"{run}/checkpoints"] = None
        files[f"{run}/checkpoints/{rng.choice(['3', '03', 'x', '-1', '3.damaged'])}"] = None
    argv = rng.choice(
        [
            ["train", "tiny.yml", "run_name=tiny"],
            ["train", "tiny.yml", "run_name=tiny", _setting(rng)],
            ["train", run],
            ["report", run],
            ["diff", run, f"{run}/lowering.json"],
            ["profile", run],
            ["generate", run, "a"],
            ["export", run, "exported"],
            ["import", run, "imported"],
        ]
    )
    return Case("run folder", argv, files)


def _program(rng: random.Random) -> Case:
    content = b"HloModule a\n\nENTRY %e () -> f32[] {\n  ROOT %c = f32[] constant(0)\n}\n"
    small = [path for path in HLO if path.suffix == ".txt" and path.stat().st_size < 60_000]
    if small and rng.random() < 0.7:
        content = rng.choice(small).read_bytes()
    options = rng.choice([[], ["--json"], ["--mesh", _odd(rng)], ["--expect", _odd(rng)]])
    argv = rng.choice([["report", "p.txt"], ["diff", "p.txt", "p.txt"], ["report", "-"]])
    text = _damaged(content, rng)
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
    value = _odd(rng).replace("\x00", "")
    argv = rng.choice(
        [["train", "tiny.yml"], ["explain", "tiny.yml"], ["report", "file"], ["--help"]]
    )
    files: dict[str, bytes | None] = {"tiny.yml": yaml.safe_dump(TINY).encode(), "file": b""}
    return Case("environment", argv, files, {name: os.fsdecode(os.fsencode(value))})


_MAKERS: list[tuple[Callable[[random.Random], Case], float]] = [
    (_command_line, 30),
    (_settings, 25),
    (_model, 18),
    (_rules, 9),
    (_run_folder, 10),
    (_program, 6),
    (_environment, 2),
]
