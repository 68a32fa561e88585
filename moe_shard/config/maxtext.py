"""Read a run from MaxText's files: its model file alone, or its base.yml with `model_name=NAME`.

Such a file means the same here as in MaxText. Keys that it leaves out have MaxText's defaults, keys
that it sets are translated to ours (`maxtext_model.py` for the model, here for the run), and what
is not supported is refused. A file is MaxText's if it has a key that only MaxText has, such as
`decoder_block`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_shard.config.keys import shown
from moe_shard.config.maxtext_keys import UNSET, MaxTextKeys, without_blocks
from moe_shard.config.maxtext_model import Translation, translate_model
from moe_shard.config.maxtext_run import KEYS as RUN_KEYS
from moe_shard.config.maxtext_run import check_data, run_values
from moe_shard.config.mesh_config import MeshConfig
from moe_shard.config.overlays import COMMAND_LINE, Overlay, coerced, short_name, unknown_key
from moe_shard.config.strict_yaml import read_mapping
from moe_shard.errors import UserError

OWN_KEYS_OF_A_CONFIG = 20
"""A file with so many keys that only this package has is one that a run of it has written."""

RENAMED = {
    "opt_type": "optimizer",
    "cosine_learning_rate_final_fraction": "learning_rate_final_fraction",
}
"""MaxText's name -> the name here, where the values are the same."""

_OURS_UNLESS_SET = (
    *("run_name", "base_output_directory", "log_period", "load_parameters_path"),
    *("jax_cache_dir", "jax_distributed_initialization_timeout"),
    *(f"multi_tier_checkpointing_backup_interval_{unit}" for unit in ("minutes", "steps")),
)
_EMPTY_IS_OFF = ("jax_cache_dir",)
"""Keys for which an empty value is a choice, not "not set"."""
_TABLE = ("mesh_axes", "logical_axis_rules")
_PLACES = ("mesh_axes", "logical_axis_rules", "override_logical_axis_rules", "custom_mesh_and_rule")
_NOTED = (
    *("steps", "per_device_batch_size", "load_balance_loss_weight", "head_dim"),
    *("remat_policy", "checkpoint_period"),
)
"""Keys whose default in MaxText differs from ours, so that a note names the default."""


def is_maxtext(written: Mapping[str, Any], base: Mapping[str, Any], keys: MaxTextKeys) -> bool:
    """Return whether a file is MaxText's: it has a key that only MaxText has.

    Args:
        written: the file's keys.
        base: our `base.yml`.
        keys: MaxText's.
    """
    own = sum(key in base and key not in keys for key in written)
    foreign = any(key not in base and key in keys for key in written)
    return foreign and own < OWN_KEYS_OF_A_CONFIG


