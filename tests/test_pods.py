"""Compile every published model at its real size for a pod that holds it; nothing is run."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moe_shard.config import configs_dir, list_models

ROOT = Path(__file__).resolve().parents[1]
PODS = {
    "deepseek2-16b": ("mi355x:8", "per_device_batch_size=1"),
    "deepseek3-671b": ("mi355x:256", "per_device_batch_size=1"),
    "deepseek3.2-671b": ("mi355x:256", "per_device_batch_size=1"),
    "dots1-142b-a14b": ("mi355x:32", "per_device_batch_size=1"),
    "ernie4.5-21b-a3b": ("mi355x:8", "per_device_batch_size=1"),
    "flex-olmo-7x7b": ("mi355x:56", "per_device_batch_size=1"),
    "gemma4-26b-a4b": ("mi355x:8", "per_device_batch_size=1"),
    "glm4.5-air": ("mi355x:32", "per_device_batch_size=1"),
    "glm4.7-flash": ("mi355x:8", "per_device_batch_size=1"),
    "glm5-744b-a40b": ("mi355x:256", "per_device_batch_size=1"),
    "gpt-oss-120b": ("mi355x:32", "per_device_batch_size=1"),
    "gpt-oss-20b": ("h100:8", "per_device_batch_size=1"),
    "granite3-1b-a400m": ("mi355x:8", "per_device_batch_size=1"),
    "granite4-h-small": ("mi355x:8", "per_device_batch_size=1"),
    "hunyuan-80b-a13b": ("mi355x:16", "per_device_batch_size=1"),
    "k-exaone-236b-a23b": ("mi355x:64", "per_device_batch_size=1"),
    "kimi-k2-1t": ("mi355x:256", "per_device_batch_size=1"),
    "lfm2-8b-a1b": ("mi355x:8", "per_device_batch_size=1"),
    "ling-mini-2.0": ("mi355x:8", "per_device_batch_size=1"),
    "llama4-17b-16e": ("mi355x:32", "per_device_batch_size=1"),
    "minimax-m2": ("mi355x:64", "per_device_batch_size=1"),
    "mixtral-8x22b": ("mi355x:32", "per_device_batch_size=1"),
    "mixtral-8x7b": ("mi355x:8", "per_device_batch_size=4"),
    "nemotron3-nano-30b-a3b": ("mi355x:8", "per_device_batch_size=1"),
    "olmoe-1b-7b": ("v6e:2x4", "per_device_batch_size=1"),
    "phi3.5-moe": ("mi355x:8", "per_device_batch_size=1"),
    "qwen1.5-moe-a2.7b": ("mi355x:8", "per_device_batch_size=1"),
    "qwen3-235b-a22b": ("v6e:16x16", "per_device_batch_size=1"),
    "qwen3-30b-a3b": ("v6e:8x8", "per_device_batch_size=1"),
    "qwen3-next-80b-a3b": ("mi355x:32", "per_device_batch_size=1"),
    "qwen3.5-35b-a3b": ("mi355x:8", "per_device_batch_size=1"),
    "sarvam-105b": ("mi355x:16", "per_device_batch_size=1"),
    "sarvam-30b": ("mi355x:8", "per_device_batch_size=1"),
    "solar-open-100b": ("mi355x:32", "per_device_batch_size=1"),
}
"""Model -> a target that it fits on, and the batch that fits with it."""
CARDS = {"h100": "H100", "mi355x": "MI355X", "v6e": "TPU v6e"}
"""Hardware -> what model files call it."""


def test_every_published_model_has_a_pod() -> None:
    assert set(PODS) == set(list_models()) - {"mixtral-tiny"}


@pytest.mark.parametrize("model", sorted(set(PODS) - {"mixtral-8x7b"}))
def test_a_model_names_its_pod(model: str) -> None:
    hardware, _, size = PODS[model][0].partition(":")
    first, *_ = (configs_dir() / "models" / f"{model}.yml").read_text().splitlines()
    named = re.search(rf"train {re.escape(model)} +\(on (.*) or more\)$", first)
    assert named, first
    devices = math.prod(int(each) for each in size.split("x"))
    assert f"{devices} {CARDS[hardware]}" in named[1].split(", ")


@pytest.mark.targets
@pytest.mark.slow
@pytest.mark.parametrize("model", PODS)
def test_a_model_fits_on_its_pod_and_is_expert_parallel(model: str) -> None:
    target, *overrides = PODS[model]
    command = [sys.executable, "tools/compile_for.py", model, target, *overrides]
    done = subprocess.run(
        [*command, "--expect", "expert-parallel", "--json"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report["verdict"] == "expert-parallel"
    assert report["fits"] is True
