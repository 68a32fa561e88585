"""Share helpers of the config tests: a small model on disk, and errors as a person sees them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from moe_shard.config import Config, load_config
from moe_shard.errors import UserError

MODEL = """
base_emb_dim: 64
base_num_decoder_layers: 2
base_num_query_heads: 4
base_num_kv_heads: 2
base_mlp_dim: 128
vocab_size: 320
num_experts: 8
num_experts_per_tok: 2
"""


def write_model(directory: Path, extra: str = "", text: str = MODEL) -> str:
    """Write a model file; `extra` lines come last."""
    path = directory / "small.yml"
    path.write_text(text + extra, encoding="utf-8")
    return str(path)


def load(directory: Path, *overrides: str, extra: str = "", text: str = MODEL) -> Config:
    return load_config(write_model(directory, extra, text), overrides)


def error_of(model: str, overrides: Sequence[str] = ()) -> str:
    """Return the error message of loading; at most three lines, the last of them the fix."""
    with pytest.raises(UserError) as caught:
        load_config(model, overrides)
    return check_message(caught.value)


def check_message(error: UserError) -> str:
    message = str(error)
    assert len(message.splitlines()) <= 3
    assert "fix: " in message.splitlines()[-1]
    return message


def says(message: str, *parts: str) -> None:
    for part in parts:
        assert part in message, message
