"""Detect what a Hugging Face model directory holds, from `config.json` and the tensors' headers.

No weight is read, no device is started and torch is not imported, so that even the largest models
take only a second or two.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe_shard.autoep.attributes import Attributes
from moe_shard.autoep.carried import layers_beyond, plan_tensors
from moe_shard.autoep.family import Family, choose_family, list_families, load_family
from moe_shard.autoep.family_chain import EXPERT_LAYERS
from moe_shard.autoep.fewer_layers import KEY, layer_of, with_layers
from moe_shard.autoep.head import EMBEDDING_ROLE, HEAD_ROLE, TIE_KEY, read_head
from moe_shard.autoep.headers import TensorHeader, read_headers
from moe_shard.autoep.lines import report_lines
from moe_shard.autoep.mtp_layers import MTP_KEY, copies_in_mtp
from moe_shard.autoep.pieces import Pieces
from moe_shard.autoep.quantized import CONFIG_KEY, read_scheme, with_scales
from moe_shard.autoep.settings import model_settings, setting_rules
from moe_shard.autoep.strict_json import read_object
from moe_shard.autoep.tensor_names import Names, sort_names, unwrapped
from moe_shard.autoep.tensor_plan import TensorPlan
from moe_shard.config.keys import shown
from moe_shard.config.load import load_settings
from moe_shard.config.model_config import DType, ModelConfig
from moe_shard.config.overlays import Overlay
from moe_shard.errors import UserError
from moe_shard.units import human_count

CONFIG = "config.json"
_TIED, _TABLE_PATH = "logits_via_embedding", tuple(EMBEDDING_ROLE.split("."))
_DTYPES: Mapping[str, DType] = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_QUANTIZED = re.compile(r".*(_blocks|_scales|_scale_inv|_scale|\.qweight|\.qzeros|\.scales)")
"""Names of tensors from which weights are still to be computed, such as scales."""


_OF_ANY_DTYPE = ("router", "delta", "indexer")
"""Parts of a layer that may have parameters in float32 beside those that decide the dtype."""
_MADE_OF = {"head_dim": "base_num_query_heads", "shared_expert_mlp_dim": "base_moe_mlp_dim"}
"""Settings that may be derived -> one that they are derived from."""


@dataclass(frozen=True)
class Detected:
    """Describe what a directory holds.

    Attributes:
        family: the family's name.
        settings: key of `base.yml` -> value, for the model.
        plan: which tensor fills which part of which parameter.
        headers: all tensors, by name; quantized ones by the names of their decoded tensors.
        lines: what was found, one line each, for people.
        notes: what to check where the family is the user's own, or belongs to another model.
        dtype: the narrowest dtype that holds all weights; they are computed with in it, and trained
            in float32.
        cut: the content of `config.json` as it is for the first layers alone; None: all are there.
    """

    family: str
    settings: dict[str, Any]
    plan: TensorPlan
    headers: dict[str, TensorHeader]
    lines: tuple[str, ...]
    notes: tuple[str, ...]
    dtype: DType
    cut: Mapping[str, Any] | None = None


@contextmanager
def _nothing_is_garbage() -> Iterator[None]:
    """Turn off Python's garbage collector while the block runs.

    It would scan a hundred thousand names and headers repeatedly, and take a third of the time.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@_nothing_is_garbage()
