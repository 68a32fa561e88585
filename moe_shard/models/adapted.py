"""Add the adapters of LoRA to a decoder layer, beside the weights that `lora_module_path` names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from flax import nnx

from moe_shard.config.keys import shown
from moe_shard.config.lora_config import ADAPTER
from moe_shard.config.model_config import ModelConfig
from moe_shard.config.schema import brief_list
from moe_shard.errors import UserError
from moe_shard.layers.adapter import Adapter
from moe_shard.moe.layer import MoELayer

_OF_ATTENTION = (
    *("query", "key", "value", "query_down", "query_up", "latent_down", "latent_up", "out"),
)
_OF_MLP = ("gate", "up", "down")
PATHS = (
    *(f"attention/{name}" for name in _OF_ATTENTION),
    *(f"mlp/{below}{name}" for below in ("experts/", "shared/", "") for name in _OF_MLP),
)
"""Paths in a layer of the weights that may have adapters."""


def add_adapters(layer: Any, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
    """Add adapters to a layer.

    Args:
        layer: the decoder layer, whose modules have their weights.
        config: the model; `lora` says which weights.
        rngs: source of A.

    Raises:
        UserError: of gate and up of the experts, which share A, one is named alone; or they are
            one parameter.
    """
    mlp = getattr(layer, "mlp", None)
    moe = isinstance(mlp, MoELayer)
    for owner, path, name in _weights(layer):
        if config.lora.adapts(f"{path}/{name}", moe=moe):
            inputs = 2 if path == "attention" and name == "out" else 1
            adapter = Adapter(getattr(owner, name), inputs=inputs, config=config.lora, rngs=rngs)
            setattr(owner, name + ADAPTER, adapter)
    if isinstance(mlp, MoELayer):
        parts = ("gate", "up") if mlp.experts.gating.has_gate else ("up",)
        inward = [config.lora.adapts(f"mlp/experts/{part}") for part in parts]
        if any(inward) != all(inward):
            raise UserError(
                f"lora_module_path={config.lora.lora_module_path} adapts one of gate and up of the "
                "experts, which share A\nfix: a pattern of both, or of neither"
            )
        down = config.lora.adapts("mlp/experts/down")
        mlp.experts.add_adapters(config.lora, inward=all(inward), down=down, rngs=rngs)


def require_adapters(config: ModelConfig, names: Sequence[str]) -> None:
    """Refuse a model none of whose weights has an adapter though it is to have some.

    Args:
        config: the model.
        names: of its parameters.

    Raises:
        UserError: `lora_module_path` is in the path of no weight, or no weight can have one.
    """
    if not config.lora.enable_lora or any(f"{ADAPTER}." in name for name in names):
        return
    there = {name.partition(".")[2].replace(".", "/") for name in names}
    raise UserError(
        f"lora_module_path={shown(config.lora.lora_module_path)} is in the path of no weight"
        f"\nfix: one of {brief_list([path for path in PATHS if path in there], 8)}"
    )


def _weights(layer: Any) -> Iterator[tuple[Any, str, str]]:
    """Yield the owner, path and name of each weight of attention and of MLPs, not of experts."""
    owners: list[tuple[Any, str, Sequence[str]]] = [
        (getattr(layer, "attention", None), "attention", _OF_ATTENTION)
    ]
    mlp = getattr(layer, "mlp", None)
    if isinstance(mlp, MoELayer):
        owners.append((mlp.shared, "mlp/shared", _OF_MLP))
    else:
        owners.append((mlp, "mlp", _OF_MLP))
    for owner, path, names in owners:
        for name in names:
            if getattr(owner, name, None) is not None:
                yield owner, path, name
