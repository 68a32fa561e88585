"""What a checkpoint takes is said where much of it is not trained, against a count by hand."""

from __future__ import annotations

from moe_shard.program.step import make_program
from moe_shard.training.state_memory import state_lines
from tests.models.build import annotator, small_config


def lines(*overrides: str) -> list[str]:
    config = small_config({"fsdp": 2, "expert": 4}, "base_num_decoder_layers=2", *overrides)
    return state_lines(config, make_program(config, annotator(config)))


def test_a_checkpoint_has_what_is_not_trained() -> None:
    assert len(lines()) == 1
    (line,) = lines("trainable_parameters_mask=[embedding/kernel]", "dtype=float32")[1:]
    # Attention, router, experts and two norms of each layer; table, head and the last norm.
    still = 2 * (16 * 8 * (8 + 4 + 4 + 8) + 16 * 8 + 8 * 3 * 16 * 32 + 2 * 16) + 64 * 16 + 16
    whole = still + 3 * 64 * 16
    assert line == (
        f"each checkpoint: {4 * whole / 1e3:.0f} kB, {4 * still / 1e3:.0f} kB of it parameters "
        "that are not trained, as a checkpoint has all of them"
    )
    assert not lines("trainable_parameters_mask=[kernel]", "enable_checkpointing=false")[1:]
