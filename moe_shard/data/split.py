"""Split the documents of `dataset_path` into those to train on and those held out."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from moe_shard.config.schema import DataConfig
from moe_shard.data.documents import find_documents
from moe_shard.errors import UserError


class SplitDocuments(NamedTuple):
    """Hold the documents of a run.

    Attributes:
        training: documents to train on.
        held_out: documents to evaluate on.
    """

    training: tuple[Path, ...]
    held_out: tuple[Path, ...]


def split_documents(config: DataConfig) -> SplitDocuments:
    """Hold out evenly spaced documents, the same whatever the seed.

    Args:
        config: paths of the text and `eval_holdout_fraction`; with 0, all are trained on.

    Raises:
        UserError: see `find_documents`; or one of the two parts would be empty.
    """
    documents = find_documents(config.dataset_path)
    fraction = config.eval_holdout_fraction
    if not fraction:
        return SplitDocuments(documents, ())
    # Document i is held out where i * fraction passes a whole number: every 20th for 0.05.
    out = [int((i + 1) * fraction + 1e-9) > int(i * fraction + 1e-9) for i in range(len(documents))]
    training = tuple(path for path, held in zip(documents, out, strict=True) if not held)
    held_out = tuple(path for path, held in zip(documents, out, strict=True) if held)
    if not training or not held_out:
        raise UserError(
            f"eval_holdout_fraction={fraction:g} holds out {len(held_out)} of {len(documents)} "
            "documents of dataset_path: one part is empty\n"
            "fix: another fraction, more files, or eval_dataset_path=FILES"
        )
    return SplitDocuments(training, held_out)
