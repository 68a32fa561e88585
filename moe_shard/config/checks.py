"""Find contradictions that show only once the sizes of the mesh are known."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping

from moe_shard.config.attention_config import AttentionConfig
from moe_shard.config.keys import divisors, shown
from moe_shard.config.moe_config import MoEConfig
from moe_shard.config.schema import Config
from moe_shard.config.strategies import find_strategy, imported_strategies
from moe_shard.errors import UserError
from moe_shard.units import human_ranges

_FLAG = "moe_dispatch_no_expert_sharding=true"


def expert_axes(config: Config) -> tuple[str, ...]:
    """Return the mesh axes that split the experts while they compute, whatever their names."""
    return config.mesh.expert_axes


def expert_parallelism(config: Config, sizes: Mapping[str, int]) -> int:
    """Return the number of parts that the experts are split into.

    Args:
        config: the run.
        sizes: mesh axis -> size.
    """
    return math.prod(sizes[axis] for axis in expert_axes(config))


def check_against_mesh(config: Config, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Check experts and batch against a mesh.

    Args:
        config: the run.
        sizes: mesh axis -> size, as `MeshConfig.resolve` returns it.

    Returns:
        Notes, one line each, about settings that change nothing on this mesh.

    Raises:
        UserError: experts or sequences that their mesh axes do not divide, or sequences that
            devices share where layers pass a state over them.
    """
    _check_states(config, sizes)
    _check_indexer(config, sizes)
    batch_axes = ["activation_batch"]
    if config.model.moe is not None:
        batch_axes += ["activation_batch_moe", "activation_batch_no_exp"]
        _check_experts(config, sizes)
    for name in batch_axes:
        _check_batch(config, sizes, name)
    return _notes(config, sizes)


def _check_states(config: Config, sizes: Mapping[str, int]) -> None:
    axes = [axis for axis in config.mesh.axes_of("activation_length") if sizes[axis] > 1]
    kinds = enumerate(config.model.layer_kinds)
    layers = [(number, kind.mixer) for number, kind in kinds if kind.carries_state]
    if axes and layers:
        split = " * ".join(f"{axis}={sizes[axis]}" for axis in axes)
        named = human_ranges([number for number, _ in layers], most=4)
        raise UserError(
            f"{split} splits sequences (rule of activation_length), and "
            f"layer{'s' if len(layers) > 1 else ''} {named} "
            f"({', '.join(sorted({mixer for _, mixer in layers}))})\npass a state from token to "
            "token, which is not done across devices\nfix: "
            + " ".join(f"ici_{axis}_parallelism=1" for axis in axes)
        )


def _check_indexer(config: Config, sizes: Mapping[str, int]) -> None:
    attention, length = config.model.attention, config.train.max_target_length
    axes = [axis for axis in config.mesh.axes_of("activation_length") if sizes[axis] > 1]
    if axes and attention.use_indexer and length > attention.indexer_topk:
        split = " * ".join(f"{axis}={sizes[axis]}" for axis in axes)
        raise UserError(
            f"{split} splits sequences (rule of activation_length), whose tokens an indexer "
            f"chooses among (max_target_length={length}, indexer_topk={attention.indexer_topk})\n"
            "fix: "
            + " ".join(f"ici_{axis}_parallelism=1" for axis in axes)
            + ", or max_target_length of at most indexer_topk"
        )


def _check_experts(config: Config, sizes: Mapping[str, int]) -> None:
    parts = expert_parallelism(config, sizes)
    if config.model.num_experts % parts:
        axes = " * ".join(f"{axis}={sizes[axis]}" for axis in expert_axes(config))
        raise UserError(
            f"num_experts={config.model.num_experts} does not split into {parts} equal parts: "
            f"the rule of {config.mesh.expert_rule} names {axes}\n"
            f"fix: sizes that work for {config.model.num_experts} experts: "
            f"{', '.join(map(str, divisors(config.model.num_experts)))}"
        )


