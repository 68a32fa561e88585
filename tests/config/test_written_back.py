"""Check that config.yml loads again to the same values, whatever they are."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_shard.checkpoints.resolve import load_model
from moe_shard.config import configs_dir, load_config
from moe_shard.config.strict_yaml import format_yaml, parse_yaml
from moe_shard.errors import UserError
from tests.config.helpers import MODEL, check_message

BASE = yaml.safe_load((configs_dir() / "base.yml").read_text(encoding="utf-8"))
TEXTS = [
    *("3e-4", "1e5", "1.e3", ".5", "5.", "1_000", "0x1F", "0o17", "017", "0b11", "+1", "-1", "12"),
    *("true", "True", "yes", "NO", "on", "Off", "y", "n", "null", "Null", "~", "None", "none"),
    *(".inf", "-.INF", ".nan", "NaN", "inf", "1:30", "190:20:30", "2024-01-01", "12:30:45.5"),
    *("2001-12-14t21:59:43.10-05:00", "=", "<<", "---", "...", "-", "- a", "? a", "a: b", "a:"),
    *(": a", "#", "a #b", "[a", "{a: 1}", "&a", "*a", "!!int 3", "!a", "|", ">", "%", "@", "`"),
    *("'", '"', "it's", '"a"', "'a'", "\\", "\\n", "a\nb", "a\n\n b", "\ta", " a", "a ", "\r"),
    *("é", "模型", "🦊", "\u2028", "\u00a0a", "\ufeffa", "\x00", "\x7f", "\x85", "\ud800"),
    *("e\u0301", "default", "auto", "", "a" * 300, "a b " * 60, "/a/b", "~nouser/a", "C:\\a"),
]
NUMBERS = [
    *(0, 1, -1, 2, 7, 10**9, 2**31, 2**63 - 1, 2**63, -(2**63), 10**30),
    *(0.0, -0.0, 0.1, 1e-5, 3e-4, 1e5, 1e16, 1e22, 5e-324, 1.7976931348623157e308, 0.1 + 0.2),
]
OTHERS: list[Any] = [True, False, None, [], [[]], {}, {"a": 1}, [1], [0.5], [True], [None]]


FREE = [
    *("model_name", "run_name", "base_output_directory", "load_parameters_path"),
    *("hf_family", "jax_cache_dir", "tokenizer_path"),
]
"""Keys whose values are any text."""


def assert_kept(folder: Path, settings: dict[str, Any]) -> int:
    """Assert that settings are refused in three lines, or written back whole."""
    model, again = folder / "small.yml", folder / "config.yml"
    # JSON is YAML of any version, and is not written by the package.
    text = json.dumps({**parse_yaml(MODEL), **settings}, ensure_ascii=False)
    model.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        config = load_config(str(model))
    except UserError as error:
        check_message(error)
        return 0
    again.write_text(config.to_yaml(), encoding="utf-8")
    # Their text as well: 1 == 1.0 == True, and -0.0 == 0.0.
    assert repr(load_config(str(again)).as_flat_dict()) == repr(config.as_flat_dict()), settings
    return 1


def test_any_text_in_every_key_of_text(tmp_path: Path) -> None:
    names = ("/", "\\", "default")  # no names of a run
    kept = 0
    for text in TEXTS:
        settings: dict[str, Any] = dict.fromkeys(FREE, text) | {"dataset_path": [text, text]}
        if any(part in text for part in names):
            settings["run_name"] = "run"
        kept += assert_kept(tmp_path, settings)
    printable = [text for text in TEXTS if text.isprintable()]
    # More, where a line break within quotes is read as a space.
    assert kept >= len(printable)


def test_odd_values_in_every_key(tmp_path: Path) -> None:
    rng = random.Random(0)
    kept = 0
    for key in set(BASE) - set(FREE):
        default = BASE[key]
        likely: list[Any] = NUMBERS
        if isinstance(default, list):
            likely = [[rng.choice(TEXTS)], rng.sample(NUMBERS, 2)]
        values = [rng.choice(likely), rng.choice([*TEXTS, *NUMBERS, *OTHERS])]
        kept += sum(assert_kept(tmp_path, {key: value}) for value in values)
    assert kept > 40


@pytest.mark.parametrize("stem", ["default", "None", "3e-4", "~", "null", "é", "config", "a: b"])
def test_the_name_of_the_model_file_is_kept(tmp_path: Path, stem: str) -> None:
    model, again = tmp_path / f"{stem}.yml", tmp_path / "config.yml"
    model.write_text(MODEL)
    config = load_config(str(model))
    again.write_text(config.to_yaml())
    assert load_config(str(again)).as_flat_dict() == config.as_flat_dict()


@pytest.mark.parametrize("text", ["3e-4", "1e5", "1.e3", "2024-01-01", "yes", "é"])
def test_run_name_on_the_command_line(tmp_path: Path, text: str) -> None:
    config = load_config("mixtral-tiny", [f"run_name={text}"])
    (tmp_path / "config.yml").write_text(config.to_yaml())
    assert load_config(str(tmp_path)).run.run_name == text


def test_texts_are_read_as_they_were_written() -> None:
    for text in TEXTS:
        if text.isprintable():
            content = {"a": text, "b": [text, [text]]}
            assert parse_yaml(format_yaml(content)) == content
            assert yaml.safe_load(format_yaml(content)) == content


@pytest.mark.parametrize(
    "value",
    [
        "!!timestamp x",
        "!!bool x",
        "!!int ''",
        "!!float x",
        "!!set [a]",
        f"0x{'f' * 4000}",
        "9" * 5000,
    ],
)
def test_a_number_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config("mixtral-tiny", [f"steps={value}"])
    assert len(check_message(caught.value)) < 300


@pytest.mark.parametrize(
    "model", ["x" * 300, f"/{'x' * 300}.yml", "~no-such-user/x.yml", "a/\0.yml"]
)
def test_a_model_that_cannot_be_there_is_refused(model: str) -> None:
    with pytest.raises(UserError) as caught:
        load_model(model)
    check_message(caught.value)


def test_more_layers_than_can_be_looked_at_are_refused() -> None:
    with pytest.raises(UserError, match="base_num_decoder_layers at least 1 and at most 4096"):
        load_config("mixtral-tiny", ["base_num_decoder_layers=100000000"])
