"""Describe in lines, for people, what was found in a model directory."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

from moe_shard.autoep.fused import Fused
from moe_shard.autoep.headers import TensorHeader
from moe_shard.autoep.quantized import Quantized
from moe_shard.autoep.tensor_names import FUSED, LISTED, Names
from moe_shard.autoep.tensor_plan import TensorPlan
from moe_shard.config.model_config import ModelConfig
from moe_shard.config.moe_config import MoEConfig
from moe_shard.units import human_ranges

_NUMBER = re.compile(r"\.[0-9]+\.")


def report_lines(
    *,
    family: str,
    model: ModelConfig,
    names: Names,
    headers: Mapping[str, TensorHeader],
    plan: TensorPlan,
    fused: Fused | None,
    dtype: str,
) -> tuple[str, ...]:
    """Write lines about family, layers, experts, router, shared experts, biases and tensors.

    Args:
        family: the family's name.
        model: the decoder.
        names: its tensors by role, sorted.
        headers: its tensors' headers.
        plan: which tensor fills which parameter.
        fused: how fused experts are stored; None: experts are stored one by one.
        dtype: dtype of the weights.
    """
    moe = model.moe
    assert moe is not None, "a model of a family has experts"
    with_experts = [layer for layer, kind in enumerate(model.layer_kinds) if kind.moe]
    layers = model.num_decoder_layers
    which = "all"
    if len(with_experts) < layers:
        which = f"{len(with_experts)}: {human_ranges(with_experts, most=4)}"
    stored = f"in one tensor, {fused.words}" if fused else "one by one"
    of = FUSED if fused else LISTED
    inward = _example(names, *(f"{of}{part}" for part in ("gate", "gate_up", "up")))
    return (
        f"family: {family}; layers: {layers}, with experts in {which}{_mixers(model)}",
        f"experts: {moe.num_experts} of hidden size {moe.moe_mlp_dim}, {stored}: {inward}",
        f"router: {', '.join(_router(moe))}: {_example(names, 'mlp.router.kernel')}",
        f"shared experts: {_shared(moe, names)}",
        f"biases: {', '.join(_biases(model, names)) or 'none'}",
        _weights(headers, plan, dtype),
    )


def _mixers(model: ModelConfig) -> str:
    """Name what mixes tokens other than attention, with the layers that have it."""
    layers: dict[str, list[int]] = {}
    for number, kind in enumerate(model.layer_kinds):
        layers.setdefault(kind.mixer, []).append(number)
    others = {mixer: numbers for mixer, numbers in layers.items() if mixer != "attention"}
    return "".join(
        f"; {mixer} in {len(numbers)}: {human_ranges(numbers, most=4)}"
        for mixer, numbers in others.items()
    )


def _router(moe: MoEConfig) -> Iterator[str]:
    router = moe.router
    groups, kept = router.groups
    of = " of what a norm of its own gives" if router.router_norm else ""
    yield f"{router.routed_score_func} scores{of}, top {moe.num_experts_per_tok}"
    if groups > 1:
        best = "best expert" if router.routing_group_score == "max" else "best two experts"
        yield f"in {kept} of {groups} groups by their {best}"
    if router.norm_topk_prob:
        yield "weights over their sum"
    if router.routed_scaling_factor != 1:
        yield f"times {router.routed_scaling_factor:g}"
    if router.router_expert_scale:
        yield "times each expert's factor"
    if router.routed_score_on_input:
        yield "on what experts take in"


def _shared(moe: MoEConfig, names: Names) -> str:
    if not moe.shared_experts:
        return "none"
    gate = f", weighed by {_example(names, 'mlp.shared_gate')}" if moe.shared_expert_gate else ""
    where = _example(names, "mlp.shared.gate", "mlp.shared.gate_up", "mlp.shared.up")
    return f"{moe.shared_experts} as one MLP of hidden size {moe.shared_dim}{gate}: {where}"


def _biases(model: ModelConfig, names: Names) -> Iterator[str]:
    if model.attention.attention_bias:
        yield "latents" if model.attention.attention_type == "mla" else "queries, keys, values"
    if model.attention.attention_out_bias:
        yield "attention output"
    if model.gating.mlp_bias:
        yield "MLPs and experts"
    assert model.moe is not None, "of `report_lines`"
    if model.moe.router.router_bias:
        yield "router"
    if model.moe.router.routed_bias:
        yield f"choice of experts ({_example(names, 'mlp.router.correction_bias')})"
    if model.logits_bias:
        yield "logits"


def _weights(headers: Mapping[str, TensorHeader], plan: TensorPlan, dtype: str) -> str:
    used = dict.fromkeys(piece.tensor for piece in plan.pieces)
    elements = sum(math.prod(headers[name].shape) for name in used)
    line = f"weights: {elements:,} in {len(used):,} tensors, {dtype}"
    stored = [entry for name in used if isinstance(entry := headers[name], Quantized)]
    if stored:
        line += f"; {len(stored):,} of them stored as {stored[0].scheme.words}"
    if carried := [name for name in plan.carried if name not in used]:
        line += f"; {len(carried):,} more tensors are carried: {_general(carried[0])}"
        line += ", ..." if len(carried) > 1 else ""
    return line


def _example(names: Names, *roles: str) -> str:
    """Return the names of the tensors of the first role that has any."""
    places: Mapping[tuple[int, ...], str] = next(
        (names.roles[role] for role in roles if names.roles.get(role)), {}
    )
    return _general(next(iter(places.values()), "none"))


def _general(name: str) -> str:
    return _NUMBER.sub(".*.", _NUMBER.sub(".*.", name))
