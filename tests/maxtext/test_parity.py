"""Compare with MaxText: the same file, parameters and batch must give the same numbers.

MaxText makes the parameters, writes the checkpoints and computes its outputs in its own process
(`reference.py`), once for all tests. Here the same YAML, made small, and its checkpoint are read.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
import pytest
import yaml

from moe_shard.autoep.host_blocks import leaves_of
from moe_shard.checkpoints.imported import load_params
from moe_shard.checkpoints.resolve import load_model
from moe_shard.config import Config
from moe_shard.layers.rope import rope_frequencies
from moe_shard.models.params import AbstractModel, Params, describe
from moe_shard.program.step import TrainState, make_program
from tests.maxtext.cases import CASES, LENGTH, MAXTEXT, MOE, OURS, ROWS, UPDATES, VOCAB, Case
from tests.maxtext.written import RECORDED
from tests.models.build import QUICK, annotator

pytestmark = pytest.mark.maxtext

SPLIT = 24
"""Place in a row where its second document begins: where a chunk of Llama 4's does too. MaxText
cuts chunks by the place in the row, this package by that in the document."""


class Answers(NamedTuple):
    """Hold what MaxText wrote and computed for one model."""

    folder: Path
    found: dict[str, np.ndarray]


@pytest.fixture(scope="session")
def batch() -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(1).integers(0, VOCAB, (ROWS, LENGTH + 1)).astype(np.int32)
    places = np.arange(LENGTH, dtype=np.int32)
    second = places >= SPLIT
    rows = np.ones((ROWS, 1), np.int32)
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": rows * np.where(second, places - SPLIT, places),
        "segment_ids": rows * np.where(second, 2, 1).astype(np.int32),
    }


@pytest.fixture(scope="session")
def maxtext(
    tmp_path_factory: pytest.TempPathFactory, batch: dict[str, np.ndarray]
) -> dict[str, Answers]:
    folder = tmp_path_factory.mktemp("maxtext")
    np.savez(folder / "batch.npz", allow_pickle=False, **batch)
    cases = {
        name: {
            "keys": [
                f"model_name={case.model}",
                *(f"{key}={value}" for key, value in case.keys.items()),
                *MAXTEXT,
            ],
            "layouts": case.layouts,
            "updates": case.updates,
        }
        for name, case in CASES.items()
    }
    job = {"batch": str(folder / "batch.npz"), "out": str(folder), "cases": cases}
    (folder / "job.json").write_text(json.dumps(job))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "reference.py"), str(folder / "job.json")],
        # One device, and no optimisation of machine code that runs only five times.
        env=os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0", "PYTHONWARNINGS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return {
        name: Answers(folder / name, dict(np.load(folder / name / "answers.npz"))) for name in CASES
    }


def config_of(case: Case, folder: Path, experts: int) -> Config:
    """Load the model's own YAML with the small sizes in it, as a person would write them there."""
    package = importlib.util.find_spec("maxtext")
    assert package is not None
    assert package.submodule_search_locations
    models = Path(package.submodule_search_locations[0]) / "configs" / "models"
    written = yaml.safe_load((models / f"{case.model}.yml").read_text(encoding="utf-8"))
    written |= {key: yaml.safe_load(value) for key, value in case.keys.items()}
    file = folder / f"{case.model}.yml"
    file.write_text(yaml.safe_dump(written), encoding="utf-8")
    mesh = [f"ici_expert_parallelism={experts}", f"ici_fsdp_parallelism={8 // experts}"]
    return load_model(str(file), [*OURS, *mesh])


def read(
    config: Config, folder: Path, layout: str = "run"
) -> tuple[AbstractModel, Params, list[str]]:
    told: list[str] = []
    model = describe(config.model, annotator(config))
    path = str(folder / layout)
    return model, load_params(path, model.specs, model=config.model, say=told.append), told


def logits(config: Config, model: AbstractModel, params: Params, batch: Any) -> np.ndarray:
    axes = ("activation_batch", "activation_length")
    place = annotator(config).named_sharding("batch", axes, (ROWS, LENGTH))
    fields = {name: jax.device_put(array, place) for name, array in batch.items()}

    def forward(params: Params, batch: Any) -> Any:
        return model.apply(params)(batch["inputs"], batch["positions"], batch["segment_ids"])[0]

    compiled = jax.jit(forward).lower(params, fields).compile(QUICK)
    return np.asarray(compiled(params, fields))


