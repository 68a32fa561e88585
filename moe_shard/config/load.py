"""Load a `Config` from a model's name and `key=value`: base.yml, then the model, then arguments.

`overlays.py` lays each source over the one before and keeps the types of base.yml; the frozen
dataclasses of `schema.py` check the result. A MaxText file is read as it is (see `maxtext.py`).
"""

from __future__ import annotations

import difflib
import functools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from moe_shard.config.attention_config import AttentionConfig, RopeConfig
from moe_shard.config.delta_config import DeltaConfig
from moe_shard.config.eval_config import EvalConfig
from moe_shard.config.foreign_keys import sift
from moe_shard.config.generate_config import GenerateConfig
from moe_shard.config.keys import leaf_keys, shown
from moe_shard.config.local_config import LocalConfig
from moe_shard.config.lora_config import LoraConfig
from moe_shard.config.mamba_config import MambaConfig, ShortConvConfig
from moe_shard.config.maxtext import is_maxtext, read_run, why_tokens_cannot_move
from moe_shard.config.maxtext_keys import MaxTextKeys, read_maxtext_keys
from moe_shard.config.model_config import DType, GatingConfig, ModelConfig
from moe_shard.config.moe_config import MoEConfig, RouterConfig
from moe_shard.config.mtp_config import MTPConfig
from moe_shard.config.overlays import COMMAND_LINE, Overlay, lay_over, parse_overrides, short_name
from moe_shard.config.remat_config import RematConfig
from moe_shard.config.schema import Config, DataConfig, RunConfig, TrainConfig
from moe_shard.config.strategies import find_strategy
from moe_shard.config.strict_yaml import read_mapping
from moe_shard.config.tables import build_mesh, read_rules_file
from moe_shard.errors import UserError
from moe_shard.files import read_small

T = TypeVar("T")

LOADER_KEYS = ("custom_mesh_and_rule", "override_logical_axis_rules")
"""Keys of `base.yml` that steer loading; `MeshConfig` holds what results from them."""

STORED_DTYPE = "weights"
"""What names, in the metadata of an imported model's parameters, the dtype that they are in."""


@functools.cache
def configs_dir() -> Path:
    """Return the directory with `base.yml`.

    It is `configs/` inside an installed package, and next to the package in a checkout.

    Raises:
        UserError: it is in neither place.
    """
    package = Path(__file__).resolve().parents[1]
    for place in (package / "configs", package.parent / "configs"):
        if (place / "base.yml").is_file() and (place / "rules").is_dir():
            return place
    raise UserError(
        "configs/base.yml is missing: the package is not whole\n"
        "fix: install it again, or run from a clone of the repository"
    )


def list_models() -> list[str]:
    """List the names that MODEL may take besides a path, sorted."""
    return list_names("models")


def load_config(model: str, overrides: Sequence[str] = ()) -> Config:
    """Load one run's configuration.

    >>> import moe_shard as ms
    >>> config = ms.load_config("mixtral-8x7b", ["capacity_factor=1.25"])
    >>> config.model.moe.num_experts, config.model.moe.capacity_factor, config.model.emb_dim
    (8, 1.25, 4096)

    Args:
        model: a name in `configs/models/`, the path of a YAML file, or the folder of an imported
            model.
        overrides: `key=value` arguments, which override all else.

    Raises:
        UserError: anything that a person got wrong, with the fix, in at most three lines.
    """
    path = find_file("models", model, "MODEL")
    written, base, known = read_mapping(path), base_settings(), maxtext_keys()
    if is_maxtext(written, base, known):
        arguments = parse_overrides(overrides, {**known.defaults, **base})
        overlays, name = read_run(path, written, arguments, base, known)
        by_file = not any("moe_dispatch" in overlay.values for overlay in overlays[1:])
        return _assemble(overlays, name=name, may_settle_dispatch=by_file)
    if path.name == "base.yml" and set(base) <= set(written):
        # MaxText's form of a command, with our base.yml: the model is the one that it names.
        arguments = parse_overrides(overrides, base)
        named = arguments.get("model_name", written["model_name"])
        if named not in {"", "default"}:
            find_file("models", named, "model_name")
            rest = [each for each in overrides if each.partition("=")[0].strip() != "model_name"]
            return load_config(named, rest)
    overlay = sift(short_name(path), written, base, known)
    if not (path.parent / "params").is_dir():
        return load_settings(overlay, overrides, name=path.stem)
    _complete_imported(overlay.values, path.parent.resolve())
    config = load_settings(overlay, overrides, name=path.stem)
    asked = "weight_dtype" in parse_overrides(overrides, base)
    return config if asked else replace(config, stored_dtype=_stored_dtype(path.parent))


