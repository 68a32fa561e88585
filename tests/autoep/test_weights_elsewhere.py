"""Read an index that names files in folders below, or, on request, outside of the directory."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from moe_shard.autoep.headers import INDEX, read_headers
from moe_shard.checkpoints.imported import export_model, import_model
from moe_shard.checkpoints.resolve import load_model
from moe_shard.errors import UserError
from moe_shard.models.params import describe
from tests.autoep.checkpoints import BF16, Tensors, read_file, write_file
from tests.autoep.directory import small_models
from tests.models.build import annotator

MODEL = small_models()["mixtral-0"]
KEY = "weights_outside_directory=true"


def write(tmp_path: Path, *names: str) -> tuple[Path, Tensors]:
    """Write a model whose tensors are in files of these names, given from its directory."""
    rng = np.random.default_rng(0)
    tensors = {
        name: (rng.standard_normal(shape) / math.sqrt(shape[-1])).astype(BF16)
        for name, shape in MODEL["saved"].items()
    }
    (where := tmp_path / "model").mkdir()
    (where / "config.json").write_text(json.dumps(MODEL["config"]))
    places: dict[str, str] = {}
    for number, file in enumerate(names):
        part = [*tensors][number :: len(names)]
        (where / file).parent.mkdir(parents=True, exist_ok=True)
        write_file(where / file, {name: tensors[name] for name in part})
        places |= dict.fromkeys(part, file)
    (where / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return where, tensors


def exported(where: Path, tmp_path: Path, *overrides: str) -> Path:
    config = load_model(str(where), ["num_simulated_devices=8", *overrides])
    console = Console(width=200, file=io.StringIO())
    specs = describe(config.as_stored().model, annotator(config)).specs
    import_model(where, tmp_path / "imported", config, specs, console=console)
    export_model(tmp_path / "imported", tmp_path / "out", console=console)
    return tmp_path / "out"


@pytest.mark.parametrize("leaves", [False, True])
def test_files_elsewhere_are_read_and_exported_beside_the_rest(
    leaves: bool, tmp_path: Path
) -> None:
    away = "../shared/more.safetensors" if leaves else "parts/deep/more.safetensors"
    where, tensors = write(tmp_path, "one.safetensors", away)
    if leaves:
        with pytest.raises(UserError) as caught:
            load_model(str(where))
        assert f"{away} is not the name of a file beside it, and leads out" in str(caught.value)
        assert f"fix: {KEY} if its weights lie there" in str(caught.value)
    out = exported(where, tmp_path, *([KEY] if leaves else []))
    found = read_file(out / "one.safetensors") | read_file(out / "more.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor)
    assert read_headers(out).keys() == tensors.keys()


def test_absolute_paths_and_what_is_no_path(tmp_path: Path) -> None:
    away = str(tmp_path / "away" / "all.safetensors")
    where, tensors = write(tmp_path, away)
    with pytest.raises(UserError, match="leads out of it"):
        read_headers(where)
    assert read_headers(where, outside=True).keys() == tensors.keys()
    for name in ("", "/", "..", "a\nb", "."):
        (where / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(UserError):
            read_headers(where, outside=True)
