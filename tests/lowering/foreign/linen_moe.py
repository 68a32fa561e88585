"""Write a mixture of experts in Flax Linen, with logical axis names, as MaxText's ancestors did."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import spmd

from tests.lowering.foreign.setup import Place, Tree, cross_entropy, finish


class SparseMlp(nn.Module):
    """Route each token to one or two experts; slots by sequence, [E, B, C, M]."""

    place: Place
    exchange: bool
    experts: int
    hidden: int
    top_k: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        place, E = self.place, self.experts
        spread = partial(spmd.with_logical_constraint, mesh=place.mesh)
        S, M = x.shape[1:]
        C = S * self.top_k // E

        def weight(name: str, shape: tuple[int, ...], names: tuple[str | None, ...]) -> Any:
            start = nn.with_logical_partitioning(nn.initializers.lecun_normal(), names)
            return self.param(name, start, shape, self.dtype)

        kernel = weight("router_kernel", (M, E), ("embed", None))
        wi = weight("wi", (E, M, self.hidden), ("expert", "embed", "mlp"))
        wo = weight("wo", (E, self.hidden, M), ("expert", "mlp", "embed"))
        with place.scope("router"):
            scores = jax.nn.softmax((x @ kernel).astype(jnp.float32))
            left, mask = scores, jnp.zeros_like(scores)
            for _ in range(self.top_k):
                pick = jax.nn.one_hot(jnp.argmax(left, -1), E)
                left, mask = left * (1 - pick), mask + pick
            slot = (jnp.cumsum(mask, 1) - 1) * mask
        with place.scope("dispatch"):
            where = jax.nn.one_hot(jnp.where(mask > 0, slot, C).astype(int), C, dtype=x.dtype)
            rows = jnp.einsum("bsec,bsm->ebcm", where, x)
        rows = spread(rows, ("slots_expert", "slots_batch", None, None))
        if self.exchange:
            rows = spread(rows, ("expert", "expert_batch", None, None))
        with place.scope("experts"):
            h = jax.nn.relu(jnp.einsum("ebcm,emh->ebch", rows, wi))
            rows = jnp.einsum("ebch,ehm->ebcm", h, wo)
        if self.exchange:
            rows = spread(rows, ("expert", "expert_batch", None, None))
        rows = spread(rows, ("slots_expert", "slots_batch", None, None))
        with place.scope("combine"):
            return jnp.einsum("bsec,bse,ebcm->bsm", where, scores.astype(x.dtype), rows)


class DenseMlp(nn.Module):
    """Do without experts."""

    place: Place
    hidden: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        start = nn.initializers.lecun_normal()
        dense = partial(nn.Dense, use_bias=False, param_dtype=self.dtype, dtype=self.dtype)
        up = nn.with_logical_partitioning(start, ("embed_all", "mlp"))
        down = nn.with_logical_partitioning(start, ("mlp", "embed_all"))
        with self.place.scope("mlp"):
            h = jax.nn.gelu(dense(self.hidden, kernel_init=up)(x))
            return dense(x.shape[-1], kernel_init=down)(h)


class Attention(nn.Module):
    """Attend with eight heads."""

    place: Place
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        start = nn.initializers.lecun_normal()
        with self.place.scope("attention"):
            return nn.MultiHeadDotProductAttention(
                num_heads=8,
                dtype=self.dtype,
                param_dtype=self.dtype,
                kernel_init=nn.with_logical_partitioning(start, ("embed_all", "heads", None)),
                out_kernel_init=nn.with_logical_partitioning(start, ("heads", None, "embed_all")),
                use_bias=False,
            )(x)


class Block(nn.Module):
    """One decoder block, its layer's number left out (as nn.scan wants it)."""

    place: Place
    exchange: bool
    attention: bool
    experts: int  # 0: a dense MLP instead
    hidden: int
    top_k: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        if self.attention:
            x = x + Attention(self.place, self.dtype, name="attn")(x)
        sizes = {"hidden": self.hidden, "dtype": self.dtype}
        if self.experts:
            sizes |= {"experts": self.experts, "top_k": self.top_k, "exchange": self.exchange}
        mlp = (SparseMlp if self.experts else DenseMlp)(place=self.place, **sizes, name="moe")
        x = spmd.with_logical_constraint(x + mlp(x), ("batch", None, None), mesh=self.place.mesh)
        return x, None


class Model(nn.Module):
    """Stack blocks, scanned or one by one, between an embedding and its transpose."""

    block: dict[str, Any]
    exchanges: tuple[bool, ...]
    scan: bool
    vocab: int
    width: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        table: Any = self.param(
            "embedding",
            nn.with_logical_partitioning(nn.initializers.normal(), ("vocab", "embed_all")),
            (self.vocab, self.width),
            self.block["dtype"],
        )
        mesh = self.block["place"].mesh
        x = spmd.with_logical_constraint(table[tokens], ("batch", None, None), mesh=mesh)
        if self.scan:
            stack = nn.scan(
                nn.remat(Block, prevent_cse=False),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=len(self.exchanges),
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            x, _ = stack(exchange=self.exchanges[0], **self.block, name="layers")(x, None)
        else:
            for i, exchange in enumerate(self.exchanges):
                x, _ = Block(exchange=exchange, **self.block, name=f"layer_{i}")(x)
        return x @ table.T


def program(
    place: Place,
    *,
    kind: str = "grad",
    exchanges: tuple[bool, ...] = (True, True),
    scan: bool = False,
    attention: bool = False,
    experts: int = 8,
    top_k: int = 2,
    vocab: int = 512,
    dtype: str = "float32",
    sizes: tuple[int, int, int, int] = (16, 64, 128, 320),
) -> tuple[Any, tuple[Any, ...], Any]:
    """Build the step of a small decoder; see `finish`."""
    B, S, M, H = sizes
    rules = (
        ("batch", place.batch),
        ("slots_batch", place.batch),
        ("slots_expert", None),
        ("expert", place.ep),
        ("expert_batch", place.rest),
        ("embed", place.fsdp),
        ("embed_all", tuple(axis for axis in (place.fsdp, place.ep) if axis)),
        ("mlp", None),
        ("heads", None),
        ("vocab", None),
        ("layers", None),
    )
    block = {
        "place": place,
        "attention": attention,
        "experts": experts,
        "hidden": H,
        "top_k": top_k,
        "dtype": jnp.dtype(dtype),
    }
    model = Model(block, exchanges, scan, vocab, M)

    def apply(params: Tree, tokens: jax.Array) -> jax.Array:
        with nn.logical_axis_rules(rules):
            logits: Any = model.apply({"params": params}, tokens)
            return logits

    with nn.logical_axis_rules(rules):
        boxed = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((B, S), jnp.int32)))[
            "params"
        ]
        layouts = spmd.logical_to_mesh_sharding(nn.get_partition_spec(boxed), place.mesh, rules)
    params = jax.tree.map(
        lambda leaf, layout: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout),
        nn.unbox(boxed),
        layouts,
    )

    def loss(params: Tree, tokens: jax.Array, labels: jax.Array) -> jax.Array:
        logits = apply(params, tokens)
        with place.scope("loss"):
            return cross_entropy(logits, labels)

    tokens = place.array((B, S), "int32", place.batch, None)
    return finish(kind, loss, params, tokens, tokens)
