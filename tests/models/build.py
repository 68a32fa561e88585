"""Build small decoders on meshes of the eight devices, with random parameters and text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_shard.config import Config, load_config
from moe_shard.config.mesh_config import MESH_AXES
from moe_shard.models.flops import step_flops_per_token, trained_products
from moe_shard.models.params import Params, describe
from moe_shard.moe.layer import MoEStats
from moe_shard.sharding.annotate import Sharding
from moe_shard.sharding.mesh import mesh_from_config
from moe_shard.sharding.rules import RuleTable
from tests.models.oracle import Architecture
from tests.moe.oracle import Settings
from tests.quick import QUICK as QUICK

# Every dim divides by every axis of the meshes used; tokens drop at capacity factor 1. The losses'
# weights are large enough that a wrong one shows in the gradients.
SMALL = (
    "base_num_decoder_layers=3",
    "base_emb_dim=16",
    "base_num_query_heads=8",
    "base_num_kv_heads=4",
    "head_dim=8",
    "base_mlp_dim=32",
    "base_moe_mlp_dim=32",
    "vocab_size=64",
    "capacity_factor=1.0",
    "load_balance_loss_weight=0.3",
    "router_z_loss_weight=0.05",
    "per_device_batch_size=1",
    "max_target_length=16",
)
NO_DROPS = "capacity_factor=-1"


def label(sizes: Mapping[str, int]) -> str:
    """Name a test after a mesh."""
    return "-".join(f"{axis}{size}" for axis, size in sizes.items())


def small_config(sizes: Mapping[str, int], *overrides: str) -> Config:
    """Configure a small decoder on a mesh of these axis sizes, 1 where not given."""
    mesh = [f"ici_{axis}_parallelism={sizes.get(axis, 1)}" for axis in MESH_AXES]
    return load_config("mixtral-tiny", [*mesh, *SMALL, *overrides])


def annotator(config: Config) -> Sharding:
    """Make the mesh of a configuration, with its rules."""
    return Sharding(
        mesh_from_config(config.mesh), RuleTable(config.mesh.logical_axis_rules), "record"
    )


def products_per_token(config: Config) -> int:
    """Count the parameters that a token is multiplied with, all of them trained."""
    specs = describe(config.model, annotator(config)).specs
    return sum(each.params for each in trained_products(config.model, specs, specs))


def flops_per_token(config: Config, *, seq_len: int) -> int:
    """Count the operations of training all of a model on one token."""
    specs = describe(config.model, annotator(config)).specs
    return step_flops_per_token(config.model, specs, specs, seq_len=seq_len)


def architecture(config: Config) -> Architecture:
    """Translate the configuration for the oracle."""
    model, moe = config.model, config.model.moe
    settings = (
        None
        if moe is None
        else Settings(
            k=moe.num_experts_per_tok,
            capacity_factor=moe.capacity_factor,
            capacity_rule=moe.capacity_rule,
            min_capacity=moe.min_capacity,
            drop_policy=moe.drop_policy,
            renormalise=moe.router.norm_topk_prob,
            activation=model.gating.activation,
            load_balance=moe.load_balance_loss_type,
            load_balance_weight=moe.load_balance_loss_weight,
            z_weight=moe.router_z_loss_weight,
        )
    )
    return Architecture(
        theta=model.attention.rope.rope_max_timescale,
        epsilon=model.normalization_layer_epsilon,
        activation=model.gating.activation,
        moe=settings,
        mtp_weight=model.mtp.mtp_loss_scaling_factor,
        mtp_after_final_norm=model.mtp.mtp_after_final_norm,
    )


def random_params(config: Config, seed: int = 0) -> Params:
    """Draw float32 values that keep activations near 1; norm scales differ from 1."""
    rng = np.random.default_rng(seed)
    shapes = describe(config.model, annotator(config)).specs

    def value(spec: Any) -> np.ndarray:
        if spec.name.endswith("scale"):
            return rng.uniform(0.5, 1.5, spec.shape).astype(np.float32)
        # The fan of one layer and of one expert.
        dims = dict(zip(spec.logical_axes, spec.shape, strict=True))
        copies = dims.get("layers", 1) * dims.get("exp", 1)
        fan = float(np.sqrt(np.prod(spec.shape) / copies))
        return (rng.standard_normal(spec.shape) * fan**-0.5).astype(np.float32)

    return jax.tree.map(value, shapes)


def random_batch(
    rows: int = 8, tokens: int = 16, *, vocab: int = 64, microbatches: int = 1, seed: int = 1
) -> dict[str, np.ndarray]:
    """Make packed documents of random lengths; positions start at 0 in each."""
    rng = np.random.default_rng(seed)
    shape = (microbatches, rows, tokens)
    begins = rng.random(shape) < 0.2
    begins[..., 0] = True
    segments = np.cumsum(begins, axis=-1)
    index = np.broadcast_to(np.arange(tokens), shape)
    batch = {
        "inputs": rng.integers(0, vocab, shape),
        "targets": rng.integers(0, vocab, shape),
        "positions": index - np.maximum.accumulate(np.where(begins, index, 0), axis=-1),
        "segment_ids": segments,
    }
    return {name: a.astype(np.int32) for name, a in batch.items()}


class Evaluated(NamedTuple):
    """Hold a model's outputs for one microbatch, on the host."""

    loss: np.ndarray
    logits: np.ndarray
    stats: MoEStats | None
    grads: Params
    jaxpr: str
    hlo: str


