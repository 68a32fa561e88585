"""Write models without experts, or with experts that nothing is split over.

`what`:

    fsdp        a gated MLP whose weights and whose sequences are split over the axis "for experts"
    ulysses     attention whose projections are one matrix a head, split over heads; an all-to-all
                turns sequences into heads before it, and back after it
    mlp_heads   a block-diagonal MLP, [N, D, D]: a batched product that no token is routed to
    replicated  a mixture of experts, all of whose weights every device holds
    tensor      a gated MLP whose hidden dim is split over the axis: activations are reduced
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from tests.lowering.foreign.setup import Place, Tree, cross_entropy, finish


def program(
    place: Place,
    *,
    kind: str = "grad",
    what: str = "fsdp",
    layers: int = 2,
    scan: bool = False,
    vocab: int = 0,
    heads: int = 8,
    dtype: str = "float32",
    sizes: tuple[int, int, int, int] = (16, 128, 256, 512),
) -> tuple[Any, tuple[Any, ...], Any]:
    """Build the step of a small model; see `finish`."""
    B, S, M, H = sizes
    N, D, E, ep = heads, M // heads, 8, place.ep
    every = place.batch
    shapes: dict[str, tuple[tuple[int, ...], tuple[Any, ...]]]
    if what == "fsdp":
        shapes = {
            "up": ((M, H), (every, None)),
            "gate": ((M, H), (every, None)),
            "down": ((H, M), (None, every)),
        }
    elif what == "tensor":
        shapes = {
            "up": ((M, H), (None, ep)),
            "gate": ((M, H), (None, ep)),
            "down": ((H, M), (ep, None)),
        }
    elif what == "mlp_heads":
        shapes = {"mix": ((N, D, D), (ep, None, None)), "back": ((N, D, D), (ep, None, None))}
    elif what == "ulysses":
        shapes = dict.fromkeys("qkv", ((N, M, D), (ep, None, None)))
        shapes["o"] = ((N, D, M), (ep, None, None))
    else:
        shapes = {
            "router": ((M, E), ()),
            "w1": ((E, M, H), ()),
            "w2": ((E, H, M), ()),
        }
    batch = place.rest if what in ("tensor", "ulysses", "mlp_heads") else place.batch
    along = ep if what in ("ulysses", "mlp_heads") else None  # the axis of positions

    def block(w: Tree, x: jax.Array) -> jax.Array:
        if what in ("fsdp", "tensor"):
            with place.scope("mlp"):
                return x + (jax.nn.silu(x @ w["gate"]) * (x @ w["up"])) @ w["down"]
        if what == "mlp_heads":
            with place.scope("mlp"):
                y = x.reshape(*x.shape[:2], N, D)
                y = place.keep(y, batch, None, ep, None)
                y = jax.nn.gelu(jnp.einsum("bsnd,nde->bsne", y, w["mix"]))
                y = jnp.einsum("bsne,ned->bsnd", y, w["back"])
                y = place.keep(y, batch, along, None, None)
                return x + y.reshape(x.shape)
        if what == "ulysses":
            with place.scope("attention"):
                rows = jnp.broadcast_to(x[:, :, None], (*x.shape[:2], N, M))
                rows = place.keep(rows, batch, along, None, None)
                rows = place.keep(rows, batch, None, ep, None)
                q, k, v = (jnp.einsum("bsnm,nmd->bnsd", rows, w[name]) for name in "qkv")
                scores = jnp.einsum("bnqd,bnkd->bnqk", q, k) / D**0.5
                mixed = jnp.einsum("bnqk,bnkd->bnqd", jax.nn.softmax(scores), v)
                out = jnp.einsum("bnsd,ndm->bsnm", mixed, w["o"])
                out = place.keep(out, batch, None, ep, None)
                out = place.keep(out, batch, along, None, None)
                return x + out.sum(2)
        with place.scope("experts"):
            probs = jax.nn.softmax(x @ w["router"])
            top = jax.nn.one_hot(jnp.argmax(probs, -1), E, dtype=x.dtype) * probs
            h = jax.nn.gelu(jnp.einsum("bsm,emh->bseh", x, w["w1"]))
            return x + jnp.einsum("bse,bseh,ehm->bsm", top, h, w["w2"])

    def loss(params: Tree, *inputs: jax.Array) -> jax.Array:
        x = inputs[0]
        if vocab:
            with place.scope("embed"):
                x = place.keep(params["table"][x], batch, along, None)
        if scan:
            x = jax.lax.scan(lambda x, w: (block(w, x), None), x, params["layers"])[0]
        else:
            for w in params["layers"]:
                x = place.keep(block(w, x), batch, along, None)
        with place.scope("loss"):
            if vocab:
                return cross_entropy(jnp.einsum("bsm,vm->bsv", x, params["table"]), inputs[1])
            return jnp.mean(x.astype(jnp.float32) ** 2)

    def make(stack: tuple[int, ...]) -> Tree:
        skip = (None,) * len(stack)
        return {
            name: place.array(stack + shape, dtype, *skip, *dims)
            for name, (shape, dims) in shapes.items()
        }

    params: Any = {"layers": make((layers,)) if scan else [make(()) for _ in range(layers)]}
    if vocab:
        params["table"] = place.array((vocab, M), dtype, None, every)
        tokens = place.array((B, S), "int32", batch, along)
        return finish(kind, loss, params, tokens, tokens)
    return finish(kind, loss, params, place.array((B, S, M), dtype, batch, along, None))
