"""Read and write adapters in peft's format, by the names that a model has in transformers.

A matrix that is a module of its own has `lora_A` [R, in] and `lora_B` [out, R]. All experts of a
layer are one parameter in transformers, so theirs are `lora_A` [E R, in], expert by expert, and
`lora_B` [out, R E], rank by rank; of two such parameters of one module, peft wraps the second
around the first, whose names then have `base_layer`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moe_shard.autoep.family import Family
from moe_shard.autoep.headers import TensorHeader, read_file
from moe_shard.autoep.host_blocks import ParamPath
from moe_shard.autoep.manifest import make_file, new_header
from moe_shard.autoep.strict_json import read_object
from moe_shard.autoep.tensor_names import unwrapped
from moe_shard.autoep.tensor_plan import Piece, TensorPlan
from moe_shard.autoep.tensors import view, writable
from moe_shard.config.keys import shown
from moe_shard.config.lora_config import ADAPTER, LoraConfig
from moe_shard.errors import UserError
from moe_shard.files import write_text

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_FIRST = "base_model.model."
Adapters = Mapping[ParamPath, np.ndarray]
"""Path of a parameter, such as ("layers", "attention", "query_lora", "a") -> all of it, float32."""


@dataclass(frozen=True)
class AdapterTensor:
    """Describe one tensor of a file: A or B of one layer.

    Attributes:
        params: the parameters that it holds, gate before up.
        layer: index in the stack of layers.
        kind: "a" or "b" of a matrix, "experts_a" or "experts_b" of all experts.
        interleaved: whether outputs of gate and up take turns.
    """

    params: tuple[ParamPath, ...]
    layer: int
    kind: str
    interleaved: bool = False

    def made_of(self, adapters: Adapters) -> np.ndarray:
        """Return the tensor."""
        values = [adapters[path][self.layer] for path in self.params]
        if self.kind == "a":
            return values[0].reshape(-1, values[0].shape[-1]).T
        if self.kind == "b":
            return values[0].reshape(values[0].shape[0], -1).T
        if self.kind == "experts_a":  # [E in R]
            return values[0].transpose(0, 2, 1).reshape(-1, values[0].shape[1])
        both = np.stack(values, axis=-1 if self.interleaved else -2)  # [E R H 2] or [E R 2 H]
        flat = both.reshape(*both.shape[:2], -1)
        return flat.transpose(2, 1, 0).reshape(flat.shape[2], -1)

    def into(self, adapters: Adapters, tensor: np.ndarray, name: str) -> None:
        """Fill the parameters of one layer from a tensor.

        Raises:
            UserError: it has another shape.
        """
        targets = [adapters[path][self.layer] for path in self.params]
        first = targets[0]
        if tensor.shape != (wanted := self.made_of(adapters).shape):
            raise UserError(
                f"{shown(name)} has shape {shown(tensor.shape)}, and here it would be "
                f"{shown(wanted)}\nfix: lora_rank and lora_module_path as in its {ADAPTER_CONFIG}"
            )
        if self.kind in ("a", "b"):
            first[...] = tensor.T.reshape(first.shape)
        elif self.kind == "experts_a":
            first[...] = tensor.reshape(first.shape[0], -1, first.shape[1]).transpose(0, 2, 1)
        else:
            experts, rank, outs = first.shape
            flat = tensor.reshape(-1, rank, experts).transpose(2, 1, 0)  # [E R outs of all]
            split = (outs, len(targets)) if self.interleaved else (len(targets), outs)
            both = flat.reshape(experts, rank, *split)
            for number, target in enumerate(targets):
                target[...] = both[..., number] if self.interleaved else both[:, :, number]


@dataclass
class AdapterPlan:
    """Hold how a model's adapters are called in peft's files.

    Attributes:
        tensors: name -> how it is made of parameters.
        modules: ends of the names of modules that have adapters.
        parameters: the same of parameters that are no module's `weight`.
    """

    tensors: dict[str, AdapterTensor] = field(default_factory=dict)
    modules: dict[str, None] = field(default_factory=dict)
    parameters: dict[str, None] = field(default_factory=dict)


def plan_adapters(plan: TensorPlan, paths: frozenset[ParamPath], family: Family) -> AdapterPlan:
    """Find the names of a model's adapters.

    Args:
        plan: plan of the checkpoint that the model began with.
        paths: paths of the adapters' parameters.
        family: its family.

    Raises:
        UserError: transformers has no module of its own for a matrix that has an adapter.
    """
    found = AdapterPlan()
    for piece in plan.pieces:
        *owner, weight = piece.param
        path = (*owner, weight + ADAPTER)
        if (*path, "a") in paths and "experts" not in owner:
            _add_matrix(found, piece, path)
        elif owner[-1:] == ["experts"] and weight in ("gate", "up", "down"):
            is_first = piece.index[1:] in ((), (0,)) and weight != "gate"
            if is_first:
                _add_experts(found, piece, tuple(owner), paths, family)
    return found


def _add_matrix(found: AdapterPlan, piece: Piece, path: ParamPath) -> None:
    name = unwrapped(piece.tensor)
    if piece.layout.take or not name.endswith(".weight"):
        raise UserError(
            f"tensor {shown(piece.tensor)} holds more than {'.'.join(piece.param)}, which has an "
            "adapter of its own\nfix: lora_module_path without it"
        )
    module = name.removesuffix(".weight")
    for kind in ("a", "b"):
        key = f"{_FIRST}{module}.lora_{kind.upper()}.weight"
        found.tensors[key] = AdapterTensor(((*path, kind),), piece.index[0], kind)
    found.modules[".".join(module.split(".")[-2:])] = None


def _add_experts(
    found: AdapterPlan,
    piece: Piece,
    owner: ParamPath,
    paths: frozenset[ParamPath],
    family: Family,
) -> None:
    """Add the adapters of all experts of a layer: those of up, with gate's, or those of down."""
    inward = piece.param[-1] == "up"
    lora = (*owner, ("inward" if inward else "down") + ADAPTER)
    if (*lora, "a") not in paths:
        return
    module = _experts_module(unwrapped(piece.tensor), family)
    parameter = "gate_up_proj" if inward else "down_proj"
    both = all((*owner, name + ADAPTER, "a") in paths for name in ("inward", "down"))
    wrapped = ".base_layer" if inward and both else ""
    outs = [name for name in ("b", "b_up") if (*lora, name) in paths]
    layer = piece.index[0]
    place = f"{_FIRST}{module}{wrapped}"
    found.tensors[f"{place}.lora_A.weight"] = AdapterTensor(((*lora, "a"),), layer, "experts_a")
    found.tensors[f"{place}.lora_B.weight"] = AdapterTensor(
        tuple((*lora, name) for name in outs),
        layer,
        "experts_b",
        inward and len(outs) == 2 and family.expert_gate_up_interleaved,
    )
    found.parameters[".".join([*module.split(".")[-2:], parameter])] = None


