"""Say what the state takes on each device and in a checkpoint, and what another dtype would."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from moe_shard.config.schema import Config
from moe_shard.models.params import Params
from moe_shard.program.step import Program
from moe_shard.units import human_bytes

_LOST = {"bfloat16": "1/512", "float16": "1/4096"}
"""Share of a weight below which a change to it rounds to nothing."""


def state_lines(config: Config, program: Program) -> list[str]:
    """Write what parameters and optimizer take on each device, and what another dtype would.

    Args:
        config: configuration of the run.
        program: its training step.
    """
    here, state = config.model.weight_dtype, program.abstract_state
    other = config.model.dtype if here == "float32" else "float32"
    lines = [f"state on each device: {_sizes(config, state.params, state.opt_state)}"]
    if other != here:
        params = _in_dtype(state.params, other)
        _, opt_state = jax.eval_shape(program.init_rest, params)
        # What is made without a mesh is placed as what it would replace.
        opt_state = jax.tree.map(_placed_as, opt_state, state.opt_state)
        lines[0] += f"; with weight_dtype={other}: {_sizes(config, params, opt_state)}"
    if here != "float32":
        lines.append(
            f"parameters are in {here}: of an update, what is below {_LOST[here]} of a "
            "weight is lost; weight_dtype=float32 keeps it, and an export has the checkpoint's "
            "dtypes in any case"
        )
    if config.train.enable_checkpointing and (still := _still(program)):
        lines.append(
            f"each checkpoint: {human_bytes(_whole(state))}, {human_bytes(_whole(still))} of it "
            "parameters that are not trained, as a checkpoint has all of them"
        )
    return lines


def _still(program: Program) -> list[Any]:
    """Return what a state has of parameters that are not trained."""
    trained = {spec.name for spec in jax.tree.leaves(program.trained)}
    params = zip(
        jax.tree.leaves(program.model.specs),
        jax.tree.leaves(program.abstract_state.params),
        strict=True,
    )
    return [leaf for spec, leaf in params if spec.name not in trained]


def _whole(tree: Any) -> int:
    """Return the bytes of arrays, whatever their shards."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _sizes(config: Config, params: Params, opt_state: Any) -> str:
    """Write bytes and dtypes of parameters and moments."""

    def size(tree: Any) -> str:
        leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim]
        dtypes = sorted({jnp.dtype(leaf.dtype).name for leaf in leaves})
        return f"{human_bytes(sum(map(_bytes, leaves)))} ({', '.join(dtypes) or 'no moments'})"

    return f"parameters {size(params)}, {config.train.optimizer} {size(opt_state)}"


def _bytes(leaf: Any) -> int:
    """Return the bytes of a device's shard."""
    shard = leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shard) * jnp.dtype(leaf.dtype).itemsize


def _in_dtype(params: Params, dtype: str) -> Params:
    """Describe parameters in another dtype; those of routers are float32 in any case."""

    def change(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        router = any(getattr(key, "key", "") == "router" for key in path)
        kept = leaf.dtype if router else jnp.dtype(dtype)
        return jax.ShapeDtypeStruct(leaf.shape, kept, sharding=leaf.sharding)

    changed: Params = jax.tree_util.tree_map_with_path(change, params)
    return changed


def _placed_as(leaf: Any, there: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=there.sharding)
