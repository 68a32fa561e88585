"""Start training from imported weights at every EP size, and export the result."""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from moe_shard.checkpoints.imported import export_model, import_model, load_params
from moe_shard.checkpoints.run_params import restore_params
from moe_shard.cli import command
from moe_shard.config import Config, load_config
from moe_shard.errors import UserError
from moe_shard.program.step import Program, TrainState, make_program
from moe_shard.training import run as running
from moe_shard.training.goodput import WallTime
from moe_shard.training.loop import Trainer
from moe_shard.training.run import run
from tests.autoep.checkpoints import (
    BF16,
    CARRIED,
    Checkpoint,
    detect,
    make_checkpoint,
    read_file,
)
from tests.autoep.test_transfer import assert_are, specs_on
from tests.models.build import QUICK, annotator, label, random_batch, small_config

F32 = np.dtype(np.float32)
FUSED = "prefuse_moe_weights=true"
KEYS = (
    "vocab_size=320",
    "learning_rate=0.01",
    "warmup_steps_fraction=0",
    "capacity_factor=-1",
    "dtype=float32",
)


@pytest.fixture(autouse=True)
def _families(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_shard.autoep.detect.detect", detect)


def console() -> Console:
    return Console(width=200, file=io.StringIO())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return make_checkpoint(tmp_path_factory.mktemp("hf") / "model", "fused", dtype=F32)


def first_state(config: Config) -> TrainState:
    trainer = object.__new__(Trainer)
    trainer.config, trainer.first, trainer.checkpointer = config, 0, None
    trainer.program = make_program(config, annotator(config))
    return trainer._first_state(console())


@functools.cache
def compiled(sizes: tuple[tuple[str, int], ...]) -> tuple[Program, jax.stages.Compiled]:
    config = small_config(dict(sizes), *KEYS)
    program = make_program(config, annotator(config))
    step = program.step.lower(program.abstract_state, program.abstract_batch).compile(QUICK)
    return program, step


def losses(sizes: dict[str, int], state: TrainState) -> list[float]:
    program, step = compiled(tuple(sizes.items()))
    found = []
    for seed in range(3):
        batch = jax.device_put(random_batch(seed=seed), program.batch_sharding)
        state, metrics = step(state, batch)
        found.append(float(metrics["loss"]))
    return found


@pytest.fixture(scope="module")
def expected(checkpoint: Checkpoint) -> list[float]:
    """Return the losses from the hand-made parameters, on a mesh without expert parallelism."""
    program, _ = compiled((("data", 8),))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), program.abstract_state)
    places = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state)
    state = jax.device_put(zeros._replace(params=checkpoint.params), places)
    return losses({"data": 8}, state)


@pytest.mark.parametrize(
    "sizes",
    [{"data": 8}, {"expert": 2, "fsdp": 4}, {"expert": 4, "fsdp": 2}, {"expert": 8}],
    ids=label,
)
def test_every_ep_size_has_the_same_losses(
    checkpoint: Checkpoint, expected: list[float], sizes: dict[str, int]
) -> None:
    path = f"load_parameters_path={checkpoint.directory}"
    config = small_config(sizes, *KEYS, path)
    state = first_state(config)
    program, _ = compiled(tuple(sizes.items()))
    assert_are(state.params, checkpoint.params, np.float32)
    places = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state)
    assert jax.tree.map(lambda array: array.sharding, state) == places
    # The optimizer is new: no step, no momentum.
    for leaf in jax.tree.leaves((state.step, state.opt_state)):
        assert not np.asarray(leaf).any()
    np.testing.assert_allclose(losses(sizes, state), expected, rtol=1e-5)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_bytes(b"weights in, weights out. " * 400)
    return path


def arguments(tmp_path: Path, *more: str) -> list[str]:
    quick = ("async_checkpointing=false", "enable_tensorboard=false", "run_name=run")
    places = (f"base_output_directory={tmp_path}", f"dataset_path={tmp_path / 'text'}")
    return [*KEYS, *quick, *places, *more]


@pytest.mark.usefixtures("text")
def test_import_train_export_import(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model, trained = tmp_path / "model", tmp_path / "run"
    config = small_config({"expert": 8}, *KEYS)
    import_model(checkpoint.directory, model, config, specs_on({"expert": 8}), console=console())
    # Tokens are bytes: the checkpoint's tokenizer.json is a file to copy, not a real tokenizer.
    keys = ("steps=2", "ici_expert_parallelism=4", "ici_fsdp_parallelism=2", FUSED)
    config = load_config(str(model), arguments(tmp_path, "tokenizer_path=", *keys))
    assert run(config).updates == 2
    export_model(trained, tmp_path / "exported", console=console())
    assert {path.name for path in (tmp_path / "exported").iterdir()} == {
        path.name for path in checkpoint.directory.iterdir()
    }

    specs = specs_on({"expert": 2, "fsdp": 4})
    abstract = jax.tree.map(lambda spec: spec.abstract(), specs)
    saved = jax.device_get(restore_params(trained / "checkpoints", abstract))
    assert_are(load_params(str(tmp_path / "exported"), specs), saved, np.float32)
    assert_are(load_params(str(trained), specs), saved, np.float32)
    moved = jax.tree.map(lambda a, b: np.any(a != b), saved, checkpoint.params)
    assert all(jax.tree.leaves(moved))
    for file in checkpoint.files:
        found, before = read_file(tmp_path / "exported" / file.name), read_file(file)
        for name in before.keys() & {*CARRIED}:
            np.testing.assert_array_equal(found[name], before[name])

    # A second start continues from the checkpoint, even if the imported parameters are gone.
    model.rename(tmp_path / "gone")
    config = load_config(str(trained / "config.yml"), ["steps=3"])
    assert config.run.load_parameters_path == str(model)
    program = make_program(config, annotator(config))
    with Trainer(config, program, trained, wall=WallTime(trained)) as trainer:
        assert trainer.first == 2


def test_parameters_that_are_not_there_are_missed_before_anything_is_compiled(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_step(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(running, "compile_step", compile_step)
    config = small_config({"expert": 8}, *arguments(tmp_path, f"load_parameters_path={text}"))
    with pytest.raises(UserError, match=r"holds no parameters(.|\n)*fix: "):
        run(config)


def run_here(name: str, *arguments: object) -> int:
    """Run a command in this process, so that its families are those of the test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_PLATFORMS", "cpu")
        return command(name)([str(each) for each in arguments])


def test_import_and_export(
    checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def load_model(model: str, overrides: list[str]) -> Config:
        assert model == str(checkpoint.directory)
        return small_config({"expert": 8}, *KEYS, *overrides)

    monkeypatch.setattr("moe_shard.checkpoints.resolve.load_model", load_model)
    model, again = tmp_path / "model", tmp_path / "again"
    assert run_here("import", checkpoint.directory, model, "weight_dtype=bfloat16") == 0
    told = capsys.readouterr().out
    assert "are float32 and rounded to bfloat16 here" in told
    assert f"python -m moe_shard.train {model}" in told
    assert load_config(str(model)).model.weight_dtype == "bfloat16"
    assert run_here("export", model, again) == 0
    assert f"exported: {again}" in capsys.readouterr().out
    for file in checkpoint.files:
        found = read_file(again / file.name)
        for name, tensor in read_file(file).items():
            # Carried tensors are copied unchanged, and a router is always in float32.
            kept = name in CARRIED or name.endswith("mlp.gate.weight")
            rounded = tensor if kept else tensor.astype(BF16).astype(F32)
            np.testing.assert_array_equal(found[name], rounded)
    with pytest.raises(UserError, match="not an empty folder"):
        run_here("export", model, again)
