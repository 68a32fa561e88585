"""Build single layers on meshes of the eight devices, and compare them with the oracle."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_shard.config import Config
from moe_shard.layers.attention import make_attention
from moe_shard.sharding.annotate import Sharding
from moe_shard.sharding.mesh import mesh_from_config
from moe_shard.sharding.rules import RuleTable
from tests.models.build import QUICK, small_config

Sizes = Mapping[str, int]
Params = dict[str, Any]
Module = TypeVar("Module", bound=nnx.Module)

MODEL_DIM, TOKENS = 16, 12
SMALL = (
    "num_experts=1",
    "num_experts_per_tok=1",
    "base_num_query_heads=4",
    "base_num_kv_heads=2",
    "head_dim=8",
    "rope_max_timescale=100",
)
MLA = (
    "attention_type=mla",
    "kv_lora_rank=8",
    "qk_nope_head_dim=6",
    "qk_rope_head_dim=4",
    "v_head_dim=12",
)


def layer_config(sizes: Sizes, *overrides: str) -> Config:
    """Configure a small dense model, of which the tests use a layer."""
    return small_config(sizes, *SMALL, *overrides)


def layer_annotator(config: Config, sizes: Sizes) -> Sharding:
    """Make a mesh of as many devices as the product of the sizes."""
    devices = jax.devices()[: math.prod(sizes.values())]
    return Sharding(
        mesh_from_config(config.mesh, devices), RuleTable(config.mesh.logical_axis_rules), "record"
    )


class Layer(NamedTuple):
    """Describe a module; `nnx.merge(graph, params)` makes it from parameters."""

    graph: Any
    shapes: Params
    places: Params


def describe(make: Callable[[nnx.Rngs], nnx.Module], sharding: Sharding) -> Layer:
    """Return a module's graph, and the shapes and shardings of its parameters."""
    graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(params=0))))

    def place(path: tuple[Any, ...], param: Any) -> Any:
        name, axes = ".".join(map(str, path)), param.get_metadata("out_sharding")
        return sharding.named_sharding(name, axes, param.get_value().shape)

    shapes = nnx.to_pure_dict(nnx.map_state(lambda _, param: param.get_value(), state))
    return Layer(graph, shapes, nnx.to_pure_dict(nnx.map_state(place, state)))


def attention_layer(config: Config, sharding: Sharding, number: int = 0) -> Layer:
    """Describe the attention of one of the model's layers."""
    model = config.model

    def make(rngs: nnx.Rngs) -> nnx.Module:
        return make_attention(
            config=model.attention,
            kind=model.layer_kinds[number],
            model_dim=model.emb_dim,
            norm_epsilon=model.normalization_layer_epsilon,
            dtype=model.dtype,
            weight_dtype=model.weight_dtype,
            sharding=sharding,
            rngs=rngs,
        )

    return describe(make, sharding)


def random_like(shapes: Params, seed: int = 0) -> Params:
    """Draw float64 values that keep activations near 1: signed vectors, scales near 1."""
    rng = np.random.default_rng(seed)

    def value(path: Any, shape: Any) -> np.ndarray:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name.endswith("scale"):
            return rng.uniform(0.5, 1.5, shape.shape)
        fan = 1 if len(shape.shape) == 1 or name.endswith("bias") else shape.shape[0]
        return rng.standard_normal(shape.shape) * fan**-0.5

    # Round to the float32 that jax computes with, so that both use the same numbers.
    return jax.tree.map(
        lambda a: a.astype(np.float32).astype(np.float64),
        jax.tree_util.tree_map_with_path(value, shapes),
    )


class Text(NamedTuple):
    """Hold packed documents of random lengths, and activations for them."""

    x: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray


def packed(rows: int, tokens: int = TOKENS, *, begin: float = 0.15, seed: int = 1) -> Text:
    """Make different sequences; a document begins at a token with probability `begin`."""
    rng = np.random.default_rng(seed)
    begins = rng.random((rows, tokens)) < begin
    begins[:, 0] = True
    place = np.broadcast_to(np.arange(tokens), begins.shape)
    positions = place - np.maximum.accumulate(np.where(begins, place, 0), axis=1)
    x = rng.standard_normal((rows, tokens, MODEL_DIM)).astype(np.float32)
    return Text(x, positions.astype(np.int32), np.cumsum(begins, axis=1).astype(np.int32))


def value_and_grads(
    function: Callable[[Module, jax.Array], jax.Array],
    layer: Layer,
    params: Params,
    x: np.ndarray,
    probe: np.ndarray,
    place: Any,
) -> tuple[np.ndarray, tuple[Params, np.ndarray]]:
    """Compute `function(module, x)`, and the gradients of its sum weighted by `probe`."""

    def loss(params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = function(nnx.merge(layer.graph, params), x)
        return jnp.sum(y * probe), y

    compiled = (
        jax.jit(
            jax.value_and_grad(loss, argnums=(0, 1), has_aux=True),
            in_shardings=(layer.places, place),
            out_shardings=(None, (layer.places, place)),
        )
        .lower(layer.shapes, jax.ShapeDtypeStruct(x.shape, np.float32))
        .compile(QUICK)
    )
    narrow = jax.tree.map(lambda a: np.asarray(a, np.float32), (params, x))
    (_, y), grads = jax.device_get(compiled(*jax.device_put(narrow, (layer.places, place))))
    return y, grads


def assert_gradients(
    grads: Any, at: Any, loss: Callable[[Any], float], *, step: float = 1e-5, directions: int = 2
) -> None:
    """Compare each array's gradient, along random directions, with differences of the oracle.

    Args:
        grads: a tree of gradients.
        at: the same tree of values, in float64.
        loss: the oracle, of such a tree.
        step: of the differences; theirs is an error of its square.
        directions: for each array.
    """
    rng = np.random.default_rng(7)
    leaves, structure = jax.tree.flatten(at)
    names = [path for path, _ in jax.tree_util.tree_leaves_with_path(at)]
    for index, (leaf, grad) in enumerate(zip(leaves, jax.tree.leaves(grads), strict=True)):
        assert np.linalg.norm(grad) > 0, names[index]
        for _ in range(directions):
            direction = rng.standard_normal(leaf.shape)
            direction /= np.linalg.norm(direction)

            def moved(by: float, index: int = index, d: np.ndarray = direction) -> float:
                shifted = [*leaves[:index], leaves[index] + by * d, *leaves[index + 1 :]]
                return loss(jax.tree.unflatten(structure, shifted))

            expected = (moved(step) - moved(-step)) / (2 * step)
            error = abs(expected - np.sum(grad * direction)) / np.linalg.norm(grad)
            assert error < 1e-5, f"{names[index]}: relative error {error:.1e}"