def train(config: Config, params: Params, batch: Any) -> dict[str, np.ndarray]:
    """Return the metrics of updates by the training step, which donates the parameters."""
    program = make_program(config, annotator(config))
    fields = {
        name: jax.device_put(array[None], program.batch_sharding) for name, array in batch.items()
    }
    step, opt_state = program.init_rest(params)
    state = TrainState(step, params, opt_state)
    compiled = program.step.lower(program.abstract_state, program.abstract_batch).compile(QUICK)
    found = []
    for _ in range(UPDATES):
        state, metrics = compiled(state, fields)
        found.append({name: float(value) for name, value in metrics.items() if not value.ndim})
    return {name: np.array([each[name] for each in found]) for name in found[0]}


@pytest.mark.parametrize("experts", [1, 8])
@pytest.mark.parametrize("name", MOE)
def test_a_model_and_its_updates(
    maxtext: dict[str, Answers],
    batch: dict[str, np.ndarray],
    name: str,
    experts: int,
    record_property: Any,
) -> None:
    folder, theirs = maxtext[name]
    config = config_of(MOE[name], folder, experts)
    model, params, _ = read(config, folder)
    assert annotator(config).mesh.shape["expert"] == experts
    ours = {"logits": logits(config, model, params, batch)}
    metrics = train(config, params, batch)
    ours |= {"loss": metrics["loss"], "aux": metrics["aux_loss"], "norm": metrics["grad_norm"]}
    errors = {key: np.abs(ours[key] - theirs[key]) for key in ours}
    record_property("errors", {key: float(error.max()) for key, error in errors.items()})
    print(name, experts, {key: f"{error.max():.1e}" for key, error in errors.items()})
    assert errors["logits"].max() < 1e-4
    assert errors["loss"][0] < 1e-5
    assert errors["aux"][0] < 1e-5
    assert errors["loss"].max() < 1e-4
    assert errors["aux"].max() < 1e-4
    assert (errors["norm"] / theirs["norm"]).max() < 1e-4
    # The updates moved the loss by far more than what is compared.
    assert theirs["loss"][0] - theirs["loss"][-1] > 0.1
    assert theirs["aux"][0] > 5e-3


def test_a_model_without_experts(maxtext: dict[str, Answers], batch: dict[str, np.ndarray]) -> None:
    folder, theirs = maxtext["llama2"]
    config = config_of(CASES["llama2"], folder, 1)
    model, params, _ = read(config, folder)
    np.testing.assert_allclose(
        logits(config, model, params, batch), theirs["logits"], rtol=0, atol=1e-4
    )


@pytest.mark.parametrize(("name", "layout"), [("mixtral", "decode"), ("llama2", "params")])
def test_parameters_alone_are_those_of_the_state(
    maxtext: dict[str, Answers], name: str, layout: str
) -> None:
    folder = maxtext[name].folder
    config = config_of(CASES[name], folder, 8 if name == "mixtral" else 1)
    _, whole, _ = read(config, folder)
    _, alone, told = read(config, folder, layout)
    assert not any("optimizer" in line for line in told)
    for (path, ours), (_, there) in zip(leaves_of(whole), leaves_of(alone), strict=True):
        expected = np.asarray(ours)
        if layout == "decode":  # MaxText rounds them
            expected = expected.astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(np.asarray(there), expected, str(path))


@pytest.mark.parametrize("name", RECORDED)
def test_the_recorded_checkpoints_are_what_maxtext_writes(
    maxtext: dict[str, Answers], name: str
) -> None:
    tree = json.loads((maxtext[name].folder / "tree.json").read_text())
    assert {path: tree.get(path) for path in RECORDED[name]} == RECORDED[name]
    weights = {
        path
        for path in tree
        if not path.startswith(("opt_state", "step")) and "rngs" not in path.split("/")
    }
    assert weights <= RECORDED[name].keys()


@pytest.mark.parametrize("name", ["llama4-16e", "llama4-128e"])
def test_llama4_turns_by_maxtexts_frequencies(maxtext: dict[str, Answers], name: str) -> None:
    folder, theirs = maxtext[name]
    config = config_of(MOE[name], folder, 8).model.attention
    ours = rope_frequencies(config.rope, turned_dim=config.head_dim, length=LENGTH)
    found = [array for key, array in theirs.items() if key.startswith("timescale")]
    assert found
    for timescale in found:
        # In MaxText the two elements of a pair are adjacent.
        np.testing.assert_allclose(np.repeat(ours, 2), 1 / timescale, rtol=1e-6)
    stretched = config.rope.rope_max_timescale ** (
        -np.arange(0, config.head_dim, 2) / config.head_dim
    )
    assert np.allclose(ours, stretched) == (name == "llama4-128e")