def read_run(
    path: Path,
    written: Mapping[str, Any],
    arguments: Mapping[str, Any],
    base: Mapping[str, Any],
    keys: MaxTextKeys,
) -> tuple[list[Overlay], str]:
    """Translate a run described by MaxText's files to our keys.

    Args:
        path: the file that was named.
        written: its content.
        arguments: the command line's `key=value`.
        base: our `base.yml`.
        keys: MaxText's.

    Returns:
        The overlays over `base.yml`, and the model's name.

    Raises:
        UserError: a file that cannot be found or read, an unknown key, or something unsupported.
    """
    theirs = {key: value for key, value in arguments.items() if key in keys}
    files, notes = _files(path, written, theirs)
    name = _model_name(path, files, theirs)
    explicit: dict[str, Any] = {}
    by: dict[str, str] = {}
    for source, content in [*files, (COMMAND_LINE, arguments)]:
        rows = explicit.get("logical_axis_rules")
        more = _checked(source, without_blocks(content, source), base, keys)
        if rows and "logical_axis_rules" in more and not more.get("override_logical_axis_rules"):
            more["logical_axis_rules"] = _laid(rows, more["logical_axis_rules"])
        explicit |= more
        by |= dict.fromkeys(more, source)
    asked = [
        key
        for key in explicit
        if key in keys.refused and not keys.refused[key].admits(explicit[key])
    ]
    for key in asked:
        if keys.refused[key].kind == "run":
            raise refused(by[key], key, explicit[key], keys)
    given = {**keys.defaults, **explicit}
    is_named = "model_name" in explicit
    translation = translate_model(given, frozenset(explicit), name, is_named=is_named)
    unbuilt: dict[str, tuple[Any, str] | None] = dict(translation.unbuilt)
    unbuilt |= {key: (explicit[key], keys.refused[key].what) for key in asked}
    values = _same(explicit, given, translation, base, keys)
    idle = _idle(translation, given, explicit, values, name, is_named=is_named, keys=keys)
    run_values(values, unbuilt, translation, explicit, given, arguments)
    check_data(explicit, values["dataset_type"], keys, short_name(path))
    if any(source == "base.yml" and "logical_axis_rules" in content for source, content in files):
        values["override_logical_axis_rules"] = True  # the table is whole
    if values.get("custom_mesh_and_rule"):
        values["custom_mesh_and_rule"] = _rules_beside(path, values["custom_mesh_and_rule"])
        for key in _TABLE:  # MaxText lets it replace whatever else there is
            values.pop(key, None)
    source = short_name(path)
    notes = [
        f"{source} is read as a MaxText file (configs/maxtext_keys.yml); its defaults where it "
        f"says nothing: {_defaults(explicit, given, values)}",
        *notes,
        *_in_other_words(translation, source, given["decoder_block"]),
        *_adapted(given, source),
        *([f"{source}: of no effect with what else it has: {', '.join(idle)}"] if idle else []),
        *no_meaning(explicit, keys, source),
    ]
    overlays = [Overlay(source, values, unbuilt, tuple(notes))]
    for source, content in [*files, (COMMAND_LINE, arguments)]:
        own = {key: value for key, value in content.items() if key not in keys}
        if own:
            overlays.append(Overlay(source, own, {}, ()))
    return overlays, name


def _adapted(given: Mapping[str, Any], source: str) -> list[str]:
    """Say which weights have adapters where a file leaves that open: MaxText has others."""
    if given["enable_lora"] is not True or given["lora_module_path"]:
        return []
    return [
        f"{source}: lora_module_path is empty: attention, experts and MLPs have adapters; MaxText "
        "then goes by model_name, and for most models leaves out routed experts "
        "(lora_module_path='self_attention/|/mlp/|shared_experts/')"
    ]


def _files(
    path: Path, written: Mapping[str, Any], arguments: Mapping[str, Any]
) -> tuple[list[tuple[str, Mapping[str, Any]]], list[str]]:
    """Read a run's files, the weakest first: those it inherits from, itself, its model's."""
    chain = _inherited(path, written, ())
    notes: list[str] = []
    named = _model_name(path, chain, arguments)
    if not any("model_name" in content for content in (arguments, *(each for _, each in chain))):
        return chain, notes
    model = named.replace("-Instruct", "")
    places = [folder / "models" for folder in _above(path)]
    found = next((p / f"{model}.yml" for p in places if (p / f"{model}.yml").is_file()), None)
    if found is not None and not found.samefile(path):
        content = read_mapping(found)
        doubled = [
            f"{key}={shown(value)}"
            for key, value in arguments.items()
            if key in content and content[key] != value
        ]
        if doubled and arguments.get("override_model_config") is not True:
            notes.append(
                f"over what models/{shown(found.name)} says, for which MaxText would want "
                f"override_model_config=true: {', '.join(doubled)}"
            )
        outdone = [
            f"{key}={shown(written[key])}"
            for key in written
            if key in content and content[key] != written[key] and path.name != "base.yml"
        ]
        if outdone:
            notes.append(
                f"models/{shown(found.name)} wins over {short_name(path)}, as in MaxText: not "
                f"{', '.join(outdone)}"
            )
        return [*chain, (short_name(found), content)], notes
    if found is None and "model_name" in arguments and "model_name" in written:
        known = sorted({p.stem for place in places for p in place.glob("*.yml")})
        near = difflib.get_close_matches(model, known, n=3, cutoff=0.4)
        fix = f"did you mean {' or '.join(near)}?" if near else "the path of its own YAML"
        raise UserError(
            f"model_name={shown(named)}: no models/{shown(model)}.yml beside {path}\nfix: {fix}"
        )
    return chain, notes


