"""Tell which parameter a tensor fills from its name, by the names and patterns of a family."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from moe_shard.autoep.family import OUTSIDE, Family
from moe_shard.autoep.param_shapes import EXPERTS
from moe_shard.config.keys import shown
from moe_shard.errors import UserError

Place = tuple[int, ...]
"""Layer and expert of a tensor: (), (layer,) or (layer, expert)."""

FUSED, LISTED = "mlp.fused.", EXPERTS
"""Roles of tensors that hold all experts of a layer, and of those that hold one."""

_WRAPPERS = re.compile(
    r"^(?:(?:module|_forward_module|base_model\.model)\.)+"
    r"|(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
"""Parts of names that are of a wrapper around a module: of data parallelism, compilation, FSDP,
checkpointing, peft."""

HEAD_COPY, TABLE_COPY = "head_copy", "table_copy"
"""Roles of tensors of an MTP layer that repeat the head and the embedding."""

_CARRIED_ROUTER = "mlp.carried_router"
"""Role of the router of experts that are carried."""

_PREDICTING = (
    *("projection", "embedding_norm.scale", "hidden_norm.scale", "prediction_norm.scale"),
    *(HEAD_COPY, TABLE_COPY),
)
"""Roles of tensors that a layer has for multi-token prediction alone."""

_DIGITS = re.compile(r"(?<![^.])[0-9]+(?![^.])")


_SWITCHES = (
    (r"attention\.indexer\..*", "use_indexer"),
    (r"attention\.(query|key|value|query_down|latent_down)_bias", "attention_bias"),
    (r"attention\.out_bias", "attention_out_bias"),
    (r"attention\.gate(_bias)?", "attention_output_gate"),
    (r"delta\..*", "mixer_pattern"),
    (r"attention\.value", "share_kv_projections"),
    (r"attention\.(query|key)_norm\..*", "use_qk_norm"),
    (r"attention\.sink", "attention_sink"),
    (r"attention\.(query_down|query_up|latent_.*)", "attention_type"),
    (r"(embedding|hidden|prediction)_norm\..*|projection", "mtp_num_layers"),
    (r".*norm\.bias", "normalization_type"),
    (r"(attention|mlp)_out_norm\.scale", "norm_placement"),
    (r"mlp\.(routed|shared)_(out_)?norm\.scale", "routed_norms"),
    (r"mlp\.router\.scale", "router_norm"),
    (r"mlp\.router\.expert_scale", "router_expert_scale"),
    (r"layer_scalar", "layer_scalar"),
    (r"mlp\.router\.correction_bias", "routed_bias"),
    (r"embedding\.bias", "logits_bias"),
    (r"mlp\.router\.bias", "router_bias"),
    (r"mlp\.shared\..*", "shared_experts"),
    (r"mlp\.latent\..*", "moe_latent_dim"),
    (r"convolution\..*_bias", "short_conv_bias"),
    (r"mamba\..*_conv_bias", "mamba_conv_bias"),
    (r"mamba\..*_bias", "mamba_proj_bias"),
    (r"(convolution|mamba)\..*", "mixer_pattern"),
    (r"mlp\..*_bias", "mlp_bias"),
)
"""Optional parameters, as regular expressions -> the setting that adds them."""


def switch_of(role: str) -> str:
    """Return the setting that adds a parameter to the model; empty where none does."""
    return next((key for roles, key in _SWITCHES if re.fullmatch(roles, role)), "")


@dataclass
class Names:
    """Hold the tensors of a checkpoint by role.

    Attributes:
        roles: dotted path of a parameter -> place -> tensor. A fused tensor of experts has the
            path `mlp.fused.gate_up` or `mlp.fused.down`, one expert's fused gate and up
            `mlp.experts.gate_up`.
        others: tensors that match no name or pattern of the family.
    """

    roles: dict[str, dict[Place, str]] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    _experts: dict[int, set[int]] = field(default_factory=dict)

    def layers(self) -> set[int]:
        """Return the numbers of the layers that have tensors."""
        return {place[0] for places in self.roles.values() for place in places if place}

    def predicting_layers(self) -> set[int]:
        """Return the numbers of the layers that have tensors of multi-token prediction."""
        return {place[0] for role in _PREDICTING for place in self.roles.get(role, {})}

    def beyond_expert(self, experts: int) -> set[str]:
        """Return the tensors of experts after the model's, and of their router.

        Args:
            experts: number of experts that the model has in a layer.
        """
        listed = [self.roles[role] for role in self.roles if role.startswith(LISTED)]
        found = {at[place] for at in listed for place in at if place[1] >= experts}
        return found | {*self.roles.get(_CARRIED_ROUTER, {}).values()}

    def experts(self, layer: int) -> set[int]:
        """Return the numbers of the experts in a layer that have tensors of their own."""
        return self._experts.get(layer, set())

    def add(self, role: str, place: Place, tensor: str, where: Path) -> None:
        """Record the role and place of a tensor.

        Raises:
            UserError: another tensor has that role and place.
        """
        other = self.roles.setdefault(role, {}).setdefault(place, tensor)
        if other != tensor:
            raise UserError(
                f"{where}: {shown(other)} and {shown(tensor)} have one role by the family's names\n"
                "fix: keep one of the two, or make the patterns of hf_family narrower"
            )
        if len(place) == 2:
            self._experts.setdefault(place[0], set()).add(place[1])


def unwrapped(tensor: str) -> str:
    """Return a tensor's name without what wrappers around its module have put into it.

    >>> unwrapped("module._orig_mod.model.layers.0.mlp.gate.weight")
    'model.layers.0.mlp.gate.weight'
    """
    # Most have none, and a checkpoint may have a hundred thousand names.
    if "module" not in tensor and "_mod" not in tensor:
        return tensor
    return _WRAPPERS.sub("", tensor)


def sort_names(tensors: Iterable[str], family: Family, where: Path) -> Names:
    """Sort tensors by role.

    Args:
        tensors: their names; what wrappers have put into them does not count.
        family: its names and patterns.
        where: the directory, for messages.

    Raises:
        UserError: two tensors, or two patterns, have one role and place.
    """
    names = Names()
    exact = dict(_exact(family))
    patterns = [(role, re.compile(text)) for role, text in _patterns(family)]
    known: dict[str, str] = {}
    for tensor in tensors:
        name = unwrapped(tensor).removeprefix(family.prefix)
        # Names that differ only in their numbers are one case: a checkpoint has tens of thousands
        # of tensors and a few dozen cases.
        case = _DIGITS.sub("0", name)
        if case not in known:
            fits = [role for role, pattern in patterns if pattern.fullmatch(case)]
            fits += [exact[case]] if case in exact else []
            if len(fits) > 1:
                raise UserError(
                    f"{where}: {shown(tensor)} is {' and '.join(sorted(fits))} by the patterns of "
                    f"family {family.name}\nfix: narrower patterns in hf_family"
                )
            known[case] = fits[0] if fits else ""
        role, place = known[case], tuple(map(_number, _DIGITS.findall(name)))
        depth = 0 if role.startswith(OUTSIDE) else 2 if role.startswith(LISTED) else 1
        if role and len(place) == depth:
            names.add(role, place, tensor, where)
        else:
            names.others.append(tensor)
    return names


def expected(role: str, family: Family, place: Place) -> str:
    """Return the expected name of a tensor, for messages.

    Args:
        role: the tensor's role.
        family: its names and patterns.
        place: its layer and expert.
    """
    if family.tensors.get(role):
        below = "".join(f"{family.layers[0]}.{layer}." for layer in place)
        return f"{family.prefix}{below}{family.tensors[role][0]}"
    text = dict(_patterns(family)).get(role)
    return f"{family.prefix}{text}" if text else "no name or pattern in the family's file"


def named_roles(family: Family) -> set[str]:
    """Return the roles that a tensor may have by a family's names and patterns."""
    return {role for role, name in family.tensors.items() if name} | dict(_patterns(family)).keys()


