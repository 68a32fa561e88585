"""Compare a MaxText file's update and load-balance loss with MaxText's own functions."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from moe_shard.config import Config, load_config
from moe_shard.config.load import maxtext_keys
from moe_shard.models.params import ParamSpec
from moe_shard.moe.losses import expert_counts, load_balance_loss
from moe_shard.moe.router import route
from moe_shard.program.optimizer import make_optimizer, make_schedule
from tests.models.build import annotator, small_config

pytestmark = pytest.mark.maxtext


def load(folder: Path, **said: Any) -> Config:
    """Load a small MaxText file's configuration."""
    small = {"base_emb_dim": 64, "num_experts": 8, "num_experts_per_tok": 2, "steps": 40}
    path = folder / "deepseek3-small.yml"
    path.write_text(yaml.safe_dump({**small, **said}), encoding="utf-8")
    return load_config(str(path))


def maxtexts(module: str) -> Any:
    os.environ.setdefault("DECOUPLE_GCLOUD", "TRUE")
    return importlib.import_module(f"maxtext.{module}")


def settings(**said: Any) -> SimpleNamespace:
    """Make a configuration that MaxText's functions can read."""
    defaults = {key: value for key, value in maxtext_keys().defaults.items() if value != "None"}
    return SimpleNamespace(**{**defaults, **said})


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"learning_rate_schedule_steps": 25},
        {"learning_rate_schedule_steps": 80, "warmup_steps_fraction": 0.33},
        {"warmup_steps_fraction": 0.0, "learning_rate_final_fraction": 0.3},
        {"learning_rate_schedule_steps": 2},
    ],
)
def test_the_learning_rate_is_maxtexts_at_every_step(tmp_path: Path, said: dict[str, Any]) -> None:
    said = {"learning_rate": 0.5, **said}
    own = make_schedule(load(tmp_path, decoder_block="mixtral", **said).train)
    length = said.get("learning_rate_schedule_steps", 40)
    kind = maxtexts("configs.types").LearningRateScheduleType.COSINE
    theirs = maxtexts("utils.maxtext_utils").create_learning_rate_schedule(
        settings(
            **said | {"learning_rate_schedule_steps": length, "steps": 40, "lr_schedule_type": kind}
        )
    )
    for step in range(40):
        np.testing.assert_allclose(own(step), theirs(step), rtol=1e-5, atol=1e-8, err_msg=str(step))


def test_five_updates_are_maxtexts(tmp_path: Path) -> None:
    said = {"learning_rate": 0.1, "adam_weight_decay": 0.3, "warmup_steps_fraction": 0.1}
    config = load(tmp_path, decoder_block="mixtral", **said)
    sharding = annotator(small_config({"data": 8}))
    axes = {"kernel": ("embed", "mlp"), "scale": ("norm",), "bias": ("norm",)}
    shapes = {"kernel": (4, 6), "scale": (4,), "bias": (8,)}
    specs = {
        name: ParamSpec(
            name, shapes[name], jnp.float32, of, sharding.named_sharding(name, of, shapes[name])
        )
        for name, of in axes.items()
    }
    random = np.random.default_rng(0)
    start, *gradients = (
        {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        for _ in range(6)
    )
    stub = settings(**said, mu_dtype="float32", steps=40, learning_rate_schedule_steps=40)
    stub.lr_schedule_type = maxtexts("configs.types").LearningRateScheduleType.COSINE
    schedule = maxtexts("utils.maxtext_utils").create_learning_rate_schedule(stub)
    theirs = maxtexts("optimizers.optimizers").get_optimizer(stub, schedule)
    clip = maxtexts("utils.maxtext_utils").apply_gradient_clipping
    own = make_optimizer(config.train, specs)

    def run(optimizer: Any, prepare: Any) -> dict[str, Any]:
        params: Any = jax.tree.map(jnp.asarray, start)
        state = optimizer.init(params)
        for gradient in gradients:
            updates, state = optimizer.update(prepare(gradient), state, params)
            params = jax.tree.map(jnp.add, params, updates)
        return dict(params)

    by_own, by_theirs = run(own, lambda g: g), run(theirs, lambda g: clip(g, None, 1.0))
    for name, expected in by_theirs.items():
        assert np.abs(expected - start[name]).max() > 0.01
        np.testing.assert_allclose(by_own[name], expected, rtol=2e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("block", ["mixtral", "qwen3_moe", "gpt_oss", "llama4", "deepseek"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_load_balance_loss_is_maxtexts(tmp_path: Path, block: str, score: str) -> None:
    said: dict[str, Any] = {"decoder_block": block, "load_balance_loss_weight": 0.5}
    if block == "deepseek":
        said |= {"attention_type": "mla", "routed_score_func": score}
    if block == "gpt_oss":
        said |= {"mlp_activations": ["sigmoid", "linear"], "mlp_activations_limit": 7.0}
        said |= {"sliding_window_size": 8, "inhomogeneous_layer_cycle_interval": 2}
    if block == "llama4":
        said |= {"chunk_attn_window_size": 8, "num_experts_per_tok": 1}
    config = load(tmp_path, **said)
    moe = config.model.moe
    assert moe is not None
    k = moe.num_experts_per_tok
    logits = jnp.asarray(np.random.default_rng(1).standard_normal((3, 7, 8)), jnp.float32)
    routing = route(logits, k, config=moe.router)
    counts = expert_counts(routing.indices, 8)[None]
    own = moe.load_balance_loss_weight * load_balance_loss(
        jnp.mean(routing.probs, axis=1)[None],
        counts,
        tokens=7,
        k=k,
        convention=moe.load_balance_loss_type,
    )
    # The gate's output: the scores if it has its own score function, else the logits.
    function = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid}[score]
    gate = function(logits) if block == "deepseek" else logits
    layer = SimpleNamespace(
        num_experts=8, num_experts_per_tok=k, config=SimpleNamespace(load_balance_loss_weight=0.5)
    )
    theirs = maxtexts("layers.moe").RoutedMoE.load_balance_loss(
        layer, jax.lax.top_k(gate, k)[1], jax.nn.softmax(gate, axis=-1)
    )
    np.testing.assert_allclose(own, theirs, rtol=1e-5)
