"""Check README, CONTRIBUTING and docs/: what they name exists, and their Python runs.

Commands are checked, not run: the command, each of its flags and each key=value. The commands of
docs/maxtext.md are run unchanged by tests/maxtext/test_docs.py.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from flax import nnx

import moe_shard as ms
from moe_shard.cli import COMMANDS
from moe_shard.cli import main as moe_shard
from moe_shard.config import list_models, load_config
from moe_shard.config.load import base_settings, maxtext_keys
from moe_shard.config.strategies import GROUP, VARIABLE, unregister_strategy

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
OTHERS_KEYS = {"num_local_experts", "model_name", "hf_family"}
OTHERS_NAMES = {"train_compile", "X_blocks", "X_scales", "X_scale_inv", "JAXTYPING_DISABLE"}
"""A command of MaxText's, suffixes of tensors' names, and a variable that jaxtyping reads."""
TEXT = {".py", ".yml", ".json"}
LONGEST_README = 130


class Block(NamedTuple):
    """Hold a block of code: its language, its text, and the comment in the line above it."""

    language: str
    body: str
    comment: str


def blocks(name: str) -> list[Block]:
    found = re.findall(
        r"^(?:<!-- (.*?) -->\n)?```(\w*)\n(.*?)^```$", TEXTS[name], re.MULTILINE | re.DOTALL
    )
    return [Block(language, body, comment) for comment, language, body in found]


def code(name: str) -> list[str]:
    """Return the lines of blocks, and pieces of inline code."""
    lines = [line for block in blocks(name) for line in block.body.splitlines()]
    inline = re.sub(r"^```.*?^```$", "", TEXTS[name], flags=re.MULTILINE | re.DOTALL)
    return lines + [" ".join(piece.split()) for piece in re.findall(r"`([^`]+)`", inline)]


def commands(name: str) -> Iterator[list[str]]:
    """Yield the words of each command of a shell block."""
    for block in blocks(name):
        if block.language == "sh":
            for line in block.body.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    yield words


@pytest.fixture(scope="module")
def flags() -> dict[str, set[str]]:
    """Return the flags of every command, from its --help."""
    found = {}
    for name in COMMANDS:
        told = io.StringIO()
        with contextlib.redirect_stdout(told), contextlib.suppress(SystemExit):
            moe_shard([name, "--help"])
        found[name] = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", told.getvalue()))
        assert "--help" in found[name]
    return found


def anchors(text: str) -> set[str]:
    """Return the anchors of a Markdown page: its headings, as sites write them."""
    heads = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("name", NAMES)
def test_every_link_resolves(name: str) -> None:
    prose = re.sub(r"^```.*?^```$", "", TEXTS[name], flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", prose)
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("name", NAMES)
def test_every_path_and_module_exists(name: str) -> None:
    for piece in code(name):
        for path in re.findall(
            r"(?<![\w./$-])(?:moe_shard|tests|tools|benchmarks|configs|docs)/[\w./*-]+", piece
        ):
            # The folder of a list such as `heads.py`, and a file in every folder, are globs.
            assert list(ROOT.glob(path.rstrip("./,") or ".")), f"{name}: {path}"
        for dotted in re.findall(r"\b(?:moe_shard|benchmarks)(?:\.\w+)+", piece):
            assert dotted == GROUP or resolves(dotted), f"{name}: {dotted}"


@pytest.fixture(scope="module")
def sources() -> str:
    """Return all text in which a name that the pages mention can be defined."""
    folders = (ROOT / "moe_shard", ROOT / "configs", ROOT / "tests" / "autoep")
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in TEXT]
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_one_of_the_sources(name: str, sources: str) -> None:
    known = set(re.findall(r"\w+", sources))
    # Keys, attributes, functions: inline code with an underscore.
    named = {word for piece in code(name) for word in re.findall(r"^\w*_\w+(?=$|[=(])", piece)}
    assert not {word for word in named - known - OTHERS_NAMES if not word.startswith("JAX_")}


def resolves(dotted: str) -> bool:
    """Tell whether a dotted name is a module, or an attribute of one."""
    module, *rest = dotted.split(".")
    found: Any = importlib.import_module(module)
    for part in rest:
        module += f".{part}"
        try:
            found = getattr(found, part)
        except AttributeError:
            try:
                found = importlib.import_module(module)
            except ModuleNotFoundError:
                return False
    return True


@pytest.mark.parametrize("name", NAMES)
def test_every_command_and_flag_exists(name: str, flags: dict[str, set[str]]) -> None:
    known = set().union(*flags.values()) | {"--version"}
    for piece in code(name):
        started = re.search(r"(?:moe-shard|-m moe_shard|-m moe_shard\.) ?(\w+)", piece)
        if re.match(r"moe-shard [a-z]|python -m moe_shard[ .]", piece) and started:
            command = started[1]
            assert command in COMMANDS, f"{name}: {piece}"
            mine, _, _ = piece.partition(" -- ")
            for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*", mine):
                assert flag in flags[command], f"{name}: {piece}"
        elif re.match(r"--[a-z]", piece):
            flag = re.split(r"[ =]", piece)[0]
            assert flag in known or flag.startswith("--xla"), f"{name}: {piece}"
        if piece.startswith("make "):
            for target in re.findall(r"^make ([a-z-]+)", piece):
                makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
                assert re.search(rf"^{target}:", makefile, re.M), f"{name}: {piece}"


@pytest.mark.parametrize("name", NAMES)
def test_every_key_exists_and_takes_the_value(name: str) -> None:
    known = set(base_settings()) | set(maxtext_keys().defaults) | OTHERS_KEYS
    for piece in code(name):
        if piece.endswith(","):  # an argument of Python that has a line of its own
            continue
        if '"' in piece or "(" in piece or piece.startswith(("export ", "--stages", "--mesh")):
            continue
        mine, _, _ = piece.partition(" -- ")
        for key, value in re.findall(
            r"(?:^|(?<=\s))([a-z]\w+)=(\S*)", re.sub(r"--\w+ \S+", "", mine)
        ):
            if key in {"key", "wi_0"}:
                continue
            assert key in known, f"{name}: {key}={value}"


@pytest.mark.parametrize("name", [name for name in NAMES if name != "docs/maxtext.md"])
def test_commands_with_a_known_model_load(name: str) -> None:
    models = set(list_models())
    for words in commands(name):
        if words[0].startswith("PYTHONPATH=") and words[1].startswith(f"{VARIABLE}="):
            continue  # with a strategy of the page's own
        given = [word for word in words if word in models]
        pairs = [word for word in words if re.match(r"[a-z]\w*=", word)]
        if given:
            load_config(given[0], pairs)


RULE_EXAMPLE = "file: my-model.yml"
STRATEGY_EXAMPLES = {"my_strategies": ("scatter", 1.0), "my_dense": ("dense", -1.0)}
"""Module: strategy, and the capacity factor under which it equals `gather`; 1.0 drops choices."""
LIBRARY_EXAMPLE = "library-example"


PYTHON = [
    pytest.param(name, "".join(each.body for each in found), id=name)
    for name in NAMES
    if (
        found := [
            block
            for block in blocks(name)
            if block.language == "python" and not block.comment.startswith("file: ")
        ]
    )
]


@pytest.mark.parametrize(("name", "body"), PYTHON)
def test_python_runs(name: str, body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(body, name, "exec"), {"__name__": "__main__"})
    assert not list(tmp_path.iterdir())


def test_the_rule_of_the_extending_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (body,) = (each.body for each in blocks("docs/extending.md") if each.comment == RULE_EXAMPLE)
    monkeypatch.chdir(tmp_path)
    Path("my-model.yml").write_text(body)
    assert moe_shard(["explain", "my-model.yml", "--json"]) == 0
    parameters = json.loads(capsys.readouterr().out)["parameters"]
    (table,) = (each for each in parameters if each["name"] == "embedding.table")
    assert table["spec"] == [["tensor", "expert"], []]
    assert table["shard_shape"] == [40, 128]


@pytest.mark.parametrize("module", STRATEGY_EXAMPLES)
def test_a_strategy_of_the_extending_page(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comment = f"file: {module}.py"
    (body,) = (each.body for each in blocks("docs/extending.md") if each.comment == comment)
    mine, capacity_factor = STRATEGY_EXAMPLES[module]
    (tmp_path / f"{module}.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module(module)
    x = jax.random.normal(jax.random.key(1), (8, 16, 32))
    sharding = ms.Sharding(ms.make_mesh(data=2, expert=4), ms.RuleTable.default())
    found = {}
    try:
        for name in (mine, "gather"):
            config = ms.MoEConfig(
                num_experts=8,
                num_experts_per_tok=2,
                moe_mlp_dim=16,
                capacity_factor=capacity_factor,
                moe_dispatch=name,
                moe_dispatch_no_expert_sharding=True,
            )
            layer = ms.MoELayer(config, model_dim=32, sharding=sharding, rngs=nnx.Rngs(0))
            found[name] = jax.jit(layer)(x)
    finally:
        unregister_strategy(mine)
    y, stats = found[mine]
    assert (int(stats.dropped.sum()) > 0) == (capacity_factor > 0)
    np.testing.assert_allclose(y, found["gather"][0], rtol=1e-5, atol=1e-6)


def test_the_library_example_is_the_one_that_is_run() -> None:
    (body,) = (each.body for each in blocks("README.md") if each.comment == LIBRARY_EXAMPLE)
    assert body == (ROOT / "tests" / "library" / "readme_example.py").read_text(encoding="utf-8")
    assert len(body.splitlines()) <= 30


def test_the_placement_table_is_what_explain_says() -> None:
    command = [sys.executable, "tools/placement_table.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shown = TEXTS["docs/sharding.md"].split("<!-- placement: python tools/placement_table.py -->\n")
    assert shown[1].split("<!-- /placement -->")[0] == done.stdout


def test_the_readme_is_short() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= LONGEST_README
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in TEXTS["README.md"], page.name


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("docs/")])
def test_a_page_opens_with_the_question_it_answers(name: str) -> None:
    title, _, opening = TEXTS[name].partition("\n")
    assert title.startswith("# ")
    assert "?" in title + opening.lstrip().split("\n\n")[0], name
