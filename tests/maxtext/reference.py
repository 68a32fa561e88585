"""Run MaxText's side of the comparison: a subprocess in MaxText's own interpreter.

    python tests/maxtext/reference.py JOB.json

Nothing of this package is imported, and nothing of MaxText is replaced: its own command-line form
makes the configuration, its own `setup_train_loop` the model and the optimizer, its own
checkpointing writes the folders, its own `train_step` makes the updates.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("DECOUPLE_GCLOUD", "TRUE")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from flax import nnx
from flax.core.spmd import logical_axis_rules
from maxtext.common import checkpointing, train_state_nnx
from maxtext.configs import pyconfig
from maxtext.layers import moe
from maxtext.trainers.pre_train import train
from maxtext.utils import (
    generate_param_only_checkpoint,
    sharding,
    train_utils,
)

State = nnx.State[Any, Any]

FIELDS = {
    "inputs": "inputs",
    "targets": "targets",
    "inputs_position": "positions",
    "targets_position": "positions",
    "inputs_segmentation": "segment_ids",
    "targets_segmentation": "segment_ids",
}
"""MaxText's name of a field of a batch -> ours."""


def main() -> None:
    """Do one job: a JSON file with cases, their batch, and the output folder."""
    job = json.loads(Path(sys.argv[1]).read_text())
    batch = dict(np.load(job["batch"]))
    for name, case in job["cases"].items():
        print(f"--- {name}", flush=True)
        run_case(case, batch, Path(job["out"]) / name)


def run_case(case: dict[str, Any], batch: dict[str, np.ndarray], out: Path) -> None:
    """Run one model: write its checkpoints in every requested layout, and its outputs."""
    config = pyconfig.initialize(["", base_file(), *case["keys"], f"base_output_directory={out}"])
    made = train_utils.setup_train_loop(config, None)
    manager, shardings, mesh, train_state = made[1], made[2], made[4], made[10]
    graph, state = nnx.split(train_state)
    state = unsettled(state)
    out.mkdir(parents=True, exist_ok=True)
    save(case["layouts"], config, manager, graph, state, out)
    tree = train_state_nnx.to_checkpoint_dict(state)
    (out / "tree.json").write_text(json.dumps(shapes(tree)))
    answers = {f"timescale.{n}": a for n, a in timescales(train_state.model).items()}
    data = {theirs: jax.numpy.asarray(batch[ours]) for theirs, ours in FIELDS.items()}
    with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
        if case["updates"] >= 0:
            answers["logits"] = np.asarray(logits(graph, state, data))
        if case["updates"] > 0:
            answers |= updates(config, graph, state, shardings, mesh, data, case["updates"])
    np.savez(out / "answers.npz", allow_pickle=False, **answers)


def shapes(tree: Any) -> dict[str, list[int]]:
    """Return the path of each array of a checkpoint -> its shape."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): list(leaf.shape)
        for path, leaf in leaves
    }


def base_file() -> str:
    """Return the path of MaxText's own defaults."""
    return os.path.join(os.path.dirname(pyconfig.__file__), "base.yml")


def unsettled(state: State) -> State:
    """Perturb what is initialised to a constant (norms, biases, sinks).

    Otherwise no test would see that two norms of ones are swapped, or that a zero bias is missing.
    """
    random = np.random.default_rng(0)

    def moved(variable: nnx.Variable[Any]) -> nnx.Variable[Any]:
        if not isinstance(variable, (nnx.Param, moe.MoEBiasVar)):
            return variable
        values = np.asarray(variable.get_value())
        if values.size > 1 and np.ptp(values) == 0:
            noise = random.standard_normal(values.shape).astype(values.dtype)
            values = jax.device_put(values + 0.1 * noise, variable.get_value().sharding)
            return variable.replace(values)
        return variable

    model = jax.tree.map(moved, state.model, is_leaf=lambda node: isinstance(node, nnx.Variable))
    state["model"] = model
    return state


def save(
    layouts: list[str], config: Any, manager: Any, graph: Any, state: State, out: Path
) -> None:
    """Write the checkpoints: the whole state, and the parameters in both of MaxText's forms."""
    if "state" in layouts:
        saved = checkpointing.save_checkpoint(manager, 0, state, config, None, force=True)
        assert saved
        checkpointing.wait_until_finished(manager)
    if "decode" in layouts:
        decode = checkpointing.create_orbax_checkpoint_manager(str(out / "decode"), True, False, 1)
        generate_param_only_checkpoint._save_decode_checkpoint_nnx(config, state, decode)
    if "params" in layouts:
        _, params, *_ = nnx.split(nnx.merge(graph, state).model, nnx.Param, ...)
        checkpointing.save_params_to_path(str(out / "params"), {"params": params.to_pure_dict()})


def logits(graph: Any, state: State, data: dict[str, jax.Array]) -> jax.Array:
    """Return the logits of a batch, calling the model as MaxText's `loss_fn` does."""

    @jax.jit
    def forward(state: State, data: dict[str, jax.Array]) -> jax.Array:
        return nnx.merge(graph, state).model(
            decoder_input_tokens=data["inputs"],
            decoder_positions=data["inputs_position"],
            decoder_segment_ids=data["inputs_segmentation"],
            enable_dropout=False,
            decoder_target_tokens=data["targets"],
            decoder_target_mask=data["targets_segmentation"],
        )

    return forward(state, data)


def updates(
    config: Any, graph: Any, state: State, shardings: Any, mesh: Any, data: Any, count: int
) -> dict[str, np.ndarray]:
    """Return the losses of updates on one batch."""
    params_shardings, shardings = sharding.maybe_update_params_sharding_with_opt(config, shardings)
    step, _ = train_utils.jit_train_and_eval_step(
        config, graph, mesh, state, shardings, train.train_step, params_shardings=params_shardings
    )
    found = []
    for _ in range(count):
        state, metrics = step(state, dict(data))
        found.append({name: float(value) for name, value in metrics["scalar"].items()})
    names = {"loss": "loss", "ce": "lm_loss", "aux": "moe_lb_loss", "norm": "raw_grad_norm"}
    return {
        ours: np.array([each[f"learning/{theirs}"] for each in found])
        for ours, theirs in names.items()
    }


def timescales(model: nnx.Module) -> dict[str, np.ndarray]:
    """Return the divisors of positions in Llama's rotary embeddings, per element of a head."""
    return {
        ".".join(map(str, path)): np.asarray(node.timescale).ravel()
        for path, node in nnx.iter_graph(model)
        if type(node).__name__ == "LLaMARotaryEmbedding"
    }


if __name__ == "__main__":
    main()
