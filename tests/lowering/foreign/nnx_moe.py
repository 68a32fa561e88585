"""Write a mixture of experts in Flax NNX: layouts are metadata of its parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tests.lowering.foreign.setup import Place, Tree, finish


class Mixture(nnx.Module):
    """Give each token to its best experts, by index: [B, E, C, M] slots."""

    def __init__(
        self, place: Place, M: int, H: int, E: int, top_k: int, exchange: bool, dtype: Any
    ) -> None:
        self.place, self.top_k, self.exchange = place, top_k, exchange

        def weight(shape: tuple[int, ...], *dims: Any) -> nnx.Param[jax.Array]:
            return nnx.Param(jnp.zeros(shape, dtype), layout=dims)

        self.router = weight((M, E), None, None)
        self.gate_proj = weight((E, M, H), place.ep, place.fsdp, None)
        self.up_proj = weight((E, M, H), place.ep, place.fsdp, None)
        self.down_proj = weight((E, H, M), place.ep, None, place.fsdp)

    def __call__(self, x: jax.Array) -> jax.Array:
        place, E = self.place, self.router.shape[-1]
        B, S, M = x.shape
        C = S * self.top_k // E
        with place.scope("router"):
            scores = jax.nn.softmax(x @ self.router[...], axis=-1)
            left, mask = scores, jnp.zeros_like(scores)
            for _ in range(self.top_k):
                pick = jax.nn.one_hot(jnp.argmax(left, -1), E, dtype=x.dtype)
                left, mask = left * (1 - pick), mask + pick
            slot = jnp.cumsum(mask, 1) - mask
        with place.scope("dispatch"):
            fits = (mask > 0) & (slot < C)
            sender = jnp.zeros((B, E, C), jnp.int32)
            b, s, e = jnp.indices((B, S, E))
            sender = sender.at[b, e, jnp.where(fits, slot, C).astype(int)].set(s, mode="drop")
            rows = jnp.take_along_axis(x, sender.reshape(B, E * C, 1), 1).reshape(B, E, C, M)
        rows = place.keep(rows, place.batch)
        if self.exchange:
            rows = place.keep(rows, place.rest, place.ep)
        with place.scope("experts"):
            h = jax.nn.silu(jnp.einsum("becm,emh->bech", rows, self.gate_proj[...]))
            h = h * jnp.einsum("becm,emh->bech", rows, self.up_proj[...])
            rows = jnp.einsum("bech,ehm->becm", h, self.down_proj[...])
        if self.exchange:
            rows = place.keep(rows, place.rest, place.ep)
        rows = place.keep(rows, place.batch)
        with place.scope("combine"):
            at = jnp.arange(E) * C + jnp.minimum(slot, C - 1).astype(int)  # [B, S, E]
            share = (scores * fits)[..., None]
            back = jnp.take_along_axis(rows.reshape(B, E * C, M), at.reshape(B, S * E, 1), axis=1)
            return (back.reshape(B, S, E, M) * share).sum(2)


class Dense(nnx.Module):
    """Do without experts: an MLP whose weights are split over every axis there is."""

    def __init__(self, place: Place, M: int, H: int, dtype: Any) -> None:
        self.place = place
        self.up = nnx.Param(jnp.zeros((M, H), dtype), layout=(place.batch, None))
        self.down = nnx.Param(jnp.zeros((H, M), dtype), layout=(None, place.batch))

    def __call__(self, x: jax.Array) -> jax.Array:
        with self.place.scope("mlp"):
            return jax.nn.silu(x @ self.up[...]) @ self.down[...]


class Tower(nnx.Module):
    """Add mixtures to a residual stream, with a dense layer before each."""

    def __init__(
        self, place: Place, M: int, H: int, E: int, top_k: int, exchanges: Any, dtype: Any
    ) -> None:
        both = tuple(axis for axis in (place.fsdp, place.ep) if axis)
        self.place = place
        self.mixtures = nnx.List(
            [
                Mixture(place, M, H, E, top_k, exchange, dtype) if E else Dense(place, M, H, dtype)
                for exchange in exchanges
            ]
        )
        self.dense = nnx.List(
            [nnx.Param(jnp.zeros((M, M), dtype), layout=(both, None)) for _ in exchanges]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        for dense, mixture in zip(self.dense, self.mixtures, strict=True):
            with self.place.scope("mlp"):
                x = x + jnp.tanh(x @ dense[...])
            x = self.place.keep(x + mixture(x), self.place.batch)
        return x


def program(
    place: Place,
    *,
    kind: str = "grad",
    exchanges: tuple[bool, ...] = (True, True),
    experts: int = 8,
    top_k: int = 2,
    scan: bool = False,
    dtype: str = "float32",
    sizes: tuple[int, int, int, int] = (16, 64, 128, 320),
) -> tuple[Any, tuple[Any, ...], Any]:
    """Build the step of a small tower, or of a scan over towers of one layer; see `finish`."""
    B, S, M, H = sizes
    tower = exchanges[:1] if scan else exchanges
    abstract = nnx.eval_shape(lambda: Tower(place, M, H, experts, top_k, tower, jnp.dtype(dtype)))
    graph, state = nnx.split(abstract, nnx.Param)
    stack = (len(exchanges),) if scan else ()
    params: Tree = jax.tree.map(
        lambda leaf: leaf.replace(
            place.array((*stack, *leaf.shape), leaf.dtype, *(None for _ in stack), *leaf.layout)
        ),
        state,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )

    def loss(params: Tree, x: jax.Array) -> jax.Array:
        if scan:
            body = jax.checkpoint(lambda x, layer: (nnx.merge(graph, layer)(x), None))
            y = jax.lax.scan(body, x, params)[0]
        else:
            y = nnx.merge(graph, params)(x)
        with place.scope("loss"):
            return jnp.mean(y.astype(jnp.float32) ** 2)

    return finish(kind, loss, params, place.array((B, S, M), dtype, place.batch, None, None))