def _inherited(
    path: Path, written: Mapping[str, Any], above: Sequence[Path]
) -> list[tuple[str, Mapping[str, Any]]]:
    """Read a file after those that its `base_config` names, the last one first."""
    own = [(short_name(path), written)]
    named = written.get("base_config")
    if named in UNSET:
        return own
    if not isinstance(named, str) or path in above:
        raise UserError(
            f"{path}: base_config={shown(named)} is not the name of another file\n"
            "fix: base.yml, for example"
        )
    for folder in _above(path):
        parent = folder / named
        if parent.is_file() and not parent.samefile(path):
            return _inherited(parent, read_mapping(parent), (*above, path)) + own
    if Path(named).name == "base.yml":  # its defaults are below every file in any case
        return own
    raise UserError(
        f"{path}: base_config={shown(named)} is not beside it\nfix: the path of that file"
    )


def _above(path: Path) -> tuple[Path, ...]:
    """Yield the folder of a file and those above it, as far up as MaxText's `configs/` may be."""
    return tuple(path.absolute().parents)[:5]


def _laid(table: list[Any], rows: list[Any]) -> list[Any]:
    """Lay unchecked rules of a stronger source over a table; they replace those of their names."""
    names = [row[0] for row in rows if isinstance(row, list) and row]
    return [row for row in table if not (isinstance(row, list) and row and row[0] in names)] + rows


def _model_name(
    path: Path, files: Sequence[tuple[str, Mapping[str, Any]]], arguments: Mapping[str, Any]
) -> str:
    for content in (arguments, *(content for _, content in reversed(files))):
        name = content.get("model_name")
        if isinstance(name, str) and name not in (*UNSET, "default"):
            return name
    return path.stem


def _checked(
    source: str, content: Mapping[str, Any], base: Mapping[str, Any], keys: MaxTextKeys
) -> dict[str, Any]:
    """Return the values that one source gives MaxText's keys, each in the type of its default.

    Raises:
        UserError: an unknown key, or a value of another type.
    """
    explicit: dict[str, Any] = {}
    for alias, key in RENAMED.items():
        if alias in content and key in content:
            raise UserError(
                f"{source}: {alias} and {key} are two names of one key\nfix: keep {key}"
            )
    for key, value in content.items():
        if key not in keys:
            if key not in base:
                raise unknown_key(source, key, list(base), list(keys.defaults))
            continue  # a key of ours in a MaxText file
        if key in keys.refused:
            explicit[key] = value
        elif key in keys.same or key in keys.translated:
            default = keys.defaults[key]
            empty = (value == [] and isinstance(default, list)) or key in _EMPTY_IS_OFF
            if value in UNSET and not empty:
                continue
            explicit[key] = coerced(source, key, value, base.get(key, default))
        else:
            explicit[key] = value
    if source == "base.yml":
        # MaxText's shipped values are defaults, not a choice of the user's, except for its table.
        return {k: v for k, v in explicit.items() if k in _TABLE or v != keys.defaults[k]}
    return explicit


def refused(source: str, key: str, value: Any, keys: MaxTextKeys) -> UserError:
    """Return the error for a value that is not supported."""
    refusal = keys.refused[key]
    fix = refusal.fix or f"leave it out ({key}={shown(refusal.default)})"
    return UserError(
        f"{source}: {key}={shown(value)} asks for {refusal.what}, which is not built in this "
        f"version\nfix: {fix}"
    )


