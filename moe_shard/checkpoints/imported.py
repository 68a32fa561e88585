"""Import and export models that were trained elsewhere.

An imported model is a folder: `config.yml`, the parameters in `params/`, and, if they came from a
Hugging Face directory, `hf/` with what is needed to write it again. It does not depend on the mesh.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental.multihost_utils import sync_global_devices
from rich.console import Console

from moe_shard.autoep.directory import keep_hf, lay_out_again, read_hf_source
from moe_shard.autoep.exporting import export_params
from moe_shard.autoep.head import HEAD_ROLE
from moe_shard.autoep.host_blocks import leaves_of
from moe_shard.autoep.importing import import_params
from moe_shard.autoep.not_a_model import refuse_foreign
from moe_shard.autoep.quantize import Method, quantize_directory
from moe_shard.autoep.rounding import Rounding
from moe_shard.checkpoints.adapters import (
    export_adapters,
    lora_of,
    merged_blocks,
    read_stored,
)
from moe_shard.checkpoints.checksums import CUSTOM_METADATA, committed_with_checksums
from moe_shard.checkpoints.convert import is_fused, other_layout, to_layout
from moe_shard.checkpoints.run_files import address_of, checkpoints_of, opened
from moe_shard.checkpoints.run_params import restore_params
from moe_shard.checkpoints.stored import open_stored
from moe_shard.config.load import STORED_DTYPE
from moe_shard.config.model_config import ModelConfig
from moe_shard.config.schema import Config
from moe_shard.errors import UserError
from moe_shard.files import expanded, new_folder, write_text
from moe_shard.maxtext.folders import ITEMS, find_items
from moe_shard.maxtext.read import read_params
from moe_shard.models.cycles import PREDICTION
from moe_shard.models.params import Params
from moe_shard.program.norms import require_finite
from moe_shard.terminal import bytes_line

_PARAMS, _HF_CONFIG = "params", "config.json"
_PROJECTION = (PREDICTION, "projection")  # stacked over the MTP layers
_CHUNK = 2**28
"""Bytes of an array that are written, and can be read, as one chunk."""


def load_params(
    path: str,
    specs: Params,
    *,
    model: ModelConfig | None = None,
    family: str = "",
    outside: bool = False,
    say: Callable[[str], object] | None = None,
    console: Console | None = None,
) -> Params:
    """Read a model's parameters, each device its own shards.

    Args:
        path: a Hugging Face directory, an imported model, a MaxText checkpoint, or a run of this
            package or of MaxText, whose newest checkpoint is read.
        specs: the parameters' specs: leaves with a shape, a dtype and a sharding.
        model: the model that has the parameters; needed only for MaxText and Hugging Face.
        family: family of a Hugging Face directory, as in `read_hf_source`.
        outside: see `read_hf_source`.
        say: receives lines on the source and on conversions; None: they are printed.
        console: shows the progress of reading; None: no progress is shown.

    Raises:
        UserError: the path is none of these, belongs to another model, or cannot be read.
    """
    console = console or Console(quiet=True)
    say = say or _plainly(console)
    folder = find_weights(path)
    wanted = jax.tree.map(_abstract, specs)
    if folder.name == "checkpoints":
        return restore_params(folder, wanted, say=say)
    say(f"of {path}")
    if folder.name == _PARAMS:
        with _fix("import the Hugging Face directory again, or change the keys back"):
            return restore_params(folder, wanted)
    stored = other_layout(wanted) if is_fused(wanted) else wanted
    if folder.name == ITEMS:
        say(f"MaxText checkpoint {folder}")
        assert model is not None, "a caller that accepts MaxText checkpoints knows the model"
        with bytes_line(console, "reading parameters") as line:
            params = read_params(folder, stored, model, say=say, progress=line)
        return to_layout(params, wanted)
    tied = model.logits_via_embedding if model else None
    layers = model.num_decoder_layers if model else None
    source = read_hf_source(
        folder.parent,
        family,
        tied=tied,
        layers=layers,
        outside=outside,
        ahead=model.mtp.mtp_num_layers if model else None,
    )
    if source.cut is not None:
        say(f"the first {layers} layers alone, as base_num_decoder_layers has it")
    _check_factor(folder.parent, source.attention_scale, model)
    with bytes_line(console, "reading parameters") as line:
        params = import_params(source.plan, source.headers, stored, say=say, progress=line)
    return to_layout(params, wanted)


def _check_factor(directory: Path, there: float, model: ModelConfig | None) -> None:
    """Refuse a model whose scores have another factor: it would scale queries wrongly.

    MaxText files of some models have attention_scale=1, with the factor in the queries' weights.
    """
    if model is not None and model.attention.attention_scale != there:
        raise UserError(
            f"{directory} is of attention_scale={there:g}, this model has "
            f"{model.attention.attention_scale:g}\n"
            f"fix: attention_scale={there:g} (a MaxText file of it then "
            "starts from these weights, and its queries take other steps than there)"
        )


def find_weights(path: str) -> Any:
    """Find what holds the weights in a folder: `checkpoints`, `params`, `items`, `config.json`.

    Raises:
        UserError: there is none of them.
    """
    folder = opened(path).resolve()
    if address_of(folder):
        return checkpoints_of(folder)
    if (items := find_items(folder)) is not None:
        return items
    for name in ("checkpoints", _PARAMS):
        if (folder / name).is_dir():
            return folder / name
    if (folder / _HF_CONFIG).is_file():
        return folder / _HF_CONFIG
    if folder.name == _HF_CONFIG and folder.is_file():
        raise UserError(
            f"{path} is the model without its weights\n"
            f"fix: a directory that has both: {_HF_CONFIG} and the safetensors files"
        )
    refuse_foreign(path)
    raise UserError(
        f"{path} holds no parameters: no config.json, params, checkpoints or items in it\n"
        "fix: a Hugging Face directory, an imported model, a run, or a MaxText checkpoint"
    )


def import_model(
    source: Path, target: Path, config: Config, specs: Params, *, family: str = "", console: Console
) -> None:
    """Import a model trained elsewhere into a folder, completely or not at all.

    Args:
        source: a Hugging Face directory or a MaxText checkpoint.
        target: the folder; new or empty.
        config: the resolved configuration of the model.
        specs: its parameters' specs on a mesh.
        family: see `read_hf_source`.
        console: shows the progress.

    Raises:
        UserError: the target is not empty or cannot be written, or the source cannot be read.
    """
    with written_aside(target) as folder:
        if jax.process_index() == 0:
            write_text(folder / "config.yml", _movable(config, source).to_yaml())
            outside = config.run.weights_outside_directory
            layers, ahead = config.model.num_decoder_layers, config.model.mtp.mtp_num_layers
            keep_hf(str(source), folder, family, layers, outside, ahead)
        params = load_params(
            str(source),
            specs,
            model=config.model,
            family=family,
            outside=config.run.weights_outside_directory,
            console=console,
        )
        require_finite(params, specs, str(source))
        with console.status("writing the parameters"), _manager(folder / _PARAMS) as manager:
            state = {"params": params}
            limits = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK), state)
            saved = ocp.args.PyTreeSave(state, save_args=limits)
            manager.save(
                0,
                args=ocp.args.Composite(state=saved),
                custom_metadata=CUSTOM_METADATA | {STORED_DTYPE: dtype_of(specs)},
            )
            manager.wait_until_finished()


def dtype_of(specs: Params) -> str:
    """Return the dtype of all parameters but routers, which are float32; float32 for several."""
    found = {np.dtype(leaf.dtype).name for path, leaf in leaves_of(specs) if "router" not in path}
    return found.pop() if len(found) == 1 else "float32"


def _movable(config: Config, source: Path) -> Config:
    """Return a configuration without paths, which `load_config` fills in wherever it lies."""
    run = dataclasses.replace(config.run, load_parameters_path="")
    data = config.data
    if data.tokenizer_path == str(source):
        data = dataclasses.replace(data, tokenizer_path="")
    return dataclasses.replace(config, run=run, data=data)


def export_model(
    source: str | Path,
    target: Path,
    *,
    console: Console,
    stochastic: int | None = None,
    quantize: Method | None = None,
    merge: bool = False,
) -> None:
    """Write the Hugging Face directory of an imported model, or of a run that began with one.

    Of a run with adapters, these are written in peft's format.

    The parameters are read a chunk at a time, which is a shard of the run that saved them, and are
    written directly into the files, without a device.

    Args:
        source: the folder, or the address of a run in a bucket, whose newest checkpoint is read.
        target: the directory; new or empty.
        console: shows the progress, and how many values were rounded to the checkpoint's dtypes.
        stochastic: seed of stochastic rounding; None: to nearest.
        quantize: format of few bits that the projections are then stored in; None: plain weights.
        merge: of a run with adapters, write the model with these added to its weights.

    Raises:
        UserError: the source does not come from a Hugging Face directory or cannot be read, or the
            target is not empty or cannot be written.
    """
    source = opened(source)
    weights = find_weights(str(source))
    if not (source / "hf").is_dir() or weights.name in (_HF_CONFIG, ITEMS):
        raise UserError(
            f"{source} has no folder hf: it did not begin with a Hugging Face model\n"
            "fix: an imported model, or a run with load_parameters_path= one"
        )
    with written_aside(target) as directory:
        stored = open_stored(weights, say=_plainly(console))
        tied = tuple(HEAD_ROLE.split(".")) not in stored.paths
        lora = read_stored(stored)
        if lora and not merge:
            if quantize is not None or stochastic is not None:
                raise UserError(
                    f"{source} has adapters, which are exported in float32\n"
                    "fix: --merge-adapters, to have them added to weights that are rounded"
                )
            export_adapters(source, directory, lora, tied=tied, say=console.print)
            return
        ahead = stored.leaves[_PROJECTION].shape[0] if _PROJECTION in stored.paths else 0
        layout = lay_out_again(source / "hf", directory, tied=tied, ahead=ahead, say=console.print)
        rounding = Rounding(stochastic)
        with bytes_line(console, "writing tensors") as line:
            blocks = merged_blocks(stored, lora, lora_of(source)) if lora else stored.blocks()
            export_params(layout.plan, layout.headers, blocks, rounding=rounding, progress=line)
        console.print(f"dtypes of the checkpoint: {rounding.line()}", markup=False, soft_wrap=True)
        if quantize is not None:
            with bytes_line(console, f"storing as {quantize}") as line:
                stored_as = quantize_directory(directory, layout.plan, quantize, progress=line)
            console.print(stored_as, markup=False, soft_wrap=True)


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """Create a folder on all processes together; it gets its name when the block ends.

    Args:
        target: the name; only an empty folder may have it already.

    Yields:
        `<target>.partial`.

    Raises:
        UserError: the name is in use, or the folder cannot be written.
    """
    target = expanded(target).absolute()
    aside = target.with_name(f"{target.name}.partial")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target} exists and is not an empty folder\nfix: another name")
    writer = jax.process_index() == 0
    try:
        with new_folder(target, aside) if writer else nullcontext():
            _meet(f"{target} begun")
            yield aside
            _meet(f"{target} written")
    except OSError as error:
        raise UserError(
            f"cannot write {target}: {error.strerror or error}; nothing of it was kept\n"
            "fix: a place with enough room that you may write to"
        ) from error


def _meet(where: str) -> None:
    """Wait for the other processes."""
    if jax.process_count() > 1:
        sync_global_devices(where)


def _manager(folder: Path) -> ocp.CheckpointManager:
    """Make a manager that stores parameters as a run stores its state; both are read alike."""
    return ocp.CheckpointManager(
        folder,
        options=ocp.CheckpointManagerOptions(
            enable_async_checkpointing=False,
            temporary_path_class=committed_with_checksums(lambda: ""),
        ),
        item_handlers={"state": ocp.PyTreeCheckpointHandler()},
    )


def _abstract(spec: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=spec.sharding)


def _plainly(console: Console) -> Callable[[str], object]:
    return lambda line: console.print(f"parameters: {line}", markup=False)


@contextmanager
def _fix(what: str) -> Iterator[None]:
    """Replace the fix in errors of a checkpoint, for one that does not belong to a run."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{str(error).splitlines()[0]}\nfix: {what}") from error
