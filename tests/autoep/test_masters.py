"""Train from narrow checkpoints with float32 parameters, and export in the checkpoint's dtypes."""

from __future__ import annotations

import functools
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from rich.console import Console

from moe_shard.autoep.directory import keep_hf
from moe_shard.autoep.rounding import Rounding
from moe_shard.checkpoints.checkpoint import Checkpointer
from moe_shard.checkpoints.imported import export_model, import_model
from moe_shard.checkpoints.resolve import load_model
from moe_shard.config import Config
from moe_shard.inference.loading import find_source, load_generation_config
from moe_shard.models.params import describe
from moe_shard.program.step import Program, TrainState, make_program
from moe_shard.training.changed_settings import keep_weight_dtype
from moe_shard.training.loop import Trainer
from moe_shard.training.state_memory import state_lines
from tests.autoep.checkpoints import BF16, Tensors, read_file, write_file
from tests.autoep.directory import small_models
from tests.models.build import QUICK, annotator, random_batch

F32 = np.dtype(np.float32)
SMALL = small_models()["mixtral-0"]
STEPS = 3
ROUTER = "block_sparse_moe.gate"
KEYS = (
    *("num_simulated_devices=8", "ici_fsdp_parallelism=4", "ici_data_parallelism=2"),
    *("per_device_batch_size=1", "max_target_length=16", "warmup_steps_fraction=0"),
    *("dtype=bfloat16", "learning_rate=1e-5", "async_checkpointing=false"),
    *("moe_dispatch=gather", "remat_policy=none", "ici_expert_parallelism=1"),
)


def quiet() -> Console:
    return Console(width=200, file=io.StringIO())


@functools.cache
def weights() -> Tensors:
    """Make weights that bfloat16 holds."""
    rng = np.random.default_rng(3)
    return {
        name: (rng.standard_normal(shape) / math.sqrt(shape[-1])).astype(BF16)
        for name, shape in SMALL["saved"].items()
    }