def detect(
    directory: Path,
    family: str = "",
    tied: bool | None = None,
    layers: int | None = None,
    outside: bool = False,
    ahead: int | None = None,
) -> Detected:
    """Read and describe a model directory.

    Args:
        directory: a directory with `config.json` and safetensors files.
        family: a name in `configs/families/` or the path of a YAML file; empty: the family that
            `config.json` names.
        tied: whether the parameters that are to be read or written have one array for embedding
            and head; None: see `read_head`.
        layers: number of layers, if the rest of them is to be left out; None: all.
        outside: whether the weights' index may name files outside of the directory.
        ahead: layers of multi-token prediction that are read, the others being carried; None: as
            the family's settings say, else none.

    Raises:
        UserError: something is missing, wrong, or unsupported, or `config.json` and the
            tensors disagree.
    """
    where = directory / CONFIG
    written = read_object(where)
    known = load_family(family) if family else choose_family(written, where)
    whole = written
    if layers is not None:
        written = with_layers(whole, known, layers, where)
    attributes = Attributes(written, known, where)
    scheme = read_scheme(attributes.get(CONFIG_KEY), where)
    headers = with_scales(read_headers(directory, outside=outside), scheme, directory)
    names = sort_names(headers, known, directory)
    left_out = _left_out(headers, names, known, attributes, layers)
    if left_out:
        headers = {name: entry for name, entry in headers.items() if name not in left_out}
        names = sort_names(headers, known, directory)
    _check_plain(headers, names, directory)
    settings = model_settings(attributes, known, ahead)
    ahead = settings.get(MTP_KEY, 0)
    beyond = layers_beyond(headers, names, known, attributes, ahead)
    head = read_head(
        names,
        headers,
        configured=configured_tied(settings, known, written, HEAD_ROLE in names.roles),
        asked=tied,
        where=directory,
    )
    settings[_TIED] = head.tied
    model = make_model(settings, where, attributes_of_keys(settings, known, attributes))
    _check_expert_layers(model, names, known, attributes)

    def explain(keys: Sequence[str]) -> str:
        rules = setting_rules(known)
        texts = []
        for given in keys:
            key = _MADE_OF.get(given, given) if settings.get(given, -1) == -1 else given
            if key in rules:
                texts.append(attributes.rule_text(key, rules[key]))
        return ", ".join(dict.fromkeys(texts))

    pieces = Pieces(
        model=model,
        family=known,
        names=names,
        headers=headers,
        where=directory,
        explain=explain,
        beside=attributes.value("num_experts", known.carried_experts),
    )
    found = tuple(pieces.find())
    if pieces.beside:
        beyond |= names.beyond_expert(model.num_experts) | pieces.partly
    copies = tuple(
        replace(piece, tensor=head.copy)
        for piece in found
        if head.copy and piece.param == _TABLE_PATH
    )
    copies += tuple(copies_in_mtp(found, model, names, headers, directory))
    plan = plan_tensors(found, copies, headers, names, known, beyond, directory)
    dtype = _dtype(plan, headers, directory)
    # Float32 whatever the file's dtype: narrower parameters lose the small steps of an optimizer.
    settings = {"weight_dtype": "float32", "dtype": dtype} | settings
    lines = report_lines(
        family=known.name,
        model=model,
        names=names,
        headers=headers,
        plan=plan,
        fused=pieces.fused,
        dtype=dtype,
    )
    lines += (head.note,) if head.note else ()
    if ahead:
        lines += (
            f"multi-token prediction: {human_count(ahead, 'layer')} after the last, with the head "
            "and the embedding of the decoder",
        )
    if left_out:
        lines += (
            f"layers: the first {layers} on request ({KEY}={layers}); {len(left_out):,} tensors of "
            f"those after them are left out, and an export is of {layers} layers",
        )
    if wrapped := [name for name in headers if unwrapped(name) != name]:
        lines += (
            f"names: {len(wrapped):,} of {len(headers):,} have a wrapper's part, which is passed "
            f"over and exported again: {wrapped[0]}",
        )
    own = family and (
        family not in list_families() or written.get("model_type") not in known.model_type
    )
    # No test compares models of such a family with this one.
    notes = tuple(attributes.notes()) if own else ()
    cut = written if left_out else None
    return Detected(known.name, settings, plan, headers, lines, notes, dtype, cut)


def _left_out(
    headers: Mapping[str, TensorHeader],
    names: Names,
    family: Family,
    attributes: Attributes,
    layers: int | None,
) -> set[str]:
    """Return the tensors of layers after the first ones that are asked for.

    Layers of multi-token prediction, which have tensors of their own, stay where `config.json`
    has them.
    """
    if layers is None:
        return set()
    last = layers + attributes.value(KEY, family.carried_layers)
    special = names.predicting_layers() | {layer_of(name, family) for name in names.others}
    numbers = ((name, layer_of(name, family)) for name in headers)
    return {
        name
        for name, layer in numbers
        if layer is not None and (layer >= last or (layer >= layers and layer not in special))
    }


