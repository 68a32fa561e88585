"""Check the strategy registry: how a strategy from outside is found, and what is refused."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_shard.config import strategies
from moe_shard.config.load import configs_dir, load_config
from moe_shard.config.strategies import (
    GROUP,
    VARIABLE,
    find_strategy,
    register_strategy,
    strategy_names,
    unregister_strategy,
)
from moe_shard.errors import UserError

MINE = """
from moe_shard.config.strategies import register_strategy

@register_strategy("{name}", has_slots=False, keys=("grouped_product",))
def make(config, placement): ...
"""


@pytest.fixture(autouse=True)
def _forgets() -> Iterator[None]:
    before = dict(strategies._entries)
    yield
    for name in set(strategies._entries) - set(before):
        unregister_strategy(name)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_the_packages_own_are_its_files_and_their_traits_are_in_them() -> None:
    assert strategy_names() == ("einsum", "gather", "ragged")
    ragged, gather = find_strategy("ragged"), find_strategy("gather")
    assert (ragged.has_slots, ragged.always_moves_tokens) == (False, True)
    assert (gather.has_slots, gather.always_moves_tokens) == (True, False)
    assert not ragged.own_keys & gather.own_keys
    line = re.search(r"^moe_dispatch:.*", (configs_dir() / "base.yml").read_text(), re.MULTILINE)
    assert line is not None
    assert "einsum | gather | ragged" in line[0]


def test_a_name_of_the_packages_own_is_checked_without_jax() -> None:
    code = (
        "import sys; from moe_shard.config import load_config; load_config('mixtral-tiny'); "
        "assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_module_that_the_environment_names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "env_strategy.py").write_text(MINE.format(name="by_env"))
    monkeypatch.setenv(VARIABLE, "env_strategy")
    moe = load_config("mixtral-tiny", ["moe_dispatch=by_env"]).model.moe
    assert moe is not None
    assert find_strategy(moe.moe_dispatch).own_keys == {"grouped_product"}


def test_an_entry_point_of_an_installed_package(folder: Path) -> None:
    (folder / "installed_strategy.py").write_text(MINE.format(name="installed"))
    info = folder / "somebodys-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: somebodys\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\ninstalled = installed_strategy\n")
    assert "installed" in strategy_names()
    assert "installed_strategy" not in sys.modules  # not before it is used
    assert find_strategy("installed").name == "installed"


@pytest.mark.parametrize(
    ("text", "says"),
    [(None, "No module named"), ("1 / 0", "ZeroDivisionError: division by zero")],
)
def test_a_module_that_fails_is_one_line(
    text: str | None, says: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if text is not None:
        (folder / "broken_strategy.py").write_text(text)
    monkeypatch.setenv(VARIABLE, "broken_strategy")
    with pytest.raises(UserError, match=f"{VARIABLE}: importing broken_strategy failed.*{says}"):
        load_config("mixtral-tiny", ["moe_dispatch=mine"])


@pytest.mark.parametrize(
    ("module", "fix"),
    [
        ("nowhere", r"a module on the Python path \(PYTHONPATH=its folder\)"),
        ("broken_strategy.py", "a module's name, not a file's: broken_strategy, with"),
        ("./broken_strategy.py", "a module's name, not a file's: broken_strategy, with"),
        ("broken_strategy", "what fails in broken_strategy itself"),
    ],
)
def test_the_fix_fits_what_failed(
    module: str, fix: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "broken_strategy.py").write_text("import not_installed")
    monkeypatch.setenv(VARIABLE, module)
    with pytest.raises(UserError, match=f"fix: {fix}"):
        load_config("mixtral-tiny", ["moe_dispatch=mine"])


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UserError) as caught:
        load_config("mixtral-tiny", ["moe_dispatch=mine"])
    assert str(caught.value) == (
        "moe_dispatch=mine is not a known moe_dispatch\n"
        "fix: moe_dispatch one of einsum, gather, ragged; "
        "for one of your own, MOE_SHARD_STRATEGIES=its_module"
    )


@pytest.mark.parametrize("name", ["gather", "by_another"])
def test_a_name_that_is_taken_is_refused(name: str) -> None:
    def make(config: object, placement: object) -> None: ...

    def other(config: object, placement: object) -> None: ...

    other.__module__ = "another"
    owner = "moe_shard.moe.dispatch.gather" if name == "gather" else "another"
    if name != "gather":
        register_strategy(name, has_slots=True)(other)
    with pytest.raises(UserError, match=f"{name} of .* has the name of another, of {owner}\n"):
        register_strategy(name, has_slots=True)(make)


@pytest.mark.parametrize("name", ["", "My", "my-own", "a b"])
def test_a_name_that_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="a strategy cannot be called"):
        register_strategy(name, has_slots=True)
