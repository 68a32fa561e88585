"""Write mixtures of experts as GShard did: masks or gathers, einsums, annotated layouts.

What moves is left to the partitioner. `style` is the layout of what the experts see:

    two_hop         by sequence, then by expert: tokens are exchanged
    direct          by expert at once
    by_sequence     the batch dim keeps the experts' axis: the weights have to come
    gather_wo       wi as two_hop; what wo sees is by sequence again, so that wo has to come
    everywhere      every device is given the tokens of its whole row of experts, computes its own
                    experts' part, and the parts are added up
    free            no annotation at all
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
    styles: tuple[str, ...] = ("two_hop", "two_hop"),
    masks: bool = True,
    scan: bool = False,
    remat: bool = False,
    gated: bool = True,
    fused: bool = False,
    biases: bool = False,
    shared: bool = False,
    attention: bool = False,
    vocab: int = 0,
    experts: int = 8,
    top_k: int = 2,
    sorted_top_k: bool = False,
    dtype: str = "float32",
    microbatches: int = 1,
    container: str = "dict",
    sizes: tuple[int, int, int, int] = (16, 64, 128, 320),
) -> tuple[Any, tuple[Any, ...], Any]:
    """Build the step of a small model; see `finish`."""
    B, S, M, H = sizes
    L, E, ep, fsdp = len(styles), experts, place.ep, place.fsdp
    both = tuple(axis for axis in (fsdp, ep) if axis)

    def weights() -> Tree:
        block: dict[str, Any] = {"gate": ((M, E), (fsdp, None))}
        if fused:
            block["gate_up"] = ((E, M, 2 * H), (ep, fsdp, None))
        else:
            block["w1"] = ((E, M, H), (ep, fsdp, None))
            if gated:
                block["w3"] = ((E, M, H), (ep, fsdp, None))
        block["w2"] = ((E, H, M), (ep, None, fsdp))
        if biases:
            block["b1"] = ((E, H), (ep, None))
            block["b2"] = ((E, M), (ep, None))
        if shared:
            block["shared_up"] = ((M, H), (both, None))
            block["shared_down"] = ((H, M), (None, both))
        if attention:
            block["qkv"] = ((M, 3, 4, M // 4), (both, None, None, None))
            block["out"] = ((4, M // 4, M), (None, None, both))
        block["norm"] = ((M,), (None,))
        return block

    def make(stack: int | None) -> Tree:
        lead = () if stack is None else (stack,)
        skip = () if stack is None else (None,)
        return {
            name: place.array(lead + shape, dtype, *skip, *dims)
            for name, (shape, dims) in weights().items()
        }

    params: Any = {"blocks": make(L) if scan else [make(None) for _ in range(L)]}
    if vocab:
        params["embed"] = place.array((vocab, M), dtype, None, both)
        params["unembed"] = place.array((M, vocab), dtype, both, None)

    def attend(w: Tree, x: jax.Array) -> jax.Array:
        with place.scope("attention"):
            q, k, v = jnp.moveaxis(jnp.einsum("bsm,mcnd->bscnd", x, w["qkv"]), 2, 0)
            scores = jnp.einsum("bqnd,bknd->bnqk", q, k) / (M // 4) ** 0.5
            mask = jnp.tril(jnp.ones((S, S), bool))
            probs = jax.nn.softmax(jnp.where(mask, scores, -1e9), axis=-1)
            mixed = jnp.einsum("bnqk,bknd->bqnd", probs, v)
            return jnp.einsum("bqnd,ndm->bqm", mixed, w["out"])

    def mixture(w: Tree, x: jax.Array, style: str) -> jax.Array:
        batch, rest = place.batch, place.rest
        if style == "everywhere":
            x = place.keep(x, rest, None, None)
        b = x.shape[0]
        C = -(-S * top_k // E)
        with place.scope("router"):
            probs = jax.nn.softmax(jnp.einsum("bsm,me->bse", x, w["gate"]).astype(jnp.float32))
            if sorted_top_k:
                chosen = jax.nn.one_hot(jax.lax.top_k(probs, top_k)[1], E).sum(-2)
            else:
                left, chosen = probs, jnp.zeros_like(probs)
                for _ in range(top_k):
                    pick = jax.nn.one_hot(jnp.argmax(left, axis=-1), E)
                    left, chosen = left * (1 - pick), chosen + pick
            position = jnp.cumsum(chosen, axis=1) - chosen
            kept = chosen * (position < C)
        with place.scope("dispatch"):
            mask = kept[..., None] * jax.nn.one_hot(position.astype(int), C)  # [B, S, E, C]
            if masks:
                slots = jnp.einsum("bsec,bsm->ebcm", mask.astype(x.dtype), x)
            else:
                source = jnp.argmax(mask, axis=1)  # [B, E, C]
                slots = jnp.take_along_axis(x, source.reshape(b, E * C, 1), axis=1)
                slots = (slots.reshape(b, E, C, M) * mask.max(1)[..., None]).astype(x.dtype)
                slots = slots.transpose(1, 0, 2, 3)

        def hops(y: jax.Array, inwards: bool) -> jax.Array:
            """Lay [E, B, C, ...] out for the experts, or back."""
            if style == "free":
                return y
            if style == "by_sequence":
                return place.keep(y, None, batch)
            if style in ("direct", "everywhere"):
                return place.keep(y, ep, rest)
            layouts = [(None, batch), (ep, rest)]
            for dims in layouts if inwards else reversed(layouts):
                y = place.keep(y, *dims)
            return y

        slots = hops(slots, True)
        with place.scope("experts"):
            if fused:
                up, gates = jnp.split(jnp.einsum("ebcm,emh->ebch", slots, w["gate_up"]), 2, -1)
                h = jax.nn.silu(gates) * up
            else:
                h = jnp.einsum("ebcm,emh->ebch", slots, w["w1"])
                if biases:
                    h = h + w["b1"][:, None, None]
                h = jax.nn.silu(h)
                if gated:
                    h = h * jnp.einsum("ebcm,emh->ebch", slots, w["w3"])
            if style == "gather_wo":
                h = place.keep(place.keep(h, ep, rest), None, batch)
            y = jnp.einsum("ebch,ehm->ebcm", h, w["w2"])
            if biases:
                y = y + w["b2"][:, None, None]
        y = place.keep(y, None, batch) if style == "gather_wo" else hops(y, False)
        with place.scope("combine"):
            share = (mask * probs[..., None]).astype(y.dtype)
            out = jnp.einsum("bsec,ebcm->bsm", share, y)
        if shared:
            with place.scope("shared"):
                out = out + jax.nn.gelu(x @ w["shared_up"]) @ w["shared_down"]
        return out if style == "free" else place.keep(out, batch, None, None)

    def block(w: Tree, x: jax.Array, style: str) -> jax.Array:
        if attention:
            x = x + attend(w, x * w["norm"])
        return x + mixture(w, x * w["norm"], style)

    if remat:
        block = jax.checkpoint(block, static_argnums=2)

    def trunk(params: Tree, x: jax.Array) -> jax.Array:
        if scan:
            assert len(set(styles)) == 1
            return jax.lax.scan(lambda x, w: (block(w, x, styles[0]), None), x, params["blocks"])[0]
        for w, style in zip(params["blocks"], styles, strict=True):
            x = block(w, x, style)
        return x

    def one_loss(params: Tree, *batch: jax.Array) -> jax.Array:
        if not vocab:
            with place.scope("loss"):
                return jnp.mean(trunk(params, batch[0]).astype(jnp.float32) ** 2)
        with place.scope("embed"):
            x = place.keep(params["embed"][batch[0]], place.batch, None, None)
        x = trunk(params, x)
        with place.scope("loss"):
            return cross_entropy(jnp.einsum("bsm,mv->bsv", x, params["unembed"]), batch[1])

    def loss(params: Tree, *batch: jax.Array) -> jax.Array:
        if microbatches == 1:
            return one_loss(params, *batch)
        split = [
            place.keep(
                jnp.swapaxes(x.reshape(-1, microbatches, *x.shape[1:]), 0, 1), None, place.batch
            )
            for x in batch
        ]
        body = lambda total, part: (total + one_loss(params, *part), None)  # noqa: E731
        return jax.lax.scan(body, jnp.float32(0), split)[0] / microbatches

    rows = B * microbatches
    if vocab:
        tokens = place.array((rows, S), "int32", place.batch, None)
        inputs: tuple[Any, ...] = (tokens, tokens)
    else:
        inputs = (place.array((rows, S, M), dtype, place.batch, None, None),)
    if container == "tuple":  # flat positional leaves: no names at all
        leaves, tree = jax.tree.flatten(params)
        return finish(
            kind,
            lambda leaves, *batch: loss(jax.tree.unflatten(tree, leaves), *batch),
            tuple(leaves),
            *inputs,
        )
    return finish(kind, loss, params, *inputs)
