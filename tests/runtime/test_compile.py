"""What the compiler is given besides its defaults, and that it is given it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from moe_shard.config import load_config
from moe_shard.runtime import compile as runtime_compile
from moe_shard.runtime.compile import compile_step, compiler_options
from moe_shard.training.run import run

CHUNKED = ("moe_dispatch=ragged", "num_moe_token_chunks=2")


@pytest.mark.parametrize(
    ("platform", "words"),
    [("tpu", "async_all_to_all"), ("cuda", "latency_hiding"), ("rocm", "latency_hiding")],
)
def test_overlap_is_asked_for_where_tokens_travel_in_chunks(platform: str, words: str) -> None:
    options = compiler_options(load_config("mixtral-tiny", CHUNKED), platform)
    assert all(value is True for value in options.values())
    assert any(words in name for name in options)
    assert compiler_options(load_config("mixtral-tiny"), platform) == {}
    assert compiler_options(load_config("mixtral-tiny", CHUNKED), "cpu") == {}


def test_the_compiler_is_given_the_options() -> None:
    # One that it does not know: had it not been given, the step would compile.
    x = jax.ShapeDtypeStruct((2,), jnp.float32)
    program: Any = SimpleNamespace(
        step=jax.jit(jnp.add), abstract_state=x, abstract_batch=x, model=None
    )
    assert compile_step(program).options == {}
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        compile_step(program, {"xla_no_such_option": True})


def test_a_run_gives_the_compiler_the_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime_compile, "_OVERLAP", {"cpu": ("xla_no_such_option",)})
    places = (f"base_output_directory={tmp_path}", "steps=0", "base_num_decoder_layers=1")
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        run(load_config("mixtral-tiny", [*CHUNKED, *places]))