def _exact(family: Family) -> Iterator[tuple[str, str]]:
    """Yield (name with each number replaced by 0, role)."""
    for role, names in family.tensors.items():
        for name in names:
            if role.startswith(OUTSIDE):
                yield name, role
            else:
                yield from ((f"{layers}.0.{name}", role) for layers in family.layers)


def _patterns(family: Family) -> Iterator[tuple[str, str]]:
    """Yield (role, regular expression) of the tensors of the MoE layer."""

    def of(*parts: str, end: str = r"\.weight") -> str:
        below = [family.moe_layer_pattern, *(part for part in parts if part)]
        return r"\.".join(part if part == r"\d+" else f"(?:{part})" for part in below) + end

    bias = r"\.bias"
    yield "mlp.router.kernel", of(family.router_pattern)
    yield "mlp.router.bias", of(family.router_pattern, end=bias)
    if family.carried_router_pattern:
        yield _CARRIED_ROUTER, of(family.carried_router_pattern, end="")
    if family.correction_bias_pattern:
        yield "mlp.router.correction_bias", of(family.correction_bias_pattern, end="")
    if family.has_shared_experts:
        for part, name in (
            ("gate" if family.shared_expert_w3 else "gate_up", family.shared_expert_w1),
            ("down", family.shared_expert_w2),
            ("up", family.shared_expert_w3),
        ):
            if name:
                yield f"mlp.shared.{part}", of(family.shared_experts_pattern, name)
                yield f"mlp.shared.{part}_bias", of(family.shared_experts_pattern, name, end=bias)
        if family.shared_experts_gate_pattern:
            yield "mlp.shared_gate", of(family.shared_experts_gate_pattern)
    # Where gate and up are one tensor, expert_w1 names it, also for all experts in one tensor.
    inward, fused = ("gate", family.expert_fused_w1), family.expert_fused_w2
    if not family.expert_w3:
        inward, fused = ("gate_up", family.expert_w1), family.expert_w2
    listed = [(inward[0], family.expert_w1), ("down", family.expert_w2), ("up", family.expert_w3)]
    for part, name in listed:
        if name:
            each = (family.expert_pattern, r"\d+", name)
            yield f"{LISTED}{part}", of(*each)
            yield f"{LISTED}{part}_bias", of(*each, end=bias)
    for part, name in (("gate_up" if family.expert_w1 else "up", inward[1]), ("down", fused)):
        if name:
            yield f"{FUSED}{part}", of(family.expert_pattern, name, end=r"(?:\.weight)?")
            yield f"{FUSED}{part}_bias", of(family.expert_pattern, name, end=r"(?:_bias|\.bias)")


def _number(text: str) -> int:
    return int(text) if len(text) < 10 else 10**9
