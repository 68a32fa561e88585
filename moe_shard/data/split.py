"""Split the documents of `dataset_path` into those to train on and those held out."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moe_shard.config.schema import DataConfig
from moe_shard.data.corpus import Say
from moe_shard.data.found_text import find_text
from moe_shard.data.spans import Documents
from moe_shard.errors import UserError


class SplitDocuments(NamedTuple):
    """Hold the documents of a run.

    Attributes:
        training: documents to train on.
        held_out: documents to evaluate on.
        lines: what was read and what was not, for people.
    """

    training: Documents
    held_out: Documents
    lines: tuple[str, ...] = ()


def split_documents(config: DataConfig, *, say: Say = lambda _: None) -> SplitDocuments:
    """Hold out evenly spaced documents, the same whatever the seed.

    Args:
        config: paths of the text and `eval_holdout_fraction`; with 0, all are trained on.
        say: see `find_text`.

    Raises:
        UserError: see `find_text`; or one of the two parts would be empty.
    """
    documents, lines = find_text(config, config.dataset_path, say=say)
    fraction = config.eval_holdout_fraction
    # Document i is held out where i * fraction passes a whole number: every 20th for 0.05.
    passed = np.floor(np.arange(len(documents) + 1) * fraction + 1e-9)
    out = passed[1:] > passed[:-1]
    training, held_out = documents.select(~out), documents.select(out)
    if fraction and (not len(training) or not len(held_out)):
        raise UserError(
            f"eval_holdout_fraction={fraction:g} holds out {len(held_out)} of {len(documents)} "
            "documents of dataset_path: one part is empty\n"
            "fix: another fraction, more documents, or eval_dataset_path=FILES"
        )
    return SplitDocuments(training, held_out, lines)
