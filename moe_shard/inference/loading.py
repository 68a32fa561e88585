"""Load the configuration and the parameters that MODEL or CHECKPOINT names."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from moe_shard.checkpoints.bucket import is_address
from moe_shard.checkpoints.imported import load_params
from moe_shard.checkpoints.resolve import load_model
from moe_shard.checkpoints.run_files import address_of, checkpoints_of, opened
from moe_shard.checkpoints.run_params import restore_params
from moe_shard.config import Config, list_models
from moe_shard.errors import UserError
from moe_shard.files import expanded
from moe_shard.models.params import AbstractModel, Params

SETTINGS = (
    "moe_dispatch=ragged",
    "capacity_factor=-1",
    "ragged_buffer_factor=-1",
    "num_moe_token_chunks=1",
    "prefuse_moe_weights=true",
    "per_device_batch_size=1",
)
"""Settings of generation, whatever the model was trained with; the command line overrides them.

Dropped tokens would make a text depend on the others in its batch. Gate and up are fused into one
product when the parameters are loaded. The batch size follows from the prompts.
"""

_OF_RUN = re.compile(r"(?P<run>.+)/checkpoints(/(?P<updates>\d{1,18}))?/?")


@dataclass(frozen=True)
class ModelSource:
    """Name a model to generate with.

    Attributes:
        model: argument of `load_model`.
        checkpoints: path of a run's checkpoints, also in a bucket; None if MODEL is no run.
        updates: number of updates that names the checkpoint; None for the newest.
    """

    model: str
    checkpoints: Any = None
    updates: int | None = None


def find_source(model: str) -> ModelSource:
    """Resolve MODEL: the folder of a run, one of its checkpoints, or another model.

    Raises:
        UserError: the directory holds no model.
    """
    if is_address(model) or address_of(expanded(model)):
        return _in_bucket(model)
    path = expanded(model)
    of_run = path.parent.name == "checkpoints" and path.name.isdecimal() and path.parent.is_dir()
    if model in list_models() or not (of_run or path.is_dir()) or _holds_a_model(path):
        return ModelSource(model)
    run = path.resolve()
    updates = int(path.name) if of_run else None
    if of_run:
        run = run.parent.parent
    elif run.name == "checkpoints":
        run = run.parent
    if not (run / "config.yml").is_file():
        raise UserError(
            f"{model} holds no model: no config.json and no config.yml in it\n"
            "fix: a Hugging Face directory, an imported model, or the folder of a run"
        )
    if not (run / "checkpoints").is_dir():
        raise UserError(
            f"{model} is a run without checkpoints\n"
            "fix: train with enable_checkpointing=true; its config.yml alone has random parameters"
        )
    return ModelSource(str(run / "config.yml"), run / "checkpoints", updates)


def _in_bucket(model: str) -> ModelSource:
    """Resolve the address of a run or of one of its checkpoints, or a run's folder here.

    Raises:
        UserError: there is no such run, or it cannot be reached.
    """
    found = _OF_RUN.fullmatch(model) if is_address(model) else None
    run = opened(found["run"] if found else model)
    updates = int(found["updates"]) if found and found["updates"] else None
    return ModelSource(str(run / "config.yml"), checkpoints_of(run), updates)


def _holds_a_model(path: Path) -> bool:
    """Tell whether a directory is a Hugging Face model or an imported one."""
    return (path / "config.json").is_file() or (path / "params").is_dir()


def load_generation_config(source: ModelSource, overrides: Sequence[str]) -> Config:
    """Load the configuration to generate with.

    Args:
        source: result of `find_source`.
        overrides: `key=value` arguments.

    Raises:
        UserError: see `load_model`; or the configuration drops tokens.
    """
    # Wider parameters would take more memory and hold the same numbers.
    config = load_model(source.model, [*SETTINGS, *overrides]).as_stored()
    config.require_built()
    moe = config.model.moe
    if moe is not None:
        limits = {
            "capacity_factor": moe.capacity_factor,
            "ragged_buffer_factor": moe.ragged_buffer_factor,
        }
        for key, value in limits.items():
            if value > 0:
                raise UserError(
                    f"{key}={value:g} drops tokens, so that a text depends on others of its batch\n"
                    f"fix: leave {key} out; generation drops nothing by default"
                )
    return config


def load_parameters(
    source: ModelSource,
    config: Config,
    model: AbstractModel,
    *,
    say: Callable[[str], object],
    console: Console,
) -> Params:
    """Load the parameters, sharded as the model's specs.

    Args:
        source: result of `find_source`.
        config: result of `load_generation_config`.
        model: the model, described for a mesh.
        say: receives a line that names their source.
        console: shows the progress of reading.

    Raises:
        UserError: the parameters cannot be read.
    """
    if source.checkpoints is not None:
        abstract = jax.tree.map(lambda spec: spec.abstract(), model.specs)
        return restore_params(source.checkpoints, abstract, updates=source.updates, say=say)
    run = config.run
    if run.load_parameters_path:
        path = run.load_parameters_path
        specs, family = model.specs, run.hf_family
        return load_params(
            path,
            specs,
            model=config.model,
            family=family,
            outside=run.weights_outside_directory,
            say=say,
            console=console,
        )
    say(f"random, drawn from seed={config.train.seed}: {run.model_name} names no checkpoint")
    places = jax.tree.map(lambda spec: spec.sharding, model.specs)
    params: Params = jax.jit(model.init, out_shardings=places)(jax.random.key(config.train.seed))
    return params