def _complete_imported(values: dict[str, Any], folder: Path) -> None:
    """Fill in the paths of an imported model's parts; it records none, as it may be moved."""
    if not values.get("load_parameters_path"):
        values["load_parameters_path"] = str(folder)
    if not values.get("tokenizer_path") and (folder / "hf").is_dir():
        values["tokenizer_path"] = str(folder / "hf")


def _stored_dtype(folder: Path) -> DType | Literal[""]:
    """Return the dtype that an imported model's weights are stored in; empty where it is untold."""
    try:
        text = read_small(folder / "params" / "0" / "_CHECKPOINT_METADATA")
        found = json.loads(text)["custom_metadata"][STORED_DTYPE]
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return ""
    return next((dtype for dtype in get_args(DType) if dtype == found), "")


def load_settings(overlay: Overlay, overrides: Sequence[str] = (), *, name: str) -> Config:
    """Lay a model's settings over `base.yml`, and arguments over both.

    Args:
        overlay: the model's settings, whatever their source.
        overrides: `key=value` arguments, which override all else.
        name: the model's name, where `model_name` is not among the settings.

    Raises:
        UserError: as `load_config`.
    """
    base, known = base_settings(), maxtext_keys()
    arguments = parse_overrides(overrides, {**known.defaults, **base})
    return _assemble([overlay, sift(COMMAND_LINE, arguments, base, known)], name=name)


def _assemble(
    overlays: Sequence[Overlay], *, name: str, may_settle_dispatch: bool = False
) -> Config:
    """Lay sources over `base.yml` and build the configuration from the result.

    Args:
        overlays: the sources, from the weakest to the strongest.
        name: the model's name, where `model_name` is not among the settings.
        may_settle_dispatch: whether `moe_dispatch` was translated from a MaxText file, in which
            case it is changed where the rule table does not allow it.
    """
    base, known = base_settings(), maxtext_keys()
    settings = lay_over(base, overlays)
    custom = settings["custom_mesh_and_rule"]
    rules_file = None
    if custom:
        rules_file = read_rules_file(find_file("rules", custom, "custom_mesh_and_rule"), known)
    mesh, warnings = build_mesh(settings, base, overlays, rules_file, known)
    if (
        may_settle_dispatch
        and find_strategy(settings["moe_dispatch"]).always_moves_tokens
        and (why := why_tokens_cannot_move(mesh))
    ):
        settings["moe_dispatch"] = "gather"
        warnings += (f"moe_dispatch=gather instead, which drops nothing either: {why}",)
    _derive(settings, name)
    sources = [*overlays, *([rules_file] if rules_file else [])]
    warnings = (*(note for overlay in sources for note in overlay.notes), *warnings)
    if settings["num_experts"] == 1 and settings["moe_dispatch_no_expert_sharding"]:
        warnings += (
            "moe_dispatch_no_expert_sharding=true has no effect: num_experts=1, a dense model",
        )
    return Config(
        run=_build(RunConfig, settings),
        model=_build_model(settings),
        mesh=mesh,
        train=_build(TrainConfig, settings),
        data=_build(DataConfig, settings),
        evaluation=_build(EvalConfig, settings),
        local=_build(LocalConfig, settings),
        generate=_build(GenerateConfig, settings),
        warnings=warnings,
        unbuilt=_unbuilt(overlays),
    )


@functools.cache
def base_settings() -> dict[str, Any]:
    """Return every key of `base.yml` and its default."""
    return read_mapping(configs_dir() / "base.yml")


def maxtext_keys() -> MaxTextKeys:
    """Return every configuration key of MaxText, and what becomes of it here."""
    return read_maxtext_keys(configs_dir() / "maxtext_keys.yml")


def list_names(kind: str) -> list[str]:
    """List the names of the files in `configs/<kind>/`, sorted."""
    return sorted(path.stem for path in (configs_dir() / kind).glob("*.yml"))


