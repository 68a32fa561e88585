"""Begin a run with adapters beside the weights, and export them alone or merged."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moe_shard.autoep.adapter_files import (
    Adapters,
    adapter_paths,
    merged_weight,
    plan_adapters,
    read_adapters,
    write_adapters,
)
from moe_shard.autoep.directory import lay_out_again, read_hf_source
from moe_shard.autoep.family import load_family
from moe_shard.autoep.host_blocks import HostBlock, leaves_of
from moe_shard.checkpoints.stored import Stored
from moe_shard.config.lora_config import LoraConfig
from moe_shard.config.schema import Config
from moe_shard.config.strict_yaml import read_mapping
from moe_shard.data.corpus import Say
from moe_shard.errors import UserError
from moe_shard.files import expanded
from moe_shard.models.params import AbstractModel, Params
from moe_shard.program.trainable import ADAPTERS, Trainable


def split_adapters(model: AbstractModel) -> Trainable:
    """Return what tells a model's adapters from the rest."""
    return Trainable((ADAPTERS,), model.specs)


def first_adapters(config: Config, model: AbstractModel, base: Params, *, say: Say) -> Params:
    """Add the first adapters to the weights of a model.

    Args:
        config: the seed, and `lora_restore_path`.
        model: the model with adapters.
        base: its parameters without them.
        say: receives a line on what was read.

    Returns:
        All parameters.

    Raises:
        UserError: `lora_restore_path` holds adapters of another model.
    """
    split = split_adapters(model)
    specs = split.of(model.specs)
    places = jax.tree.map(lambda spec: spec.sharding, specs)
    key = jax.random.key(config.train.seed)
    drawn = jax.jit(lambda key: split.of(model.init(key)), out_shardings=places)(key)
    lora = config.model.lora
    if lora.lora_restore_path:
        values = {path: np.zeros(spec.shape, np.float32) for path, spec in leaves_of(specs)}
        run = config.run
        source = expanded(run.load_parameters_path)
        if not (source / "config.json").is_file():
            raise UserError(
                f"lora_restore_path with load_parameters_path={source}: the names of its tensors "
                "are those of a Hugging Face directory\nfix: load_parameters_path=that directory"
            )
        outside, layers = run.weights_outside_directory, config.model.num_decoder_layers
        found = read_hf_source(source, run.hf_family, layers=layers, outside=outside)
        family = load_family(run.hf_family or found.family)
        plan = plan_adapters(found.plan, frozenset(values), family)
        say(read_adapters(expanded(lora.lora_restore_path), plan, values, lora))
        drawn = _placed(values, specs)
    return split.into(drawn, base)


def _placed(values: Adapters, specs: Params) -> Params:
    def place(path: Any, spec: Any) -> jax.Array:
        whole = values[tuple(key.key for key in path)]
        return jax.make_array_from_callback(spec.shape, spec.sharding, whole.__getitem__)

    placed: Params = jax.tree_util.tree_map_with_path(place, specs)
    return placed


def read_stored(stored: Stored) -> dict[Any, np.ndarray]:
    """Read the adapters of a checkpoint; none where it has none."""
    names = frozenset(adapter_paths(stored.paths))
    found: dict[Any, np.ndarray] = {}
    if not names:
        return found
    some = Stored(stored.checkpoint, {path: stored.leaves[path] for path in names})
    for block in some.blocks():
        whole = found.setdefault(block.param, np.zeros(block.shape, np.float32))
        whole[tuple(slice(*bound) for bound in block.bounds)] = block.values
    return found


def lora_of(folder: Path) -> LoraConfig:
    """Return what the configuration of a run says of its adapters."""
    settings = read_mapping(folder / "config.yml")
    return LoraConfig(
        enable_lora=True,
        lora_rank=int(settings["lora_rank"]),
        lora_alpha=float(settings["lora_alpha"]),
    )


def merged_blocks(stored: Stored, adapters: Adapters, lora: LoraConfig) -> Iterator[HostBlock]:
    """Yield the weights of a checkpoint with what their adapters add to them."""
    rest = Stored(
        stored.checkpoint,
        {path: leaf for path, leaf in stored.leaves.items() if path not in adapters},
    )
    for block in rest.blocks():
        delta = merged_weight(adapters, block.param, block.bounds, lora.scale)
        if delta is None:
            yield block
        else:
            yield block._replace(values=block.values.astype(np.float32) + delta)


def export_adapters(
    source: Path, directory: Path, adapters: Adapters, *, tied: bool, say: Say
) -> None:
    """Write the adapters of a run in peft's format.

    Args:
        source: folder of the run.
        directory: where.
        adapters: its adapters.
        tied: whether embedding and head are one parameter.
        say: receives a line on what was written.

    Raises:
        UserError: a matrix that has an adapter is no module in transformers.
    """
    settings = read_mapping(source / "config.yml")
    # The plan needs the headers of a directory; the weights in this one are holes.
    with tempfile.TemporaryDirectory(dir=directory) as aside:
        layout = lay_out_again(source / "hf", Path(aside), tied=tied, say=lambda _: None)
        family = source / "hf" / "family.yml"
        found = load_family(str(family) if family.is_file() else layout.family)
        plan = plan_adapters(layout.plan, frozenset(adapters), found)
    base = str(settings.get("load_parameters_path") or "")
    write_adapters(directory, plan, adapters, lora_of(source), base=base)
    say(f"adapters: {len(plan.tensors):,} tensors; --merge-adapters writes the whole model")
