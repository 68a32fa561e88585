"""Read the small models that both sides compute from `shapes.yml` and `newer_shapes.yml`."""

from __future__ import annotations

import copy
import dataclasses
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

HERE = Path(__file__).parent

ROWS = 8
LENGTH = 16
VOCAB = 96
PROMPTS = 2
PROMPT_LENGTH = 12
NEW_TOKENS = 32
UPDATES = 10
LEARNING_RATE = 0.02


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Describe one small model.

    Attributes:
        family: `model_type` of its configuration class.
        name: the shape's name, unique in the family.
        about: what it tests.
        settings: arguments of the configuration class, in addition to `COMMON`.
        seed: the seed of its weights and tokens.
        around: arguments of the class that are not the text decoder's, where it has other parts;
            `settings` are its `text_config` then.
        zero_centered: regular expression of the norms that multiply by 1 + weight, if any do.
    """

    family: str
    name: str
    about: str
    settings: dict[str, Any]
    seed: int
    around: dict[str, Any] = dataclasses.field(default_factory=dict)
    zero_centered: str | None = None

    @property
    def id(self) -> str:
        """Return the name in test ids and file names."""
        return f"{self.family}-{self.name}"

    @property
    def config(self) -> dict[str, Any]:
        """Return the keyword arguments of the configuration class."""
        return self.config_with(self.settings)

    def config_with(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Return those of a model with other settings."""
        text = copy.deepcopy(COMMON | settings)  # classes of transformers write into it
        if not self.around:
            return text
        tied = {"tie_word_embeddings": text.get("tie_word_embeddings", False)}
        return self.around | tied | {"text_config": text}

    def tokens(self) -> np.ndarray:
        """Draw ids [B, S + 1]: of a sequence, inputs omit the last token and targets the first."""
        seed = zlib.crc32(f"{self.id} tokens {self.seed}".encode())
        rng = np.random.Generator(np.random.PCG64(seed))
        return rng.integers(0, VOCAB, (ROWS, LENGTH + 1))


COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    # No token is EOS, and none is excluded from the gradient as padding.
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
}


def _read(name: str) -> tuple[Shape, ...]:
    return tuple(Shape(**each) for each in yaml.safe_load((HERE / name).read_text())["shapes"])


NEWER = _read("newer_shapes.yml")
"""Of families beyond the first twelve."""

SHAPES = (*_read("shapes.yml"), *NEWER)
"""All shapes; `shapes.yml` says how they were chosen."""

FAMILIES = tuple(dict.fromkeys(shape.family for shape in SHAPES))
"""In the order of `SHAPES`."""

TRAINED = (
    *("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"),
    # Experts of sparsemixer are weighed otherwise in transformers' training.
    *(shape.family for shape in NEWER if shape.family != "phimoe"),
)
"""Families whose gradients and updates are compared too."""


def each_shape(
    shapes: Iterable[Shape] = SHAPES,
    also: Sequence[int] = (),
    quick: Sequence[int] = (),
    newer: Sequence[int] = (),
) -> pytest.MarkDecorator:
    """Run a test for each shape; what is not quick is part of `make test-parity-all` alone.

    Args:
        shapes: the shapes.
        also: sizes of the expert axis, a second argument; empty: there is none, and the shapes of
            the first twelve families are quick.
        quick: sizes that are quick for the first twelve families.
        newer: sizes that are quick for the first shape of each newer family.
    """
    first = {shape.family: shape for shape in reversed(NEWER)}

    def is_quick(shape: Shape, size: Sequence[int]) -> bool:
        if shape not in NEWER:
            return not size or {*size} <= {*quick}
        return shape is first[shape.family] and {*size} <= {*newer} and bool(size)

    def case(shape: Shape, *size: int) -> Any:
        marks = [] if is_quick(shape, size) else [pytest.mark.parity_all]
        return pytest.param(shape, *size, marks=marks, id="-".join((shape.id, *map(str, size))))

    if not also:
        return pytest.mark.parametrize("shape", [case(shape) for shape in shapes])
    return pytest.mark.parametrize(
        ("shape", "experts"), [case(shape, size) for shape in shapes for size in also]
    )