def find_file(kind: str, given: str, what: str) -> Path:
    """Find the file that a name in `configs/<kind>/`, or a path, refers to.

    Args:
        kind: a directory below `configs/`.
        given: a name there, or the path of a YAML file.
        what: what messages call the file.

    Raises:
        UserError: there is no such name and no such file.
    """
    directory = configs_dir() / kind
    names = list_names(kind)
    if given in names:
        return directory / f"{given}.yml"
    path = Path(given)
    if kind == "models" and os.path.isfile(path / "config.yml"):  # False too where it is too long
        return path / "config.yml"
    looks_like_path = path.suffix in {".yml", ".yaml"} or "/" in given or "\\" in given
    if looks_like_path and given.isprintable():
        return path  # read_mapping reports what is wrong with it
    near = difflib.get_close_matches(given, names, n=3, cutoff=0.4)
    fix = f"did you mean {' or '.join(near)}?" if near else f"one of {', '.join(names)}"
    if kind == "models" and "=" in given:
        fix = f"MODEL comes first, for example: {names[0]} {shown(given)}"
    raise UserError(
        f"{what} {shown(given)} is not in configs/{kind}/\nfix: {fix}, or the path of a .yml file"
    )


def _derive(settings: dict[str, Any], name: str) -> None:
    """Fill in the keys whose default is derived from other keys."""
    if settings["model_name"] in {"", "default"}:
        # Of a file default.yml: its name would mean the file that it is read from next.
        settings["model_name"] = "default-model" if name == "default" else name
    settings["run_name"] = settings["run_name"] or settings["model_name"]
    if settings["base_moe_mlp_dim"] == -1:
        settings["base_moe_mlp_dim"] = settings["base_mlp_dim"]
    emb_dim, heads = settings["base_emb_dim"], settings["base_num_query_heads"]
    if settings["head_dim"] == -1:
        # Latent attention has sizes of its own, and reads none of this.
        latent = settings["attention_type"] == "mla"
        if heads < 1 or (emb_dim % heads and not latent):
            raise UserError(
                f"head_dim=-1 is base_emb_dim / base_num_query_heads, and {emb_dim} / {heads} is "
                "not a whole number\nfix: set head_dim, for example head_dim=128"
            )
        settings["head_dim"] = max(emb_dim // heads, 2) if latent else emb_dim // heads

    if settings["mamba_head_dim"] == -1:
        inner, states = settings["mamba_expand"] * emb_dim, settings["mamba_num_heads"]
        if states < 1 or inner % states:
            raise UserError(
                "mamba_head_dim=-1 is mamba_expand * base_emb_dim / mamba_num_heads, and "
                f"{inner} / {states} is not a whole number\nfix: set mamba_head_dim"
            )
        settings["mamba_head_dim"] = inner // states


def _build_model(settings: Mapping[str, Any]) -> ModelConfig:
    """Build the decoder's configuration; its MoE layer is None for one expert."""
    # Built in any case, so that these keys are checked for a dense model too.
    moe = _build(MoEConfig, settings, router=_build(RouterConfig, settings))
    return _build(
        ModelConfig,
        settings,
        remat=_build(RematConfig, settings),
        gating=_build(GatingConfig, settings),
        attention=_build(AttentionConfig, settings, rope=_build(RopeConfig, settings)),
        delta=_build(DeltaConfig, settings),
        mamba=_build(MambaConfig, settings),
        short_conv=_build(ShortConvConfig, settings),
        moe=moe if moe.num_experts > 1 else None,
        mtp=_build(MTPConfig, settings),
        lora=_build(LoraConfig, settings),
    )


def _build(schema: type[T], settings: Mapping[str, Any], **parts: Any) -> T:
    """Build a dataclass from the flat settings, by the keys that its leaves name."""
    leaves = {
        attribute: _frozen(settings[key.name]) for attribute, key in leaf_keys(schema).items()
    }
    return schema(**leaves, **parts)


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _unbuilt(overlays: Sequence[Overlay]) -> tuple[tuple[str, Any, str], ...]:
    """Return what is requested and not built; a stronger overlay may withdraw a request."""
    asked: dict[str, tuple[Any, str] | None] = {}
    for overlay in overlays:
        asked |= overlay.unbuilt
    return tuple(
        (key, _frozen(found[0]), found[1]) for key, found in asked.items() if found is not None
    )