def _check_batch(config: Config, sizes: Mapping[str, int], name: str) -> None:
    num_devices = math.prod(sizes.values())
    rows = config.train.microbatch_rows(num_devices)
    axes = config.mesh.axes_of(name)
    parts = math.prod(sizes[axis] for axis in axes)
    if rows % parts:
        split = " * ".join(f"{axis}={sizes[axis]}" for axis in axes if sizes[axis] > 1)
        enough = -(-rows // parts) * parts
        raise UserError(
            f"per_device_batch_size={config.train.per_device_batch_size:g} on {num_devices} "
            f"devices makes {rows} sequences, which {split} (rule of {name}) do not divide\n"
            f"fix: per_device_batch_size={enough / num_devices:g} makes {enough}"
        )


def _notes(config: Config, sizes: Mapping[str, int]) -> tuple[str, ...]:
    notes = [f"{what} has no effect: {why}" for what, why in _idle_spans(config.model.attention)]
    longest, length = (
        config.model.attention.rope.max_position_embeddings,
        config.train.max_target_length,
    )
    if length > longest:
        notes.append(
            f"max_target_length={length} is beyond the positions that the model is made for "
            f"(max_position_embeddings={longest})"
        )
    if config.train.shard_optimizer_over_data and sizes.get("data", 1) == 1:
        notes.append("shard_optimizer_over_data=true has no effect: the data axis has size 1")
    model = config.model
    if (keys := model.remat.set_keys()) and model.remat_policy != "custom":
        said = ", ".join(f"{key}={getattr(model.remat, key)}" for key in keys)
        notes.append(f"{said} has no effect: remat_policy={model.remat_policy} is not custom")
    moe = config.model.moe
    if moe is None:
        return tuple(notes)
    if moe.moe_dispatch_no_expert_sharding and (why := _flag_is_idle(config, moe, sizes)):
        notes.append(f"{_FLAG} has no effect: {why}")
    notes += [f"{what} has no effect: {why}" for what, why in _idle_keys(moe)]
    if moe.prefuse_moe_weights and not model.gating.has_gate:
        notes.append("prefuse_moe_weights=true has no effect: the experts have no gate")
    return tuple(notes)


def _idle_spans(attention: AttentionConfig) -> Iterator[tuple[str, str]]:
    """Find sizes of spans that no layer has, with the reason for each."""
    for span, key, size in (
        ("sliding", "sliding_window_size", attention.sliding_window_size),
        ("chunked", "chunk_attn_window_size", attention.chunk_attn_window_size),
    ):
        if size and span not in attention.attention_pattern:
            yield f"{key}={size}", f"no layer of attention_pattern is {span}"


def _flag_is_idle(config: Config, moe: MoEConfig, sizes: Mapping[str, int]) -> str:
    """Return why the flag changes nothing; empty where it changes something."""
    if expert_parallelism(config, sizes) == 1:
        axes = ", ".join(expert_axes(config)) or "none"
        return f"the axes in the rule of {config.mesh.expert_rule} ({axes}) have size 1"
    if find_strategy(moe.moe_dispatch).always_moves_tokens:
        return f"moe_dispatch={moe.moe_dispatch} moves tokens in any case"
    batch = {
        row: {axis for axis in config.mesh.axes_of(row) if sizes[axis] > 1}
        for row in ("activation_batch_moe", "activation_batch_no_exp")
    }
    if batch["activation_batch_moe"] == batch["activation_batch_no_exp"]:
        return "activation_batch_moe and activation_batch_no_exp are the same"
    return ""


def _idle_keys(moe: MoEConfig) -> Iterator[tuple[str, str]]:
    """Find keys that are set but only other strategies read, with the reason for each."""
    entry = find_strategy(moe.moe_dispatch)
    others = (each.own_keys for each in imported_strategies())
    foreign = frozenset[str]().union(*others) - entry.own_keys
    why = f"moe_dispatch={entry.name} does not read it"
    for field in dataclasses.fields(moe):
        value = getattr(moe, field.name)
        if field.name in foreign and value != field.default:
            yield f"{field.name}={shown(value)}", why