def _idle(
    translation: Translation,
    given: Mapping[str, Any],
    explicit: Mapping[str, Any],
    values: Mapping[str, Any],
    name: str,
    *,
    is_named: bool,
    keys: MaxTextKeys,
) -> list[str]:
    """Find keys that change nothing, by translating again with their defaults."""
    told = {*translation.unread, *translation.unbuilt}
    idle = []
    for key in explicit:
        default = keys.defaults[key]
        if key in told or given[key] == default:
            continue
        if key in keys.same:
            if key in translation.values and values[key] != given[key]:
                idle.append(key)
        elif key in keys.translated and key not in RUN_KEYS:
            try:
                other = translate_model(
                    {**given, key: default}, frozenset(explicit) - {key}, name, is_named=is_named
                )
            except UserError:
                continue
            if (other.values, other.unbuilt) == (translation.values, translation.unbuilt):
                idle.append(key)
    return sorted(idle)


def why_tokens_cannot_move(mesh: MeshConfig) -> str:
    """Return why a strategy that always moves tokens cannot serve a table; empty where it can.

    MaxText's sparse path accepts tokens that are replicated over the devices of an expert group;
    here a token is sent by the one device that holds it.
    """
    sizes = zip(mesh.mesh_axes, mesh.ici, mesh.dcn, strict=True)
    split = {axis for axis, ici, dcn in sizes if (ici, dcn) != (1, 1)}
    experts = [axis for axis in mesh.expert_axes if axis in split]
    tokens = (*mesh.axes_of("activation_batch_moe"), *mesh.axes_of("activation_length_moe"))
    if missing := [axis for axis in experts if axis not in tokens]:
        return f"by the rule table no token is on one device of {', '.join(missing)} alone"
    stored = [axis for axis in mesh.axes_of("exp") if axis in split]
    if stored[: len(experts)] != experts:
        return "by the rule table experts are stored over other axes than they are used over"
    return ""


def _same(
    explicit: Mapping[str, Any],
    given: Mapping[str, Any],
    translation: Translation,
    base: Mapping[str, Any],
    keys: MaxTextKeys,
) -> dict[str, Any]:
    """Return the keys of the same name and meaning, with MaxText's defaults, then the model's."""
    values = {
        key: given[key]
        for key in sorted(keys.same)
        if key in base
        and (
            key in explicit
            or not (key in _OURS_UNLESS_SET or key in _PLACES or "parallelism" in key)
        )
    }
    return values | translation.values


def _rules_beside(path: Path, name: Any) -> Any:
    """Return a rule table's name as a path where MaxText's folder of tables is near the file."""
    for folder in _above(path):
        place = folder / "custom_mesh_and_rule" / f"{name}.yml"
        if place.is_file():
            return str(place)
    return name


def _defaults(
    explicit: Mapping[str, Any], given: Mapping[str, Any], values: Mapping[str, Any]
) -> str:
    latent = values["attention_type"] == "mla"
    left = [key for key in _NOTED if key not in explicit and not (key == "head_dim" and latent)]
    named = [f"{key}={shown(values.get(key, given[key]))}" for key in left]
    return ", ".join([*named, "learning_rate_rule=maxtext", "adam_decay_vectors=true"])


def _in_other_words(translation: Translation, source: str, block: str) -> list[str]:
    lines = []
    if translation.words:
        lines.append(f"{source} in the words of this package: {'; '.join(translation.words)}")
    if translation.unread:
        keys = ", ".join(dict.fromkeys(translation.unread))
        lines.append(
            f"{source}: decoder_block={shown(block)} does not read these, here and there: {keys}"
        )
    return lines


def no_meaning(explicit: Mapping[str, Any], keys: MaxTextKeys, source: str) -> list[str]:
    """Write one line on the keys that do nothing here, by what they are about."""
    about: dict[str, list[str]] = {}
    for key in explicit:
        if key in keys.harmless:
            about.setdefault(keys.harmless[key], []).append(key)
        elif key in keys.implied:
            about.setdefault(f"only with {keys.implied[key]}", []).append(key)
        elif key in keys.data:
            about.setdefault("no text is read, or read so in any case", []).append(key)
    if not about:
        return []
    parts = [f"{', '.join(sorted(names))} ({text})" for text, names in about.items()]
    return [f"{source}: of no meaning here: {'; '.join(parts)}"]
