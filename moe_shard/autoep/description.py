"""Describe a model directory, or a config.json alone, as `moe-shard detect` shows it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moe_shard.autoep.config_alone import Described
from moe_shard.autoep.detect import Detected
from moe_shard.autoep.headers import TensorHeader
from moe_shard.autoep.param_shapes import count_parameters
from moe_shard.autoep.quantized import Quantized
from moe_shard.config.schema import Config
from moe_shard.data.tokenizer import tokenizer_file
from moe_shard.units import human_bytes, human_count, human_ranges

_NO_TOKENIZER = "none that is read; training on text asks for tokenizer_path"


def describe_directory(directory: Path, config: Config, found: Detected) -> dict[str, Any]:
    """Describe a model directory in plain types.

    Args:
        directory: the directory.
        config: the configuration of a run that begins with it.
        found: the result of `detect`.

    Returns:
        The family, layers, experts and dims (in elements), dtypes, the tensors by what becomes of
        them, and sizes in bytes; `settings` has every key of `base.yml` that the model decides.
    """
    used = {piece.tensor for piece in found.plan.pieces}
    copies = {piece.tensor for piece in found.plan.copies}
    quantized = [entry for entry in found.headers.values() if isinstance(entry, Quantized)]
    stored = [part for entry in found.headers.values() for part in _stored(entry)]
    tensors, sizes = Counter[str](), Counter[str]()
    for entry in stored:
        tensors[entry.dtype] += 1
        sizes[entry.dtype] += entry.end - entry.begin
    return {
        "directory": str(directory),
        "family": found.family,
        **_describe_model(config),
        "dtype": found.dtype,
        "stored": {
            dtype: {"tensors": tensors[dtype], "bytes": size} for dtype, size in sizes.most_common()
        },
        "quantization": quantized[0].scheme.words if quantized else None,
        "tokenizer": tokenizer.name if (tokenizer := tokenizer_file(directory)) else None,
        "parameters": sum(math.prod(found.headers[name].shape) for name in used),
        "tensors": {
            "all": len(found.headers),
            "used": len(used),
            "copies": sorted(copies),
            "carried": list(found.plan.carried),
        },
        "files": len({entry.file for entry in stored}),
        "bytes": sum(sizes.values()),
        "settings": found.settings,
        "notes": list(found.notes),
    }


def describe_alone(where: Path, config: Config, found: Described) -> dict[str, Any]:
    """Describe a model by its config.json in plain types.

    Args:
        where: the file.
        config: the configuration of a run of the model.
        found: the result of `describe_config`.

    Returns:
        What `describe_directory` returns but for what only tensors say.
    """
    tokenizer = tokenizer_file(where.parent)
    return {
        "config": str(where),
        "family": found.family,
        **_describe_model(config),
        "dtype": config.model.dtype,
        "tokenizer": tokenizer.name if tokenizer else None,
        "parameters": count_parameters(config.model),
        "settings": found.settings,
    }


def _describe_model(config: Config) -> dict[str, Any]:
    model, moe = config.model, config.model.moe
    assert moe is not None, "a model of a family has experts"
    kinds = [kind.moe for kind in model.layer_kinds]
    return {
        "layers": {
            "all": model.num_decoder_layers,
            "with_experts": [layer for layer, moe_there in enumerate(kinds) if moe_there],
        },
        "experts": {
            "routed": moe.num_experts,
            "per_token": moe.num_experts_per_tok,
            "shared": moe.shared_experts,
            "hidden_size": moe.moe_mlp_dim,
        },
        "dims": {
            "model": model.emb_dim,
            "dense_mlp": model.mlp_dim,
            "vocab": model.vocab_size,
            "query_heads": model.attention.num_query_heads,
            "kv_heads": model.attention.num_kv_heads,
            "head": model.attention.head_dim,
            "global_kv_heads": model.attention.in_layers("global").num_kv_heads,
            "global_head": model.attention.in_layers("global").head_dim,
            "positions": model.attention.rope.max_position_embeddings,
        },
        "attention": model.attention.attention_type,
        "tied_head": model.logits_via_embedding,
    }


def description_lines(told: Mapping[str, Any], config: Config, found: Detected) -> Iterator[str]:
    """Yield the description in lines, for people.

    Args:
        told: the result of `describe_directory`.
        config: the configuration of a run that begins with it.
        found: the result of `detect`.
    """
    yield from found.lines
    yield from _model_lines(told)
    yield (
        f"files: {human_count(told['files'], 'file')}, {human_bytes(told['bytes'])}: "
        + ", ".join(
            f"{human_count(each['tensors'], 'tensor')} in {dtype}"
            for dtype, each in told["stored"].items()
        )
    )
    yield from _run_lines(told, config)


def lines_alone(told: Mapping[str, Any], config: Config, found: Described) -> Iterator[str]:
    """Yield the description of a config.json in lines, for people.

    Args:
        told: the result of `describe_alone`.
        config: the configuration of a run of the model.
        found: the result of `describe_config`.
    """
    experts, layers = told["experts"], told["layers"]
    of = len(layers["with_experts"])
    which = human_ranges(layers["with_experts"], most=4) if of < layers["all"] else "all"
    shared = f", {experts['shared']} shared" if experts["shared"] else ""
    yield found.line
    yield (
        f"experts: {experts['routed']} of hidden size {experts['hidden_size']:,}, "
        f"{experts['per_token']} a token{shared}, in {of} of {layers['all']} layers: {which}"
    )
    yield from _model_lines(told)
    yield from _run_lines(told, config)


def _model_lines(told: Mapping[str, Any]) -> Iterator[str]:
    dims = told["dims"]
    wide, usual = ((dims[f"{of}head"], dims[f"{of}kv_heads"]) for of in ("global_", ""))
    of_global = f" (of {wide[0]} on {wide[1]} in global layers)" if wide != usual else ""
    yield (
        f"dims: model {dims['model']:,}, vocabulary {dims['vocab']:,}, {dims['query_heads']} heads "
        f"of {dims['head']} on {dims['kv_heads']}{of_global}, dense MLP {dims['dense_mlp']:,}, "
        f"positions {dims['positions']:,}; attention {told['attention']}"
    )
    yield f"head: {'the embedding' if told['tied_head'] else 'its own'}"


def _run_lines(told: Mapping[str, Any], config: Config) -> Iterator[str]:
    yield f"tokenizer: {told['tokenizer'] or _NO_TOKENIZER}"
    yield (
        f"training: computes in {config.model.dtype}, parameters in {config.model.weight_dtype}; "
        f"float32 parameters take {human_bytes(4 * told['parameters'])}, AdamW's moments twice that"
    )


def _stored(entry: TensorHeader) -> tuple[TensorHeader, ...]:
    """Return a tensor as it is stored: quantized numbers are two."""
    return (entry.bits, entry.scales) if isinstance(entry, Quantized) else (entry,)
