"""Compare one small model of every family with recorded numbers of transformers, without torch.

`make record-parity` makes the numbers; four of the families are part of `make test`, the others of
`make test-recorded`. The weights are drawn again from the tensors' names.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.parity import weights
from tests.parity.compare import assert_forward
from tests.parity.families import FAMILIES as SHAPES_OF
from tests.parity.families import PROMPT_LENGTH, PROMPTS
from tests.parity.package import evaluate, greedy, open_model

RECORDED = sorted((Path(__file__).parent / "recorded").glob("*.npz"))
# These have every kind of attention, router and experts; the others combine them differently.
FIRST = ("deepseek_v3", "gpt_oss", "llama4_text", "mixtral")
FAMILIES = [
    pytest.param(path, id=path.stem, marks=[] if path.stem in FIRST else pytest.mark.recorded)
    for path in RECORDED
]


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Make each recorded model's directory once, and return it with its numbers."""
    made: dict[Path, SimpleNamespace] = {}

    def get(path: Path) -> SimpleNamespace:
        if path not in made:
            made[path] = rebuild(path, tmp_path_factory.mktemp(path.stem))
        return made[path]

    return get


def rebuild(path: Path, directory: Path) -> SimpleNamespace:
    with np.load(path) as recorded:
        known = dict(recorded)
    model = json.loads(str(known["model"]))
    (directory / "config.json").write_text(json.dumps(model["config"]))
    tensors = {
        name: weights.tensor(name, entry["shape"], model["seed"], model.get("zero_centered"))
        for name, entry in model["tensors"].items()
    }
    weights.write(directory / model["file"], tensors)
    aux = known["aux_loss"]
    return SimpleNamespace(
        directory=directory,
        inputs=known["inputs"].astype(np.int32),
        targets=known["targets"].astype(np.int32),
        logits=known["logits"],
        router_logits=known["router_logits"],
        ce_loss=float(known["ce_loss"]),
        aux_loss=None if np.isnan(aux) else float(aux),
        greedy=known["greedy"].astype(np.int32),
    )


def test_every_family_that_is_compared_is_recorded() -> None:
    assert [path.stem for path in RECORDED] == sorted(SHAPES_OF)


@pytest.mark.parametrize("path", FAMILIES)
def test_forward(path: Path, rebuilt: Any) -> None:
    """Run with 8-way expert parallelism; `tests/parity` compares other sizes live."""
    known = rebuilt(path)
    opened = open_model(known.directory, 8)
    assert_forward(evaluate(opened, known.inputs, known.targets), known, opened.config)


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "llama4_text"])
def test_greedy(family: str, rebuilt: Any) -> None:
    """Use three kinds of caches: latents; windows and sinks; chunks and layers without RoPE."""
    known = rebuilt(next(path for path in RECORDED if path.stem == family))
    opened = open_model(known.directory, 8)
    prompts = known.inputs[:PROMPTS, :PROMPT_LENGTH]
    np.testing.assert_array_equal(greedy(opened, prompts, cached=True), known.greedy)
