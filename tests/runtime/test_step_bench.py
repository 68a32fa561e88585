"""Measure tiny training steps in turns, and check what a row says."""

from __future__ import annotations

import importlib
import json
import math
from typing import Any

import pytest

from moe_shard.cli import main as moe_shard
from moe_shard.config import Config, load_config
from moe_shard.errors import UserError
from moe_shard.runtime import peers
from moe_shard.runtime.peers import maxtext_step, transformers_step, why_not_plain
from moe_shard.runtime.step_bench import (
    Contender,
    StepFacts,
    host_batch,
    measure_steps,
    step_variants,
)

TINY = [
    *("base_emb_dim=16", "base_mlp_dim=32", "base_moe_mlp_dim=32", "base_num_decoder_layers=1"),
    *("base_num_query_heads=4", "base_num_kv_heads=4", "head_dim=4", "vocab_size=64"),
    *("per_device_batch_size=1", "capacity_factor=1.0", "optimizer=adamw"),
]


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config("mixtral-tiny", [*TINY, "max_target_length=32"])


def test_variants_are_the_registered_strategies_and_the_flag_off(config: Config) -> None:
    found = step_variants(config)
    assert next(iter(found)) == "gather"  # what ratios are relative to
    assert {"gather", "einsum", "ragged", "gather, flag off"} <= set(found)
    alone = load_config("mixtral-tiny", [*TINY, "ici_expert_parallelism=1"])
    assert "gather, flag off" not in step_variants(alone)
    dense = load_config("mixtral-tiny", ["num_experts=1", "num_experts_per_tok=1"])
    assert step_variants(dense) == {"dense": []}


def test_all_get_the_same_batch(config: Config) -> None:
    batch = host_batch(config, 8)
    assert batch["inputs"].shape == (8, 32)
    assert (batch["inputs"][:, 1:] == batch["targets"][:, :-1]).all()
    assert (batch["positions"] == range(32)).all()
    assert all((host_batch(config, 8)[name] == each).all() for name, each in batch.items())


def test_ratios_are_of_one_round(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that becomes slower does not change a ratio."""
    now, order = [0.0], []

    def contender(name: str, package: str, seconds: float) -> Contender:
        def step() -> float:
            order.append(name)
            now[0] += seconds * len(order)  # slower with every step
            return 1.0

        return Contender(name, package, step, StepFacts(temp_bytes=7), "as it is")

    monkeypatch.setattr("moe_shard.runtime.step_bench.time.perf_counter", lambda: now[0])
    ours, theirs = contender("gather", "moe_shard", 1.0), contender("MaxText", "maxtext 1", 4.0)
    first, second = measure_steps(config, [ours, theirs], rounds=5)
    assert order[4:] == ["gather", "MaxText"] * 5
    assert first.ratio == 1
    assert second.ratio == pytest.approx(4.0, rel=0.2)
    assert first.ratio_to == {"MaxText": pytest.approx(1 / second.ratio, rel=0.01)}
    assert second.ratio_to == {"MaxText": 1}
    assert first.tokens_per_second == pytest.approx(8 * 32 / first.seconds / 8)
    assert (first.mfu, first.temp_bytes, second.remark) == (None, 7, "as it is")


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    variants = ["--variants", "gather", "gather, flag off"]
    rounds = ["--rounds", "1", "--tokens", "32", "--against"]
    assert moe_shard(["bench", "--step", "--json", *variants, *rounds, "--", *TINY]) == 0
    found = json.loads(capsys.readouterr().out)
    on, off = found["steps"]
    assert (on["name"], on["verdict"], on["ratio"]) == ("gather", "expert-parallel", 1.0)
    assert (off["name"], off["verdict"]) == ("gather, flag off", "weight-gathered")
    # The router's statistics, which the least leaves out, count at this size.
    assert 1 <= on["wire_over_bound"] < 1.3
    assert off["wire_over_bound"] > 2
    # What is recomputed in the backward pass is work that tokens do not need.
    assert 1 <= on["flops_over_ideal"] < 1.5
    assert on["temp_bytes"] > 0
    assert on["loss"] < math.log(64) + 0.2
    assert found["num_devices"] == 8
    assert found["notes"] == []


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--rounds", "0"], "at least 1"),
        (["--variant", "fast"], 'is not "NAME: key=value'),
        (["--variants", "gathre"], "no variant gathre"),
        (["--against", "megatron"], "invalid choice"),
        (["mixtral-tniy"], "mixtral-tniy"),
    ],
)
def test_bad_usage_is_refused(arguments: list[str], part: str) -> None:
    with pytest.raises(UserError, match=part):
        moe_shard(["bench", "--step", *arguments])


def test_a_peer_that_is_not_there_is_said(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.import_module

    def missing(name: str, *rest: Any) -> Any:
        if name in ("torch", "maxtext"):
            raise ImportError(f"No module named {name!r}")
        return found(name, *rest)

    monkeypatch.setattr(peers, "find_spec", lambda _: None)
    monkeypatch.setattr("moe_shard.runtime.peers.importlib.import_module", missing)
    assert maxtext_step(config) == "MaxText is not installed"
    assert transformers_step(config) == (
        "transformers on torch is left out: No module named 'torch'"
    )


@pytest.mark.parametrize(
    "key", ["shared_experts=1", "attention_bias=True", "logits_via_embedding=True"]
)
def test_a_model_that_a_peer_does_not_have_is_named(key: str) -> None:
    assert why_not_plain(load_config("mixtral-tiny", [*TINY, key])) == key


def test_mixtral_is_a_model_of_both_peers(config: Config) -> None:
    assert why_not_plain(config, use_qk_norm=False) == ""
    assert why_not_plain(load_config("olmoe-1b-7b", []), use_qk_norm=False) == "use_qk_norm=True"


@pytest.mark.parity
@pytest.mark.parametrize("norms", [[], ["use_qk_norm=true", "qk_norm_type=projection"]])
def test_transformers_learns_the_same_batch(norms: list[str]) -> None:
    made = transformers_step(load_config("mixtral-tiny", [*TINY, "max_target_length=32", *norms]))
    assert isinstance(made, Contender), made
    losses = [made.step() for _ in range(6)]
    assert losses[0] == pytest.approx(math.log(64), abs=0.3)
    assert losses[-1] < losses[0]
