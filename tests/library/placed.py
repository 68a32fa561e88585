"""Builds the models beside it on a mesh, runs a step, and prints what came out as JSON.

python placed.py data=2 expert=4 explicit
"""

from __future__ import annotations

import contextlib
import json
import sys
from importlib import import_module
from typing import Any

import jax
import optax
from flax import linen as nn
from flax import nnx

import moe_shard as ms

_here = f"{__package__}." if __package__ else ""  # a package in the suite, a folder for others
linen_model: Any = import_module(f"{_here}linen_model")
own_model: Any = import_module(f"{_here}own_model")


def placements(tree: Any) -> dict[str, Any]:
    """Name -> [mesh axes of each dim], and the shape on each device."""
    found = {}
    for path, array in jax.tree_util.tree_leaves_with_path(tree):
        if array.ndim < 2:
            continue
        name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        found[name] = [list(array.sharding.spec), list(array.sharding.shard_shape(array.shape))]
    return found


def run(sizes: dict[str, Any], *, explicit: bool) -> dict[str, Any]:
    """The placements of each model's parameters, and the verdict on its step."""
    mesh = ms.make_mesh(**sizes, explicit=explicit)
    with jax.set_mesh(mesh) if explicit else contextlib.nullcontext():
        tokens = jax.random.randint(jax.random.key(2), (8, 16), 0, own_model.VOCAB)
        model = own_model.build(mesh)
        optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
        first = float(own_model.step(model, optimizer, tokens))
        last = [float(own_model.step(model, optimizer, tokens)) for _ in range(3)][-1]
        grad = jax.jit(nnx.grad(own_model.loss)).lower(model, tokens).compile()
        ms.lowering.assert_collectives(grad, axis="expert", all_to_all=8)  # 4 a layer
        linen, variables = linen_model.build(mesh)
        params = jax.jit(
            lambda variables: jax.grad(lambda v: linen_model.loss(linen, v, tokens))(variables)
        )
        compiled = params.lower(variables).compile()
    return {
        "own": placements(nnx.state(model, nnx.Param)),
        "moments": placements(nnx.state(optimizer, nnx.optimizer.OptState)),
        "own verdict": ms.lowering.verdict(grad),
        "losses": [first, last],
        "linen": placements(nn.unbox(variables)["params"]),
        "linen verdict": ms.lowering.verdict(compiled),
    }


if __name__ == "__main__":
    given = [argument.partition("=") for argument in sys.argv[1:] if "=" in argument]
    axes = {axis: int(size) for axis, _, size in given}
    print(json.dumps(run(axes, explicit="explicit" in sys.argv)))
