"""Give every tensor its place: a part of a parameter, carried for a reason, or refused by name.

What no parameter takes is exported as it was: layers of multi-token prediction, vision towers, and
other parts beside the decoder that a family lists. Never what a decoder layer computes with: the
model would be another one, and nothing would say so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from moe_shard.autoep.attributes import Attributes
from moe_shard.autoep.family import Family
from moe_shard.autoep.fewer_layers import KEY, layer_of
from moe_shard.autoep.headers import TensorHeader
from moe_shard.autoep.mtp_layers import MTP_KEY
from moe_shard.autoep.tensor_names import Names, switch_of, unwrapped
from moe_shard.autoep.tensor_plan import Piece, TensorPlan
from moe_shard.config.keys import shown
from moe_shard.errors import UserError

_ROTARY = re.compile(r".*\.rotary_emb\.(?:original_)?(?:inv_freq|cos_cached|sin_cached)")


def layers_beyond(
    headers: Mapping[str, TensorHeader],
    names: Names,
    family: Family,
    attributes: Attributes,
    ahead: int = 0,
) -> set[str]:
    """Return the tensors of layers after the model's last, which are carried unchanged.

    Args:
        headers: all tensors.
        names: the tensors by role.
        family: says which layers may be there.
        attributes: the model's attributes.
        ahead: layers of multi-token prediction that are not carried but read.

    Raises:
        UserError: the layers are not those of `config.json`.
    """
    rule = family.settings[KEY]
    layers = attributes.value(KEY, rule)
    text = attributes.rule_text(KEY, rule)
    found = names.layers()
    missing = next((layer for layer in range(layers) if layer not in found), None)
    if missing is not None:
        fix = "the config.json of these tensors"
        if not found:
            fix += f", or prefix and layers of family {family.name}"
        raise attributes.error(f"{text}, but no tensor is of layer {missing}", fix)
    carried = attributes.value(KEY, family.carried_layers)
    of = _layers_of(headers, family)
    if ahead > carried:
        named = ", ".join(map(attributes.as_text, family.carried_layers.sources))
        raise attributes.error(
            f"{MTP_KEY}={ahead}, and there are {carried} such layers by {named or family.name}",
            f"{MTP_KEY}={carried}",
        )
    # A layer of multi-token prediction has tensors that the model's layers lack.
    special = names.predicting_layers() | {of[name] for name in names.others if name in of}
    for name, layer in of.items():
        if layer >= layers + carried or (layer >= layers and layer not in special):
            raise attributes.error(
                f"{text}, but the tensors go on to layer {layer} ({shown(name)})",
                f"the config.json of these tensors, or {KEY}={layers} for these layers alone",
            )
    return {name for name, layer in of.items() if layer >= layers + ahead}


def plan_tensors(
    pieces: tuple[Piece, ...],
    copies: tuple[Piece, ...],
    headers: Mapping[str, TensorHeader],
    names: Names,
    family: Family,
    beyond: set[str],
    where: Path,
) -> TensorPlan:
    """Make the plan once every tensor has been assigned.

    Args:
        pieces: those of the parameters.
        copies: pieces of tensors that repeat others.
        headers: all tensors.
        names: the tensors by role.
        family: says by patterns what is carried.
        beyond: tensors of layers and of experts that are carried as a whole.
        where: the directory, for messages.

    Raises:
        UserError: a tensor has no place, or a pattern carries what a layer computes with.
    """
    used = {piece.tensor for piece in (*pieces, *copies)}
    within = _layers_of(headers, family).keys() - beyond
    carried = set(beyond)
    patterns = [re.compile(pattern) for pattern in family.carried]
    if "carried" in family.own:
        _check_patterns(patterns, {name: headers[name] for name in within}, family, where)
    for name, tensor in headers.items():
        if name in used or name in carried:
            continue
        may_be = name not in within or _is_buffer(name, tensor)
        if may_be and any(pattern.fullmatch(unwrapped(name)) for pattern in patterns):
            carried.add(name)
            continue
        role = next((role for role, at in names.roles.items() if name in at.values()), "")
        raise _no_place(name, role, name in within, family, where)
    return TensorPlan(pieces, tuple(name for name in headers if name in carried), copies)


def _check_patterns(
    patterns: list[re.Pattern[str]],
    of_layers: Mapping[str, TensorHeader],
    family: Family,
    where: Path,
) -> None:
    """Refuse a pattern of what is carried that fits a tensor of a layer, used or not."""
    for name, tensor in of_layers.items():
        for pattern in patterns:
            if pattern.fullmatch(unwrapped(name)) and not _is_buffer(name, tensor):
                raise UserError(
                    f"{where}: {shown(name)} is of a decoder layer, and carried: {pattern.pattern} "
                    f"of family {family.name} fits it\n"
                    "fix: a narrower pattern; what a layer computes with gets a name under tensors"
                )


def _no_place(name: str, role: str, within: bool, family: Family, where: Path) -> UserError:
    """Return the error for a tensor that no parameter takes and that is not carried."""
    if role:
        return UserError(
            f"{where}: {shown(name)} is {role}, which by config.json the model has not\n"
            f"fix: the config.json of these tensors, or {switch_of(role) or 'another value'} in "
            f"settings of family {family.name}"
        )
    what = f"{where}: {shown(name)} fits no name or pattern of family {family.name}\n"
    if within:
        return UserError(
            f"{what}it is of a decoder layer, which would compute something else without it\n"
            "fix: the config.json of these tensors, or hf_family with a name or pattern for it"
        )
    return UserError(
        f"{what}fix: the config.json of these tensors, or hf_family with a name, or with a "
        "pattern under carried where the decoder computes nothing with it"
    )


def _layers_of(headers: Mapping[str, TensorHeader], family: Family) -> dict[str, int]:
    """Return the layer of each tensor of a decoder layer: the model's, and those after it."""
    layers = ((name, layer_of(name, family)) for name in headers)
    return {name: layer for name, layer in layers if layer is not None}


def _is_buffer(name: str, tensor: TensorHeader) -> bool:
    """Return whether a tensor is made from the configuration alone: rotary caches and masks."""
    return tensor.dtype == "BOOL" or (
        _ROTARY.fullmatch(unwrapped(name)) is not None and len(tensor.shape) < 3
    )
