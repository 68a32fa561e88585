"""Keep what a bad step was made of: its batch, and the norms of its tensors by layer."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float, Int

from moe_shard.config.schema import TrainConfig, brief_list
from moe_shard.errors import first_line
from moe_shard.files import write_bytes, write_text
from moe_shard.program.norms import Norms, named_bad
from moe_shard.program.step import Batch, Program, TrainState


def examine(
    folder: Path,
    config: TrainConfig,
    program: Program,
    step: int,
    values: Mapping[str, float],
    state: TrainState,
    batch: Batch,
) -> str:
    """Compute the norms of a bad step and write `bad_step_<step>.json` and `.npz`.

    All processes take part; one writes. The `.npz` has the batch's fields [A, R, S], and as
    `gradients.NAME` and `parameters.NAME` the norms of each parameter, one a layer; the `.json` has
    the step's metrics, the same norms and the numbers of elements that are not finite.

    Args:
        folder: folder of the run.
        config: names the keys that causes depend on.
        program: computes the norms.
        step: number of the step.
        values: its metrics.
        state: the state after it, which for a skipped step has the parameters before it.
        batch: its batch.

    Returns:
        The cause as far as the numbers show it, the fix, and where the files are; two lines.
    """
    name = f"bad_step_{step}"
    try:
        found: Norms = jax.device_get(program.norms(state.params, batch))
        whole = _whole(batch)
        if jax.process_index() == 0:
            _write(folder / name, step, values, found, whole)
        kept = f"the batch and the norms by layer are in {folder.name}/{name}.json and .npz"
    except (OSError, jax.errors.JaxRuntimeError) as error:
        # Of the two, the numbers that ended the run are what a person must see.
        return (
            f"cause: {_cause(config, values, None)}\n"
            f"fix: {_fix(values, config, None)}; no post-mortem: {first_line(error)}"
        )
    return f"cause: {_cause(config, values, found)}\nfix: {_fix(values, config, found)}; {kept}"


def _cause(config: TrainConfig, values: Mapping[str, float], found: Norms | None) -> str:
    """Say what the numbers show, and no more."""
    if found is not None and (bad := named_bad(found.bad_parameters)):
        return f"parameters that are not finite themselves: {brief_list(bad, 3)}"
    if not math.isfinite(values["loss"]):
        return "the parameters are finite, and overflow on the way to the loss"
    if not math.isfinite(values["grad_norm"]):
        bad = named_bad(found.bad_gradients) if found is not None else []
        where = f", in {brief_list(bad, 3)}" if bad else ""
        return f"the loss is finite, and the gradient overflows{where}"
    if not math.isfinite(values["update_norm"]):
        return (
            f"loss and gradient are finite (norm {values['grad_norm']:.3g}); "
            f"{config.optimizer} at learning_rate={config.learning_rate:g} overflows"
        )
    return (
        f"loss {values['loss']:.4g} and gradient norm {values['grad_norm']:.4g} are finite, and "
        "one is far above those of the steps before"
    )


def _fix(values: Mapping[str, float], config: TrainConfig, found: Norms | None) -> str:
    if found is not None and named_bad(found.bad_parameters):
        return "an earlier checkpoint, or weights without NaN in load_parameters_path"
    lower = f"a learning_rate below {config.learning_rate:g}"
    if all(math.isfinite(values[name]) for name in ("loss", "grad_norm", "update_norm")):
        return f"{lower}, or a larger skip_step_scaling_factor"
    return f"{lower}, from a checkpoint before the loss rose"


def _whole(batch: Batch) -> dict[str, Int[np.ndarray, "A R S"]]:
    if jax.process_count() == 1:
        return {field: np.asarray(x) for field, x in batch.items()}
    return {
        field: np.asarray(multihost_utils.process_allgather(x, tiled=True))
        for field, x in batch.items()
    }


def _write(
    path: Path,
    step: int,
    values: Mapping[str, float],
    found: Norms,
    batch: Mapping[str, Int[np.ndarray, "A R S"]],
) -> None:
    arrays: dict[str, Any] = dict(batch)
    for what in ("gradients", "parameters"):
        arrays |= {f"{what}.{name}": norm for name, norm in getattr(found, what).items()}
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    write_bytes(path.with_name(f"{path.name}.npz"), content.getvalue())
    layers = {
        f"{name}_by_layer": {key: _plain(x) for key, x in getattr(found, name).items()}
        for name in ("gradients", "parameters", "bad_gradients", "bad_parameters")
    }
    numbers = {name: _plain(np.float64(value)) for name, value in values.items()}
    text = json.dumps({"step": step, **numbers, **layers}, indent=1)
    write_text(path.with_name(f"{path.name}.json"), text + "\n")


def _plain(values: Float[np.ndarray, "..."] | np.float64) -> Any:
    """Return numbers as JSON has them; those that it has not, as the words nan and inf."""
    if np.ndim(values):
        return [_plain(np.float64(value)) for value in np.asarray(values)]
    return float(values) if np.isfinite(values) else str(float(values))
