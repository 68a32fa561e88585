"""Check what a restart says of changed settings, by kind, and that nothing is lost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from moe_shard.checkpoints.checkpoint import _SHAPING_KEYS
from moe_shard.cli import main
from moe_shard.config import Config, load_config
from moe_shard.config.load import base_settings
from moe_shard.errors import UserError
from moe_shard.training.changed_settings import (
    KIND_OF,
    Changes,
    Kind,
    batch_line,
    find_changes,
    keep_earlier,
)


def test_every_key_has_a_kind() -> None:
    assert set(KIND_OF) == set(base_settings()), "add the key to _KEYS of changed_settings.py"


def test_what_shapes_a_checkpoint_cannot_change() -> None:
    assert {key for key in _SHAPING_KEYS if KIND_OF[key] is not Kind.FIXED} == set()


def config_of(folder: Path, *overrides: str) -> Config:
    return load_config("mixtral-tiny", [f"base_output_directory={folder}", *overrides])


def restart(
    folder: Path, *overrides: str, first: Sequence[str] = (), checkpoint: bool = True
) -> Changes:
    run = folder / "mixtral-tiny"
    (run / "checkpoints" / "12").mkdir(parents=True) if checkpoint else run.mkdir()
    (run / "config.yml").write_text(config_of(folder, *first).to_yaml())
    changes = find_changes(run, config_of(folder, *overrides))
    assert changes
    return changes


def test_equal_settings_are_not_mentioned(tmp_path: Path) -> None:
    changes = restart(tmp_path)
    changes.require_possible(strict=True)
    assert list(changes.lines()) == []
    assert find_changes(tmp_path / "elsewhere", config_of(tmp_path)) is None


def test_changes_are_shown_by_kind(tmp_path: Path) -> None:
    changes = restart(
        tmp_path,
        *("learning_rate=0.5", "seed=3", "ici_expert_parallelism=4", "ici_data_parallelism=2"),
        *("muon_include_routers=true", "run_name=mixtral-tiny"),
    )
    changes.require_possible(strict=False)
    run, effect, free = changes.lines()
    assert run == "makes another run of it: seed 0 -> 3"
    assert effect.startswith("takes effect from here on: learning_rate ")
    assert effect.endswith(" -> 0.5")
    assert "ici_expert_parallelism" in free
    with pytest.raises(UserError, match=r"seed 0 -> 3 \(resume_strict=true\)"):
        changes.require_possible(strict=True)


def test_a_longer_run_stretches_its_schedule(tmp_path: Path) -> None:
    changes = restart(tmp_path, "steps=77", first=["steps=66"])
    changes.require_possible(strict=True)
    effect, schedule = changes.lines()
    assert effect == "takes effect from here on: steps 66 -> 77"
    assert "learning_rate_schedule_steps=-1" in schedule


@pytest.mark.parametrize(
    "override",
    [
        *("base_emb_dim=64", "vocab_size=512", "optimizer=sgd", "num_experts=16"),
        *("base_num_decoder_layers=6", "weight_dtype=bfloat16", "attention_type=mla"),
    ],
)
def test_what_cannot_change_is_refused_with_both_values(tmp_path: Path, override: str) -> None:
    key, _, value = override.partition("=")
    with pytest.raises(UserError) as caught:
        restart(tmp_path, override).require_possible(strict=False)
    what, fix = str(caught.value).splitlines()
    earlier = config_of(tmp_path).as_flat_dict()[key]
    assert f"{key} {earlier} -> {value}" in what
    assert f"fix: {key}={earlier}" in fix


def test_it_is_refused_before_jax_is_asked_for_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    restart(tmp_path)
    monkeypatch.setattr("moe_shard.training.run.run", lambda _: pytest.fail("it ran"))
    with pytest.raises(UserError, match="base_emb_dim 128 -> 64"):
        main(["train", "mixtral-tiny", f"base_output_directory={tmp_path}", "base_emb_dim=64"])


def test_without_a_checkpoint_anything_may_change(tmp_path: Path) -> None:
    changes = restart(tmp_path, "base_emb_dim=64", "seed=3", checkpoint=False)
    changes.require_possible(strict=True)
    (line,) = changes.lines()
    assert "without a checkpoint: " in line
    assert "base_emb_dim 128 -> 64" in line


def test_a_file_that_cannot_be_read_is_said_and_kept(tmp_path: Path) -> None:
    run = tmp_path / "mixtral-tiny"
    run.mkdir()
    (run / "config.yml").write_bytes(b"\xff\x00: [")
    changes = find_changes(run, config_of(tmp_path))
    assert changes
    changes.require_possible(strict=True)
    (line,) = changes.lines()
    assert "not a text file" in line
    kept = keep_earlier(run, "steps: 1\n")
    assert kept == run / "config.yml.1"
    assert kept.read_bytes() == b"\xff\x00: ["


def test_every_earlier_file_is_kept_once(tmp_path: Path) -> None:
    assert keep_earlier(tmp_path, "a: 1\n") is None
    for text, kept in [("a: 1\n", None), ("a: 2\n", "config.yml.1"), ("a: 3\n", "config.yml.2")]:
        found = keep_earlier(tmp_path, text)
        assert (found and found.name) == kept
        (tmp_path / "config.yml").write_text(text)
        assert keep_earlier(tmp_path, text) is None
    assert (tmp_path / "config.yml.1").read_text() == "a: 1\n"
    assert (tmp_path / "config.yml.2").read_text() == "a: 2\n"


def test_fewer_devices_make_another_batch(tmp_path: Path) -> None:
    restart(tmp_path)
    run = tmp_path / "mixtral-tiny"
    config = config_of(tmp_path, "num_simulated_devices=4")
    assert batch_line(run, config, 4) == ""  # nothing to compare with
    (run / "lowering.json").write_text(json.dumps({"num_devices": 8}))
    line = batch_line(run, config, 4)
    assert "sequences in an update 32 -> 16" in line
    assert "per_device_batch_size=8 keeps them" in line
    assert batch_line(run, config_of(tmp_path, "per_device_batch_size=8"), 4) == ""