def write(directory: Path, dtype: np.dtype[Any] = BF16, *, router: np.dtype[Any] = BF16) -> Path:
    """Write the model in a dtype."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(SMALL["config"]))
    tensors = {
        name: value.astype(router if ROUTER in name else dtype) for name, value in weights().items()
    }
    write_file(directory / "model.safetensors", tensors)
    return directory


def load(directory: Path, *overrides: str) -> Config:
    return load_model(str(directory), [*KEYS, *overrides])


@functools.cache
def compiled(path: Path, dtype: str) -> tuple[Program, jax.stages.Compiled]:
    config = load(path, f"weight_dtype={dtype}")
    program = make_program(config, annotator(config))
    step = program.step.lower(program.abstract_state, program.abstract_batch).compile(QUICK)
    return program, step


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("hf") / "bf16")


def first_state(config: Config, program: Program) -> TrainState:
    trainer = object.__new__(Trainer)
    trainer.config, trainer.first, trainer.checkpointer = config, 0, None
    trainer.program = program
    return trainer._first_state(quiet())


def train(narrow: Path, config: Config, state: TrainState) -> TrainState:
    program, step = compiled(narrow, config.model.weight_dtype)
    for seed in range(STEPS):
        batch = random_batch(vocab=SMALL["config"]["vocab_size"], seed=seed)
        state, _ = step(state, jax.device_put(batch, program.batch_sharding))
    return state


def matrices(state: TrainState) -> list[np.ndarray]:
    return [np.asarray(x).astype(np.float64) for x in jax.tree.leaves(state.params) if x.ndim > 2]


def moved(narrow: Path, config: Config) -> float:
    """Count, in NumPy, the share of the elements of matrices that steps of AdamW change."""
    state = first_state(config, compiled(narrow, config.model.weight_dtype)[0])
    before = matrices(state)
    after = matrices(train(narrow, config, state))
    count = sum(np.count_nonzero(a != b) for a, b in zip(before, after, strict=True))
    return count / sum(a.size for a in before)


def test_as_many_weights_move_as_from_a_float32_checkpoint(narrow: Path, tmp_path: Path) -> None:
    wide = load(write(tmp_path / "f32", F32))
    by_default = load(narrow)
    assert (by_default.model.weight_dtype, by_default.stored_dtype) == ("float32", "bfloat16")
    expected = moved(narrow, wide)
    assert expected > 0.8
    assert moved(narrow, by_default) == expected
    on_request = load(narrow, "weight_dtype=bfloat16")
    assert (on_request.model.weight_dtype, on_request.stored_dtype) == ("bfloat16", "")
    assert moved(narrow, on_request) < 0.5 * expected


@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float16)], ids=str)
def test_any_narrow_dtype_is_computed_in_and_trained_in_float32(
    tmp_path: Path, dtype: np.dtype[Any]
) -> None:
    config = load_model(str(write(tmp_path / "model", dtype)))
    assert (config.model.dtype, config.model.weight_dtype) == (dtype.name, "float32")
    assert config.stored_dtype == dtype.name
    assert load_generation_config(find_source(str(tmp_path / "model")), []).model.weight_dtype == (
        dtype.name
    )


def test_what_a_device_holds_is_said_before_step_0(narrow: Path) -> None:
    config = load(narrow)
    program, _ = compiled(narrow, "float32")
    here, there = (size_of(compiled(narrow, each)[0]) for each in ("float32", "bfloat16"))
    (line,) = state_lines(config, program)
    assert line == (
        f"state on each device: parameters {here[0]} (float32), adamw {here[1]} (float32); with "
        f"weight_dtype=bfloat16: parameters {there[0]} (bfloat16, float32), "
        f"adamw {there[1]} (bfloat16, float32)"
    )
    config = load(narrow, "weight_dtype=bfloat16")
    line, lost = state_lines(config, compiled(narrow, "bfloat16")[0])
    assert f"parameters {there[0]} (bfloat16, float32)" in line
    assert f"with weight_dtype=float32: parameters {here[0]} (float32)" in line
    assert "below 1/512 of a weight is lost; weight_dtype=float32 keeps it" in lost


def size_of(program: Program) -> tuple[str, str]:
    """Add up the shards of one device, by their indices."""
    (device, *_) = program.batch_sharding.mesh.devices.flat

    def of(tree: Any) -> str:
        total = 0
        for leaf in jax.tree.leaves(tree):
            index = leaf.sharding.devices_indices_map(leaf.shape)[device]
            shape = [
                len(range(*each.indices(n))) for each, n in zip(index, leaf.shape, strict=True)
            ]
            total += math.prod(shape) * np.dtype(leaf.dtype).itemsize if leaf.ndim else 0
        return f"{total / 1000:.1f} kB"

    return of(program.abstract_state.params), of(program.abstract_state.opt_state)


def test_saved_resumed_and_exported_it_has_the_checkpoints_dtypes(
    narrow: Path, tmp_path: Path
) -> None:
    config, run = load(narrow), tmp_path / "run"
    run.mkdir()
    keep_hf(str(narrow), run)
    (run / "config.yml").write_text(config.to_yaml())
    program, _ = compiled(narrow, "float32")
    checkpointer = Checkpointer(run / "checkpoints", config)
    checkpointer.save(train(narrow, config, first_state(config, program)), updates=STEPS)
    checkpointer.close()
    # A resumed run has no checkpoint to begin with, and so does not know its dtype.
    again = load_model(str(run / "config.yml"), ["async_checkpointing=false"])
    checkpointer = Checkpointer(run / "checkpoints", again)
    checkpointer.check_fits(STEPS)
    state = checkpointer.restore(STEPS, program.abstract_state)
    state = train(narrow, again, state)
    checkpointer.save(state, updates=2 * STEPS)
    trained = jax.device_get(state.params)
    checkpointer.close()
    assert {x.dtype for x in jax.tree.leaves(trained)} == {F32}

    console = quiet()
    for name, seed in (("near", None), ("one", 1), ("again", 1), ("two", 2)):
        export_model(run, tmp_path / name, console=console, stochastic=seed)
    found = {
        name: read_file(tmp_path / name / "model.safetensors")
        for name in ("near", "one", "again", "two")
    }
    table = trained["embedding"]["table"]
    exact, near = found["near"].keys(), found["near"]["model.embed_tokens.weight"]
    assert exact == weights().keys()
    for tensors in found.values():
        assert {tensor.dtype for tensor in tensors.values()} == {BF16}
    np.testing.assert_array_equal(near, table.astype(BF16))
    changed = sum(
        int(np.count_nonzero(x.astype(BF16).astype(F32) != x)) for x in jax.tree.leaves(trained)
    )
    values = sum(x.size for x in jax.tree.leaves(trained))
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"{changed:,} of {values:,} values were rounded to bfloat16, to nearest" in said
    assert "stochastically, from seed 1" in said
    for name in exact:
        np.testing.assert_array_equal(found["one"][name], found["again"][name])
    one = found["one"]["model.embed_tokens.weight"]
    assert np.any(one != near)
    assert np.any(one != found["two"]["model.embed_tokens.weight"])
    assert np.all(np.abs(one.astype(F32) - table) < 2.0**-7 * np.abs(table))  # a neighbour


def test_import_then_export_is_the_same_to_the_bit(narrow: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "mixed", router=F32)
    config = load(source)
    console = quiet()
    specs = describe(config.as_stored().model, annotator(config)).specs
    import_model(source, tmp_path / "model", config, specs, console=console)
    export_model(tmp_path / "model", tmp_path / "again", console=console, stochastic=0)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (source / name).read_bytes()
    assert "no value had to be rounded" in console.file.getvalue()  # type: ignore[attr-defined]
    # The folder's weights are as narrow as they were, and train as wide.
    imported = load(tmp_path / "model")
    assert (imported.model.weight_dtype, imported.stored_dtype) == ("float32", "bfloat16")
    program, _ = compiled(narrow, "float32")
    for one, other in zip(
        jax.tree.leaves(first_state(imported, program).params),
        jax.tree.leaves(first_state(load(narrow), program).params),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
    generation = load_generation_config(find_source(str(tmp_path / "model")), [])
    assert generation.model.weight_dtype == "bfloat16"
    asked = load(tmp_path / "model", "weight_dtype=float16")
    assert (asked.model.weight_dtype, asked.stored_dtype) == ("float16", "")


@pytest.mark.parametrize("has_checkpoint", [True, False])
def test_a_run_that_began_in_bfloat16_goes_on_in_it(
    narrow: Path, tmp_path: Path, has_checkpoint: bool
) -> None:
    place = (f"base_output_directory={tmp_path}", "run_name=old")
    begun = load(narrow, *place, "weight_dtype=bfloat16")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.yml").write_text(begun.to_yaml())
    if has_checkpoint:
        (tmp_path / "old" / "checkpoints" / "7").mkdir(parents=True)
    config = keep_weight_dtype(load(narrow, *place))
    assert config.model.weight_dtype == ("bfloat16" if has_checkpoint else "float32")
    said = [line for line in config.warnings if "parameters stay in bfloat16" in line]
    assert len(said) == has_checkpoint
    # What is asked for is not replaced; what cannot change is refused by `refuse_impossible`.
    asked = load(narrow, *place, "weight_dtype=float32")
    assert keep_weight_dtype(asked) == asked
    other = load(narrow, *place[:1], "run_name=new")
    assert keep_weight_dtype(other) == replace(other)


@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float16)], ids=str)
def test_stochastic_rounding_keeps_the_mean_wherever_it_is_cut(dtype: np.dtype[Any]) -> None:
    rng = np.random.default_rng(0)
    values = (rng.standard_normal((6, 40, 50)) * np.exp(rng.uniform(-12, 3, 50))).astype(F32)
    values[0, 0, :3] = 0, -0.0, np.float32(ml_dtypes.finfo(dtype).max)
    shape, whole = values.shape, tuple((0, size) for size in values.shape)

    def to(seed: int, at: tuple[int, int, int]) -> np.ndarray:
        bounds = tuple((low, high) for low, (_, high) in zip(at, whole, strict=True))
        part = values[tuple(slice(low, None) for low in at)]
        return Rounding(seed).to(part, dtype, param=("p",), index=(), bounds=bounds, shape=shape)

    one = to(1, (0, 0, 0))
    np.testing.assert_array_equal(to(1, (2, 11, 7)), one[2:, 11:, 7:])
    by_layer = Rounding(1).to(
        values[4], dtype, param=("p",), index=(4,), bounds=whole[1:], shape=shape
    )
    np.testing.assert_array_equal(by_layer, one[4])
    # Each is one of the two numbers around the value, and the mean over many seeds is the value.
    with np.errstate(over="ignore"):
        below, above = (
            np.nextafter(values.astype(dtype), np.asarray(side, dtype)).astype(np.float64)
            for side in (-np.inf, np.inf)
        )
    many = np.stack([to(seed, (0, 0, 0)).astype(np.float64) for seed in range(200)])
    with np.errstate(invalid="ignore"):
        assert np.all((many >= below) & (many <= above))
        gap = np.where(np.isfinite(above - below), above - below, 0)
    error = np.abs(many.mean(0) - values)
    # Six standard deviations of a mean of 200 draws between two numbers, at most half a gap apart.
    assert np.all(error <= 6 * gap / 2 / np.sqrt(200) / 2 + 1e-30)
    nearest = np.abs(values.astype(dtype).astype(np.float64) - values)
    assert error.sum() < 0.4 * nearest.sum()
