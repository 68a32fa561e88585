"""Read weights from a Hugging Face directory, and keep what is needed to write it again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_shard.autoep.head import TIE_KEY
from moe_shard.autoep.headers import TensorHeader
from moe_shard.autoep.manifest import (
    CARRIED,
    FAMILY,
    MANIFEST,
    Manifest,
    carried_in,
    copy_file,
    copy_small_files,
    save_carried,
)
from moe_shard.autoep.plain import is_quantized, plain_files
from moe_shard.autoep.strict_json import read_object
from moe_shard.autoep.tensor_plan import TensorPlan
from moe_shard.autoep.tensors import view, write
from moe_shard.errors import UserError
from moe_shard.files import expanded, new_folder, write_text

_CONFIG = "config.json"


@dataclass(frozen=True)
class HfSource:
    """Describe the content of a Hugging Face directory.

    Attributes:
        family: the family's name.
        plan: which tensor fills which parameter.
        headers: where the tensors are.
        attention_scale: the model's value of that key.
        cut: the content of `config.json` for the first layers alone; None: all are there.
    """

    family: str
    plan: TensorPlan
    headers: Mapping[str, TensorHeader]
    attention_scale: float = -1
    cut: Mapping[str, Any] | None = None


def read_hf_source(
    directory: Path,
    family: str = "",
    *,
    tied: bool | None = None,
    layers: int | None = None,
    outside: bool = False,
    ahead: int | None = None,
) -> HfSource:
    """Describe a Hugging Face directory; of its weights only embedding and head are read.

    Args:
        directory: a directory with config.json and safetensors files.
        family: name or file of its family; empty: the one that config.json names.
        tied: whether embedding and head are one parameter; None: their tensors decide.
        layers: number of layers, the rest being left out; None: all.
        outside: whether the weights' index may name files outside of the directory.
        ahead: layers of multi-token prediction that are read, see `detect`.

    Raises:
        UserError: its family is unknown, or something is missing.
    """
    # Imported here: copying files needs no family.
    from moe_shard.autoep.detect import detect

    found = detect(directory, family, tied, layers, outside, ahead)
    scale = found.settings.get("attention_scale", -1)
    return HfSource(found.family, found.plan, found.headers, scale, found.cut)


def keep_hf(
    source: str,
    folder: Path,
    family: str = "",
    layers: int | None = None,
    outside: bool = False,
    ahead: int | None = None,
) -> None:
    """Make `hf/` in a folder, once, so that its parameters can be exported.

    Args:
        source: source of its first parameters: a Hugging Face directory, an imported model, or a
            run. Nothing is kept of a run that started without one.
        folder: an imported model or a run, locked by this process.
        family: see `read_hf_source`.
        layers: see `read_hf_source`.
        outside: see `read_hf_source`; what lies there is exported beside the rest.
        ahead: see `read_hf_source`.

    Raises:
        UserError: the source cannot be read, or has a link to a file outside of it.
    """
    target, aside = folder / "hf", folder / ".hf.partial"
    directory = expanded(source)
    kept = directory / "hf"
    if target.exists() or not (kept.is_dir() or (directory / "config.json").is_file()):
        return
    shutil.rmtree(aside, ignore_errors=True)  # left by a process that was killed
    with new_folder(target, aside):
        if kept.is_dir():
            copy_small_files(kept, aside)
            for name in (MANIFEST, CARRIED, FAMILY):
                if (kept / name).is_file():
                    copy_file(kept / name, aside)
            return
        found = read_hf_source(directory, family, layers=layers, outside=outside, ahead=ahead)
        copy_small_files(directory, aside)
        save_carried(found.headers, found.plan.carried, aside)
        if found.cut is not None:
            write_text(aside / _CONFIG, _as_json(found.cut))
        elsewhere = any(entry.file.parent != directory for entry in found.headers.values())
        if found.cut is not None or elsewhere or is_quantized(found.headers):
            Manifest(found.family, plain_files(found.headers, aside)).save(aside)
        else:
            files = {entry.file for entry in found.headers.values()}
            Manifest.of(found.family, files).save(aside)
        if Path(family).suffix in {".yml", ".yaml"}:
            shutil.copyfile(family, aside / FAMILY)


def lay_out_again(
    hf: Path, directory: Path, *, tied: bool, ahead: int = 0, say: Callable[[str], object]
) -> HfSource:
    """Make a Hugging Face directory again, with zeros for the weights of parameters.

    Args:
        hf: the folder that `keep_hf` made.
        directory: an empty folder.
        tied: whether embedding and head are one parameter. Where they are two and `config.json`
            says that they are one, the directory's says that they are not: other readers would
            drop the head.
        ahead: layers of multi-token prediction among the parameters.
        say: receives a line on `tied`.

    Returns:
        A description of the directory; its headers tell where the weights go.

    Raises:
        UserError: `hf` is incomplete.
    """
    manifest = Manifest.load(hf)
    copy_small_files(hf, directory)
    manifest.make(directory)
    family = str(hf / FAMILY) if (hf / FAMILY).is_file() else manifest.family
    if not tied and (changed := untied(read_object(directory / _CONFIG))):
        write_text(directory / _CONFIG, _as_json(changed))
        say(f"{_CONFIG}: {TIE_KEY}=false, because the head is not the embedding")
    found = read_hf_source(directory, family, tied=tied, ahead=ahead)
    kept = carried_in(hf)
    for name in found.plan.carried:
        place = found.headers[name]
        if name not in kept or (kept[name].dtype, kept[name].shape) != (place.dtype, place.shape):
            raise UserError(
                f"{hf / CARRIED} lacks tensor {name}, {place.dtype} of shape {list(place.shape)}\n"
                "fix: import the Hugging Face directory again"
            )
        write(place, view(kept[name]))
    return found


def _as_json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def untied(config: dict[str, Any]) -> dict[str, Any] | None:
    """Return a `config.json` that ties nothing, in no section; None where it ties nothing.

    What it says itself counts for its sections too.
    """
    if config.get(TIE_KEY) is False:
        return None
    changed: dict[str, Any] = {}
    for name, value in config.items():
        if name == TIE_KEY and value is True:
            changed[name] = False
        elif isinstance(value, dict) and (inner := untied(value)):
            changed[name] = inner
    return config | changed if changed else None
