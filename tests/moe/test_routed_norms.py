"""Experts with norms of their own beside a dense MLP, and the router's norm, equal NumPy's."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moe_shard as ms
from moe_shard.config.model_config import GatingConfig
from tests.moe.test_as_a_library import mesh_of

ROWS, TOKENS, M, E, K, EPSILON = 8, 5, 12, 8, 3, 1e-3
CONFIG = ms.MoEConfig(
    num_experts=E,
    num_experts_per_tok=K,
    moe_mlp_dim=6,
    shared_experts=1,
    shared_expert_mlp_dim=10,
    routed_norms=True,
    moe_dispatch_no_expert_sharding=True,
    router=ms.RouterConfig(router_norm=True, router_expert_scale=True),
)


def rms(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + EPSILON)


def mlp(x: np.ndarray, p: dict[str, np.ndarray]) -> np.ndarray:
    u = x @ p["gate"]
    gelu = 0.5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
    return (gelu * (x @ p["up"])) @ p["down"]


def expected(x: np.ndarray, residual: np.ndarray, p: dict[str, np.ndarray]) -> np.ndarray:
    """Compute the layer token by token and expert by expert, in float64."""
    shared = mlp(x, {name: p[f"shared.{name}"] for name in ("gate", "up", "down")})
    routed = np.zeros_like(residual)
    for at in np.ndindex(residual.shape[:-1]):
        token = residual[at]
        scores = np.exp((rms(token) * p["router.scale"] / math.sqrt(M)) @ p["router.kernel"])
        chosen = np.argsort(-scores)[:K]
        for expert in chosen:
            weight = scores[expert] / scores[chosen].sum() * p["router.expert_scale"][expert]
            own = {name: p[f"experts.{name}"][expert] for name in ("gate", "up", "down")}
            routed[at] += weight * mlp(rms(token) * p["routed_norm.scale"], own)
    return rms(routed) * p["routed_out_norm.scale"] + rms(shared) * p["shared_out_norm.scale"]


@pytest.mark.parametrize("explicit", [False, True])
def test_a_layer(explicit: bool) -> None:
    with mesh_of({"data": 2, "expert": 4, "explicit": explicit}) as mesh:
        sharding = ms.Sharding(mesh)
        layer = ms.init_sharded(
            lambda rngs: ms.MoELayer(
                CONFIG,
                model_dim=M,
                sharding=sharding,
                rngs=rngs,
                gating=GatingConfig(mlp_activations=("gelu", "linear")),
                norm_epsilon=EPSILON,
            ),
            rngs=nnx.Rngs(0),
        )
        draw = np.random.default_rng(0)
        params: dict[str, np.ndarray] = {}
        for path, param in nnx.to_flat_state(nnx.state(layer)):
            name, array = ".".join(map(str, path)), param.get_value()
            values = draw.standard_normal(array.shape).astype(np.float32)
            params[name] = values.astype(np.float64)
            param.set_value(jax.device_put(values, array.sharding))
        read = draw.standard_normal((2, ROWS, TOKENS, M)).astype(np.float32)
        placed = [
            sharding(jnp.asarray(x), "activation_batch_moe", None, None, name="x") for x in read
        ]
        y, stats = nnx.jit(lambda layer, x, residual: layer(x, residual))(layer, *placed)
        assert int(stats.expert_counts.sum()) == ROWS * TOKENS * K
        np.testing.assert_allclose(y, expected(read[0], read[1], params), rtol=1e-4, atol=1e-5)
