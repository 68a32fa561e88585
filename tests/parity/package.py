"""Run the package's side of the comparison, from a model's directory to NumPy, without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_shard.autoep.directory import read_hf_source
from moe_shard.autoep.exporting import export_params
from moe_shard.checkpoints.imported import load_params
from moe_shard.checkpoints.resolve import load_model
from moe_shard.config import Config
from moe_shard.inference.generator import Generator
from moe_shard.models.params import AbstractModel, Params, describe
from moe_shard.moe.losses import load_balance_loss
from moe_shard.program import step
from moe_shard.program.trainable import Trainable
from moe_shard.sharding.annotate import Sharding
from moe_shard.sharding.mesh import mesh_from_config
from moe_shard.sharding.rules import RuleTable
from tests.autoep.blocks import blocks_of
from tests.models.build import QUICK
from tests.parity import weights
from tests.parity.families import LEARNING_RATE, LENGTH, NEW_TOKENS, ROWS, UPDATES, VOCAB

OVERRIDES = (
    "dtype=float32",
    "weight_dtype=float32",
    "num_simulated_devices=8",
    "remat_policy=none",
    f"max_target_length={LENGTH}",
    f"steps={UPDATES}",
    "optimizer=sgd",
    f"learning_rate={LEARNING_RATE}",
    "warmup_steps_fraction=0",
    "learning_rate_final_fraction=1",
    "gradient_clipping_threshold=0",
    f"max_new_tokens={NEW_TOKENS}",
)


class Opened(NamedTuple):
    """Hold a model on a mesh."""

    config: Config
    sharding: Sharding
    model: AbstractModel
    params: Params


class Answer(NamedTuple):
    """Hold the package's results for a batch; the auxiliary loss includes its weight."""

    logits: np.ndarray
    router_logits: np.ndarray
    ce_loss: float
    aux_loss: float


def open_model(directory: Path, experts: int, *overrides: str) -> Opened:
    """Load a directory's model onto the eight devices.

    Args:
        directory: the directory that transformers wrote.
        experts: size of the expert axis; FSDP gets the other devices.
        overrides: settings in addition to `OVERRIDES`.
    """
    mesh = f"ici_expert_parallelism={experts}"
    config = load_model(str(directory), [*OVERRIDES, mesh, *overrides])
    sharding = Sharding(
        mesh_from_config(config.mesh), RuleTable(config.mesh.logical_axis_rules), "record"
    )
    model = describe(config.model, sharding)
    return Opened(config, sharding, model, load_params(str(directory), model.specs))


def batch_of(opened: Opened, inputs: np.ndarray, targets: np.ndarray) -> dict[str, jax.Array]:
    """Place one microbatch on the mesh; each sequence is one document."""
    fields = {
        "inputs": inputs,
        "targets": targets,
        "positions": np.broadcast_to(np.arange(inputs.shape[1]), inputs.shape),
        "segment_ids": np.ones_like(inputs),
    }
    rows = opened.sharding.named_sharding(
        "batch", ("activation_batch", "activation_length"), inputs.shape
    )
    return {name: jax.device_put(a.astype(np.int32), rows) for name, a in fields.items()}


def evaluate(opened: Opened, inputs: np.ndarray, targets: np.ndarray) -> Answer:
    """Compute logits, router logits and losses in one program."""
    moe = opened.config.model.moe
    assert moe is not None

    def forward(params: Params, batch: dict[str, jax.Array]) -> Any:
        decoder = opened.model.apply(params)
        x, stats = decoder.hidden_states(batch["inputs"], batch["positions"], batch["segment_ids"])
        assert stats is not None
        logits = decoder.embedding.logits(x)
        balance = load_balance_loss(
            stats.mean_probs,
            stats.expert_counts,
            tokens=inputs.shape[1],
            k=moe.num_experts_per_tok,
            convention=moe.load_balance_loss_type,
        )
        ce_loss = decoder.embedding.cross_entropy(x, batch["targets"])
        return logits, stats.router_z_loss, ce_loss, balance * moe.load_balance_loss_weight

    batch = batch_of(opened, inputs, targets)
    with pytest.MonkeyPatch.context() as patch:
        # A layer computes one statistic from its logits; it is replaced by the logits themselves.
        patch.setattr("moe_shard.moe.layer.router_z_loss", lambda logits, _: logits)
        lowered = jax.jit(forward).lower(opened.params, batch)
    answer = jax.device_get(lowered.compile(QUICK)(opened.params, batch))
    return Answer(*answer[:2], *(float(loss) for loss in answer[2:]))


def gradients(
    opened: Opened, inputs: np.ndarray, targets: np.ndarray, directory: Path
) -> tuple[float, dict[str, np.ndarray]]:
    """Compute the training loss and its gradients, by the checkpoint's names.

    Args:
        opened: the model.
        inputs: ids [B, S].
        targets: the token after each.
        directory: a copy of the model's directory, whose weights are overwritten: gradients are
        exported to the checkpoint's tensors as parameters are.
    """
    grad_fn = jax.jit(step.make_grad(opened.config, opened.model))
    batch = batch_of(opened, inputs, targets)
    compiled = grad_fn.lower(opened.params, batch).compile(QUICK)
    loss, _, grads = compiled(opened.params, batch)
    # What has no gradient is exported as 0, which transformers' side is taken for.
    zeros = jax.tree.map(jnp.zeros_like, opened.params)
    overwrite(directory, Trainable((), opened.model.specs).into(grads, zeros))
    return float(loss), weights.read(directory)


def overwrite(directory: Path, params: Params) -> None:
    """Put parameters, or what is shaped like them, into the tensors of a model's directory."""
    source = read_hf_source(directory)
    export_params(source.plan, source.headers, blocks_of(params))


def train(opened: Opened, inputs: np.ndarray, targets: np.ndarray) -> list[float]:
    """Return the losses of updates on one batch; the training step donates the parameters."""
    program = step.make_program(opened.config, opened.sharding)
    batch = {name: each[None] for name, each in batch_of(opened, inputs, targets).items()}
    batch = jax.device_put(batch, program.batch_sharding)
    made, opt_state = program.init_rest(opened.params)
    state = step.TrainState(made, opened.params, opt_state)
    compiled = program.step.lower(program.abstract_state, program.abstract_batch).compile(QUICK)
    losses = []
    for _ in range(UPDATES):
        state, metrics = compiled(state, batch)
        losses.append(float(metrics["loss"]))
    return losses


def greedy(opened: Opened, prompts: np.ndarray, *, cached: bool) -> np.ndarray:
    """Generate the most probable tokens after prompts of one length."""
    generator = Generator(
        opened.model,
        opened.sharding,
        opened.config.generate,
        vocab_size=VOCAB,
        rows=ROWS,
        places=prompts.shape[1],
        cached=cached,
        options=QUICK,
    )
    return np.stack(list(generator(opened.params, prompts.tolist())), axis=1)