def configured_tied(
    settings: Mapping[str, Any], family: Family, written: Mapping[str, Any], has_head: bool
) -> bool:
    """Return whether head and embedding are one by the family or `config.json`.

    A model around the decoder has its own word, which transformers goes by; without a head among
    the tensors one word of the two is enough.

    Args:
        settings: what `model_settings` returns.
        family: the model's.
        written: the content of `config.json`.
        has_head: whether there is a head among the tensors.
    """
    own, around = settings[_TIED], written.get(TIE_KEY)
    if not setting_rules(family)[_TIED].sources:
        return bool(own)
    if has_head and isinstance(around, bool):
        return around
    return own or around is True


def _check_plain(headers: Mapping[str, TensorHeader], names: Names, where: Path) -> None:
    scales = {name for name in names.others if _QUANTIZED.fullmatch(name)}
    for name, tensor in headers.items():
        if tensor.dtype.startswith("F8") or name in scales:
            raise UserError(
                f"{where}: {shown(name)} ({tensor.dtype}) belongs to quantized weights\n"
                f"fix: a config.json with the {CONFIG_KEY} of these tensors, or plain weights"
            )


def make_model(settings: Mapping[str, Any], where: Path, names: Mapping[str, str]) -> ModelConfig:
    """Make the model, with errors in the words of its `config.json`.

    Args:
        settings: key of `base.yml` -> value.
        where: the file, for messages.
        names: key of `base.yml` -> the attribute that its value is from.

    Raises:
        UserError: there is no such model.
    """
    layer = Overlay(str(where), dict(settings), {}, ())
    try:
        return load_settings(layer, name=where.parent.name).model
    except UserError as error:
        text = re.sub(r"\b[a-z]\w*\b", lambda word: names.get(word[0], word[0]), str(error))
        raise UserError(text if text.startswith(str(where)) else f"{where}: {text}") from error


def attributes_of_keys(
    settings: Mapping[str, Any], family: Family, attributes: Attributes
) -> dict[str, str]:
    """Return, for each key of `base.yml` whose value is an attribute's, the attribute."""
    names = {key: attributes.source(rule) for key, rule in setting_rules(family).items()}
    names["sliding_window_size"] = family.spans.window
    names["chunk_attn_window_size"] = family.spans.chunk
    return {key: name for key, name in names.items() if attributes.get(name) == settings[key]}


def _check_expert_layers(
    model: ModelConfig, names: Names, family: Family, attributes: Attributes
) -> None:
    if model.moe is None:
        text = attributes.rule_text("num_experts", setting_rules(family)["num_experts"])
        raise attributes.error(f"{text}: no MoE layer", "a model with experts")
    routers = names.roles.get("mlp.router.kernel", {})
    if not routers:
        raise UserError(
            f"{attributes.where.parent}: no router: no tensor matches {family.moe_layer_pattern}, "
            f"then {family.router_pattern}\nfix: the patterns of hf_family"
        )
    for layer, kind in enumerate(model.layer_kinds):
        if kind.moe != ((layer,) in routers):
            at = family.moe_layers
            keys = [at.list, at.types, at.first, at.last, at.step, at.excluded]
            if family.mixers.one_block:
                keys = [family.mixers.types]
            texts = ", ".join(attributes.as_text(key) for key in keys if key)
            deciding = {*EXPERT_LAYERS, "layers_without_mlp"} & family.settings.keys()
            if deciding:
                own = {key: family.settings[key] for key in sorted(deciding)}
                texts = ", ".join(attributes.rule_text(key, rule) for key, rule in own.items())
            raise attributes.error(
                f"layer {layer} has {'experts' if kind.moe else 'none'} by {texts or family.name}, "
                f"and its tensors {'no router' if kind.moe else shown(routers[(layer,)])}",
                f"the config.json of these tensors, or moe_layers of family {family.name}",
            )


def _dtype(plan: TensorPlan, headers: Mapping[str, TensorHeader], where: Path) -> DType:
    """Return the narrowest dtype that holds all weights, but for what computes in float32."""
    found: set[DType] = set()
    for piece in plan.pieces:
        dtype = headers[piece.tensor].dtype
        if dtype not in _DTYPES:
            raise UserError(
                f"{where}: {shown(piece.tensor)} has dtype {dtype}\n"
                f"fix: weights in one of {', '.join(_DTYPES)}"
            )
        if not {*_OF_ANY_DTYPE} & {*piece.param}:
            found.add(_DTYPES[dtype])
    return found.pop() if len(found) == 1 else "float32"