def _experts_module(tensor: str, family: Family) -> str:
    """Return the module that has the experts in transformers, from the name of a tensor of them.

    Where a family's files call the MoE layer one of several names, the last is transformers' own.
    """
    module, _, _ = tensor.partition(".experts.")
    for old, new in re.findall(r"\((\w+)\|(\w+)\)", family.moe_layer_pattern):
        module = re.sub(rf"\.{old}$", f".{new}", module)
    return f"{module}.experts"


def write_adapters(
    directory: Path, plan: AdapterPlan, adapters: Adapters, lora: LoraConfig, *, base: str
) -> None:
    """Write the files of peft.

    Args:
        directory: where.
        plan: the names.
        adapters: the parameters.
        lora: rank and alpha.
        base: the model that they are of, for `base_model_name_or_path`.
    """
    made = {name: plan.tensors[name].made_of(adapters) for name in sorted(plan.tensors)}
    file = directory / ADAPTER_WEIGHTS
    header = new_header(
        {name: TensorHeader(file, "F32", each.shape, 0, 0) for name, each in made.items()},
        {"format": "pt"},
    )
    make_file(file, header)
    for name, entry in read_file(file).items():
        writable(entry)[...] = made[name]
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.lora_rank,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(plan.modules),
        "target_parameters": sorted(plan.parameters, key=lambda name: not name.endswith("up_proj"))
        or None,
        "inference_mode": True,
    }
    write_text(directory / ADAPTER_CONFIG, json.dumps(settings, indent=2) + "\n")


