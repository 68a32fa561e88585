"""Mix datasets by weights: of the sequences of a run, each gives its share, in a fixed order.

Which dataset sequence i is from, and which of its sequences, follows from i and the weights alone
(Grain's `MapDataset.mix`), so that batches do not depend on the number of processes, nor on where a
run was resumed. Each dataset is read in epochs of its own, as often as its weight asks for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import grain

from moe_shard.config.schema import DataConfig
from moe_shard.data.corpus import Say
from moe_shard.data.sequences import TextSequences


def parts_of(config: DataConfig) -> list[DataConfig]:
    """Return the configuration of each dataset; one where there are no weights."""
    if not config.dataset_weights:
        return [config]
    return [
        dataclasses.replace(config, dataset_path=(path,), dataset_weights=())
        for path in config.dataset_path
    ]


def cut_parts(
    config: DataConfig, cut: Callable[[DataConfig, Say], TextSequences], say: Say
) -> list[TextSequences]:
    """Cut each dataset into sequences.

    Args:
        config: the datasets and their weights.
        cut: cuts one.
        say: receives its lines, those of several under the name of each.
    """
    parts = parts_of(config)
    if len(parts) == 1:
        return [cut(parts[0], say)]
    found = []
    for number, (part, share) in enumerate(zip(parts, shares(config), strict=True), 1):
        name = f"mixture {number} of {len(parts)}"
        say(f"{name}: {share:.1%} of the sequences, from {part.dataset_path[0]}")
        found.append(cut(part, partial(_say_of, name, say)))
    return found


def _say_of(name: str, say: Say, line: str) -> None:
    say(f"{name}: {line}")


def shares(config: DataConfig) -> list[float]:
    """Return the share of each dataset in the sequences."""
    total = sum(config.dataset_weights)
    return [weight / total for weight in config.dataset_weights] or [1.0]


def stream_of(config: DataConfig, texts: Sequence[TextSequences]) -> Any:
    """Return the sequences of a run, without end, in an order that the seed decides.

    Args:
        config: weights and seed.
        texts: the datasets.
    """
    streams = [grain.MapDataset.source(text).shuffle(config.seed).repeat() for text in texts]
    return streams[0] if len(streams) == 1 else grain.MapDataset.mix(streams, shares(config))


def mean_bytes_per_token(config: DataConfig, texts: Sequence[TextSequences]) -> float:
    """Return the bytes of text per token over the sequences of a run; 0 of conversations."""
    pairs = zip(texts, shares(config), strict=True)
    return sum(text.bytes_per_token * share for text, share in pairs)
