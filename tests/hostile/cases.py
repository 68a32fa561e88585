"""Describe a case: one command, the files that it finds, and what is odd about them."""

from __future__ import annotations

import os
import random
import shutil
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from moe_shard.config import configs_dir

ROOT = Path(__file__).parents[2]
TEXTS = [
    *("", " ", "-", "--", "---", "=", "==", "a=b", "x" * 300, "/" + "y" * 5000, "~nouser/x", "~"),
    *("/dev/zero", "/dev/null", "/dev/full", "/", "..", ".", "/proc/self/mem", "/etc/shadow"),
    *("é", "模型", "🦊", "a\nb", "a\tb", "\x1b[31m", "\u202e", "\udcff", "%s", "{}"),
    *("[/red]", "[b]", "pipe", "link", "loop"),
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
    "max_target_length": 64,
}
TINY_YML = yaml.safe_dump(TINY).encode()


@dataclass(frozen=True)
class Special:
    """Describe what is no plain file.

    Attributes:
        kind: a link to `to`; a pipe without a writer; a socket; a file of many zeros; a folder in
            a folder in a folder, many times; a copy of the template `to` (`templates.py`).
        to: see `kind`.
    """

    kind: Literal["link", "pipe", "socket", "sparse", "deep", "copy"]
    to: str = ""


@dataclass(frozen=True)
class Harm:
    """Name a harm (`templates.HARMS`) that is done to a path after the files are written."""

    path: str
    name: str
    seed: int


Files = dict[str, bytes | Special | None]


@dataclass
class Case:
    """Describe one command and the files that it finds.

    Attributes:
        kind: which generator made it.
        argv: arguments of `moe-shard`.
        files: path -> content; None: a folder.
        environment: variables that are set while it runs; None: it is not set.
        stdin: what it can read there.
        harms: what is done to the files.
        shell: for a process of its own: a redirection or a limit, with `"$@"` for the command.
        deep: describe the whole step as well, up to its compilation.
    """

    kind: str
    argv: list[str]
    files: Files = field(default_factory=dict)
    environment: dict[str, str | None] = field(default_factory=dict)
    stdin: str = ""
    harms: list[Harm] = field(default_factory=list)
    shell: str = ""
    deep: bool = False

    def write(self, folder: Path) -> None:
        """Write the files into a folder."""
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Special):
                write_special(path, content)
            elif content is None:
                path.mkdir(exist_ok=True)
            else:
                path.write_bytes(content)
        if self.harms:
            from tests.hostile.templates import HARMS

            for harm in self.harms:
                HARMS[harm.name](folder / harm.path, random.Random(harm.seed))


def write_special(path: Path, special: Special) -> None:
    if special.kind == "link":
        path.symlink_to(special.to)
    elif special.kind == "pipe":
        os.mkfifo(path)
    elif special.kind == "socket":
        # A name of a socket has at most 107 bytes.
        here = os.open(path.parent, os.O_PATH)
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(f"/proc/self/fd/{here}/{path.name}")
        os.close(here)
    elif special.kind == "sparse":
        path.touch()
        os.truncate(path, 3 << 30)
    elif special.kind == "deep":
        _write_deep(path)
    else:
        from tests.hostile.templates import template

        shutil.copytree(template(special.to), path, symlinks=True, dirs_exist_ok=True)


def _write_deep(path: Path) -> None:
    """Make a folder in a folder 800 times: its path is longer than the system takes at once."""
    path.mkdir()
    here = os.open(path, os.O_RDONLY)
    for _ in range(800):
        os.mkdir("deeper", dir_fd=here)
        below = os.open("deeper", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)


def _keys() -> dict[str, object]:
    found: dict[str, object] = yaml.safe_load((configs_dir() / "base.yml").read_text("utf-8"))
    return found


BASE = _keys()
_PLACES = {"base_output_directory"}
"""Keys whose odd values would be folders outside the case's own."""


def odd(rng: random.Random) -> str:
    """Draw an odd text or number."""
    return rng.choice([rng.choice(TEXTS), rng.choice(NUMBERS)])


def setting(rng: random.Random) -> str:
    """Draw key=value: a key, or nearly one, with an odd value."""
    key = rng.choice([key for key in BASE if key not in _PLACES])
    if rng.random() < 0.1:
        key = rng.choice([key + "x", key[:-1], key.upper(), odd(rng), f" {key}"])
    return f"{key}={odd(rng)}"


def something(rng: random.Random) -> bytes | Special | None:
    """Draw what may be there in place of a file."""
    return rng.choice(
        [
            *(None, b"", b"\x00" * 9, rng.randbytes(99), b"[]", b"{}\n", b"1\n", b"null\n"),
            *(b"\xff\xfe{}", b"{" * 50_000, b"9" * 10_000, b'{"a": NaN, "b": 1e999}\n'),
            *(Special("link", "nowhere"), Special("link", "."), Special("link", "/dev/zero")),
            *(Special("pipe"), Special("socket"), Special("sparse"), Special("link", "/dev/full")),
        ]
    )


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Damage a text in one to three ways."""
    for _ in range(rng.randint(1, 3)):
        lines = content.splitlines(keepends=True) or [b""]
        at, where = rng.randrange(len(lines)), rng.randrange(len(content) + 1)
        before, line, after = lines[:at], lines[at], lines[at + 1 :]
        more = setting(rng).replace("=", ": ", 1).encode("utf-8", "replace")
        ways = [
            content[:where],
            content[:where] + rng.randbytes(rng.randint(1, 4)) + content[where:],
            b"".join([*before, *after]),
            b"".join([*before, line, line, *after]),
            b"".join([*before, b"  " + line, *after]),
            b"".join([*before, line[: len(line) // 2], *after]),
            content + more,
            content.replace(b":", rng.choice([b"=", b": -", b"::", b": [", b""]), 3),
            content.replace(b"\n", rng.choice([b"\r\n", b" "])),
        ]
        content = rng.choice(ways)
    return content


def _other_value(value: Any, rng: random.Random) -> Any:
    """Draw a value of another type, or an odd one, in place of one of a JSON object."""
    more = value * 3 if isinstance(value, int | list | str) else 3
    numbers = [-1, 0, 1, 2**31, 2**64, 10**30, 10**400]
    reals = [0.5, -0.5, 1e308, float("nan"), float("inf")]
    texts = ["", "x", "é", "a\nb", "x" * 3000, "[/red]", "\x1b[31m"]
    others = [[], {}, [[]], [1, "a", None]]
    kinds: list[list[Any]] = [
        *([str(value)], [[value]], [{"a": value}], [None], [True, False], [more]),
        *(numbers, reals, texts, others),
    ]
    return rng.choice(rng.choice(kinds))


def other_json(content: Any, rng: random.Random, times: int = 1) -> Any:
    """Give some value in a JSON object another type, or another value, or take it out."""
    for _ in range(times):
        places: list[tuple[Any, Any]] = []
        waiting = [content] if isinstance(content, dict | list) else []
        while waiting:
            here = waiting.pop()
            keys = list(here) if isinstance(here, dict) else list(range(len(here)))
            places += [(here, key) for key in keys]
            waiting += [here[key] for key in keys if isinstance(here[key], dict | list)]
        if not places:
            return content
        here, key = rng.choice(places)
        if rng.random() < 0.15:
            del here[key]
        else:
            here[key] = _other_value(here[key], rng)
    return content
