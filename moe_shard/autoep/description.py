"""Describe a model directory as one object: what `moe-shard detect` shows of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_shard.autoep.detect import Detected
from moe_shard.autoep.headers import TensorHeader
from moe_shard.autoep.quantized import Quantized
from moe_shard.config.schema import Config
from moe_shard.data.tokenizer import tokenizer_file
from moe_shard.units import human_bytes, human_count

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
    model, moe = config.model, config.model.moe
    assert moe is not None, "a model of a family has experts"
    used = {piece.tensor for piece in found.plan.pieces}
    copies = {piece.tensor for piece in found.plan.copies}
    kinds = [kind.moe for kind in model.layer_kinds]
    quantized = [entry for entry in found.headers.values() if isinstance(entry, Quantized)]
    stored = [part for entry in found.headers.values() for part in _stored(entry)]
    tensors, sizes = Counter[str](), Counter[str]()
    for entry in stored:
        tensors[entry.dtype] += 1
        sizes[entry.dtype] += entry.end - entry.begin
    return {
        "directory": str(directory),
        "family": found.family,
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
        "dtype": found.dtype,
        "stored": {
            dtype: {"tensors": tensors[dtype], "bytes": size} for dtype, size in sizes.most_common()
        },
        "quantization": quantized[0].scheme.words if quantized else None,
        "tied_head": model.logits_via_embedding,
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


def description_lines(directory: Path, config: Config, found: Detected) -> Iterator[str]:
    """Yield the description in lines, for people.

    Args:
        directory: the directory.
        config: the configuration of a run that begins with it.
        found: the result of `detect`.
    """
    told = describe_directory(directory, config, found)
    dims, stored = told["dims"], told["stored"]
    yield from found.lines
    wide, usual = ((dims[f"{of}head"], dims[f"{of}kv_heads"]) for of in ("global_", ""))
    of_global = f" (of {wide[0]} on {wide[1]} in global layers)" if wide != usual else ""
    yield (
        f"dims: model {dims['model']:,}, vocabulary {dims['vocab']:,}, {dims['query_heads']} heads "
        f"of {dims['head']} on {dims['kv_heads']}{of_global}, dense MLP {dims['dense_mlp']:,}, "
        f"positions {dims['positions']:,}; attention {told['attention']}"
    )
    yield f"head: {'the embedding' if told['tied_head'] else 'its own'}"
    yield (
        f"files: {human_count(told['files'], 'file')}, {human_bytes(told['bytes'])}: "
        + ", ".join(
            f"{human_count(each['tensors'], 'tensor')} in {dtype}" for dtype, each in stored.items()
        )
    )
    yield f"tokenizer: {told['tokenizer'] or _NO_TOKENIZER}"
    yield (
        f"training: computes in {config.model.dtype}, parameters in {config.model.weight_dtype}; "
        f"float32 parameters take {human_bytes(4 * told['parameters'])}, AdamW's moments twice that"
    )


def _stored(entry: TensorHeader) -> tuple[TensorHeader, ...]:
    """Return a tensor as it is stored: quantized numbers are two."""
    return (entry.bits, entry.scales) if isinstance(entry, Quantized) else (entry,)