def evaluate(config: Config, params: Params, batch: Mapping[str, np.ndarray]) -> Evaluated:
    """Compute loss, logits, statistics and gradients on the configuration's mesh.

    The loss is written out here, so that it judges the package's own.
    """
    sharding = annotator(config)
    model = describe(config.model, sharding)
    moe = config.model.moe

    def loss_fn(params: Params, batch: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
        logits, stats = model.apply(params)(
            batch["inputs"], batch["positions"], batch["segment_ids"]
        )
        is_target = jax.nn.one_hot(batch["targets"], logits.shape[-1])
        loss = -jnp.sum(jax.nn.log_softmax(logits) * is_target) / is_target[..., 0].size
        if moe is not None and stats is not None:
            assert moe.load_balance_loss_type == "maxtext"
            fraction = stats.expert_counts / fields["inputs"].shape[1]
            balance = jnp.sum(stats.mean_probs * fraction, axis=-1) * moe.num_experts
            loss += moe.load_balance_loss_weight * jnp.mean(balance)
            loss += moe.router_z_loss_weight * jnp.mean(stats.router_z_loss)
        return loss, (logits, stats)

    places = jax.tree.map(lambda spec: spec.sharding, model.specs)
    fields = {name: a[0] for name, a in batch.items()}
    rows = sharding.named_sharding(
        "batch", ("activation_batch", "activation_length"), fields["inputs"].shape
    )
    traced = jax.jit(
        jax.value_and_grad(loss_fn, has_aux=True),
        in_shardings=(places, rows),
        out_shardings=(None, places),
    ).trace(params, fields)
    compiled = traced.lower().compile(QUICK)
    arguments = jax.device_put((params, fields), (places, dict.fromkeys(fields, rows)))
    (loss, (logits, stats)), grads = jax.device_get(compiled(*arguments))
    return Evaluated(loss, logits, stats, grads, str(traced.jaxpr), compiled.as_text())


def errors(found: Any, expected: Any) -> dict[str, float]:
    """Compute, for each array, the largest error over its own largest element.

    Relative to each element would be no measure: an entry that is a difference of large terms has
    their rounding error, not its own.
    """
    pairs = jax.tree.map(
        lambda a, b: float(np.max(np.abs(a - b)) / np.max(np.abs(b))), found, expected
    )
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): error
        for path, error in jax.tree_util.tree_leaves_with_path(pairs)
    }


def assert_close(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Check that two trees of the same arrays agree, by `errors`."""
    wrong = {name: e for name, e in errors(found, expected).items() if not e <= tolerance}
    assert not wrong, f"relative errors {wrong}"