_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "use_rslora": (False, None),
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": (None, []),
    "layers_to_transform": (None,),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
}
"""Settings of peft with the values that mean plain LoRA."""


def read_adapters(directory: Path, plan: AdapterPlan, adapters: Adapters, lora: LoraConfig) -> str:
    """Read the files of peft into parameters.

    Args:
        directory: where they are.
        plan: the names of the parameters.
        adapters: receives the values.
        lora: rank and alpha, which have to be those of the files.

    Returns:
        What was read, in words.

    Raises:
        UserError: the files are not there, are of another kind of adapter, rank or alpha, or of
            other weights.
    """
    settings = read_object(directory / ADAPTER_CONFIG)
    for key, neutral in _NEUTRAL.items():
        if key in settings and settings[key] not in neutral:
            raise UserError(
                f"{directory / ADAPTER_CONFIG}: {key}={shown(settings[key])} is another adapter "
                "than LoRA as it is here\nfix: an adapter without it"
            )
    for key, here in (("r", lora.lora_rank), ("lora_alpha", lora.lora_alpha)):
        if settings.get(key) != here:
            ours = {"r": "lora_rank"}.get(key, key)
            raise UserError(
                f"{directory / ADAPTER_CONFIG} has {key}={shown(settings.get(key))}, and "
                f"{ours}={here:g}\nfix: {ours}={shown(settings.get(key))}"
            )
    entries = read_file(directory / ADAPTER_WEIGHTS)
    for names, what in (
        (entries.keys() - plan.tensors.keys(), "is of no weight that has an adapter here"),
        (plan.tensors.keys() - entries.keys(), "is not there"),
    ):
        if names:
            raise UserError(
                f"{directory / ADAPTER_WEIGHTS}: {shown(min(names))} {what} ({len(names)} such)\n"
                "fix: a lora_module_path that is in the names of the same weights"
            )
    for name, entry in entries.items():
        plan.tensors[name].into(adapters, view(entry).astype(np.float32), name)
    return f"adapters of {directory}: {len(entries):,} tensors of rank {lora.lora_rank}"


def merged_weight(
    adapters: Adapters, param: ParamPath, bounds: tuple[tuple[int, int], ...], scale: float
) -> np.ndarray | None:
    """Compute what an adapter adds to a part of a weight; None: it has none.

    Args:
        adapters: all adapters.
        param: path of the weight.
        bounds: the part.
        scale: alpha / r.
    """
    *owner, weight = param
    experts = owner[-1:] == ["experts"]
    module = {"gate": "inward", "up": "inward"}.get(weight, weight) if experts else weight
    a = adapters.get((*owner, module + ADAPTER, "a"))
    both = (*owner, module + ADAPTER, "b_up") in adapters
    second = "b_up" if experts and weight == "up" and both else "b"
    b = adapters.get((*owner, module + ADAPTER, second))
    if a is None or b is None:
        return None
    lead = 2 if experts else 1
    inputs = a.ndim - 1 - lead
    parts = [slice(*bound) for bound in bounds]
    some_a = a[tuple(parts[: lead + inputs])]
    some_b = b[(*parts[:lead], slice(None), *parts[lead + inputs :])]
    flat_a = some_a.reshape(*some_a.shape[:lead], -1, a.shape[-1]).astype(np.float32)
    flat_b = some_b.reshape(*some_b.shape[: lead + 1], -1).astype(np.float32)
    shape = [end - start for start, end in bounds]
    delta: np.ndarray = (flat_a @ flat_b).reshape(shape) * np.float32(scale)
    return delta


def adapter_paths(paths: frozenset[ParamPath]) -> Iterator[ParamPath]:
    """Yield the paths that are of adapters."""
    yield from (path for path in sorted(paths) if any(part.endswith(ADAPTER) for part in path))
