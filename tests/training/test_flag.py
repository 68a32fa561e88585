"""Check that the flag changes no byte of the training step where it must have no effect."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_shard.config import Config, configs_dir, load_config
from moe_shard.config.mesh_config import MESH_AXES
from moe_shard.program.step import make_program
from tests.models.build import QUICK, SMALL, annotator

FLAG = "moe_dispatch_no_expert_sharding"


def texts(config: Config) -> tuple[str, str]:
    """Return the text of the step as lowered and as compiled."""
    program = make_program(config, annotator(config))
    lowered = program.step.lower(program.abstract_state, program.abstract_batch)
    return lowered.as_text(debug_info=True), lowered.compile(QUICK).as_text() or ""


def keys(**sizes: int) -> list[str]:
    mesh = [f"ici_{axis}_parallelism={sizes.get(axis, 1)}" for axis in MESH_AXES]
    return [*mesh, *SMALL, "base_num_decoder_layers=2"]


def test_a_model_without_the_flag_is_the_model_with_the_flag_false(tmp_path: Path) -> None:
    model = (configs_dir() / "models" / "mixtral-tiny.yml").read_text()
    without = [line for line in model.splitlines() if not line.startswith(f"{FLAG}:")]
    assert len(without) == len(model.splitlines()) - 1
    path = tmp_path / "without.yml"
    path.write_text("\n".join(without))
    configs = [
        load_config(str(path), keys(expert=8)),
        load_config("mixtral-tiny", [*keys(expert=8), f"{FLAG}=false"]),
    ]
    absent, false = [texts(config) for config in configs]
    assert absent == false


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_without_an_expert_axis_the_flag_changes_no_byte_of_the_step(
    sizes: dict[str, int],
) -> None:
    off, on = [
        texts(load_config("mixtral-tiny", [*keys(**sizes), f"{FLAG}={value}"]))
        for value in ("false", "true")
    ]
    assert off == on
