"""Write mixtures of experts under shard_map: one device's program, its exchanges spelled out.

`how` is what crosses between devices, layer by layer:

    slots         slots of every expert, by a tiled all-to-all
    slots_split   the same by an all-to-all over a leading dim of its own (tiled=False)
    copies        one buffer for each device, sorted by expert there, ragged_dot (as DeepSeek's)
    ragged        the same by ragged-all-to-all, with counts exchanged first
    weights       the weights, by an all-gather; every device computes its own tokens
    weights_loop  the weights one expert at a time, in a loop, each broadcast by its owner
    wo_only       slots go to the experts and hidden rows come back; w_down is gathered
    all_tokens    every device's tokens by an all-gather, the results by a reduce-scatter
    all_tokens_psum   as all_tokens, the results by an all-reduce
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from tests.lowering.foreign.setup import Place, Tree, finish


def program(
    place: Place,
    *,
    kind: str = "grad",
    how: tuple[str, ...] = ("slots", "slots"),
    scan: bool = False,
    remat: bool = False,
    experts: int = 8,
    top_k: int = 2,
    gather_fsdp: bool = False,
    stacked_by: str = "layer",
    dtype: str = "float32",
    sizes: tuple[int, int, int, int] = (16, 64, 128, 320),
) -> tuple[Any, tuple[Any, ...], Any]:
    """Build the step of a stack of residual mixtures; see `finish`."""
    B, S, M, H = sizes
    L, E, K, ep, fsdp = len(how), experts, top_k, place.ep, place.fsdp
    W = place.mesh.shape[ep]  # devices along the experts' axis
    split = fsdp if gather_fsdp else None
    specs = {
        "w_router": P(None, None),
        "w_gate": P(ep, split, None),
        "w_up": P(ep, split, None),
        "w_down": P(ep, None, split),
    }
    shapes = {"w_router": (M, E), "w_gate": (E, M, H), "w_up": (E, M, H), "w_down": (E, H, M)}

    def dense_experts(w: Tree, x: jax.Array) -> jax.Array:
        """Apply [G, M, H] to rows [G, R, M]."""
        with place.scope("experts"):
            h = jax.nn.silu(lax.batch_matmul(x, w["w_gate"])) * lax.batch_matmul(x, w["w_up"])
            return lax.batch_matmul(h, w["w_down"])

    def ragged_experts(w: Tree, x: jax.Array, sizes: jax.Array) -> jax.Array:
        with place.scope("experts"):
            h = lax.ragged_dot(x, w["w_gate"], sizes)
            h = jax.nn.silu(h) * lax.ragged_dot(x, w["w_up"], sizes)
            return lax.ragged_dot(h, w["w_down"], sizes)

    def into_slots(x: jax.Array, ids: jax.Array, C: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Put T*K copies of tokens [T, M] in E*C slots; also return where, and who fits."""
        flat = ids.reshape(-1)
        onehot = jax.nn.one_hot(flat, E, dtype=jnp.int32)
        position = ((jnp.cumsum(onehot, 0) - onehot) * onehot).sum(-1)
        where = jnp.where(position < C, flat * C + position, E * C)
        rows = jnp.repeat(x, K, axis=0)
        slots = jnp.zeros((E * C, M), x.dtype).at[where].set(rows, mode="drop")
        return slots, jnp.minimum(where, E * C - 1), position < C

    def one_layer(w: Tree, x: jax.Array, how: str) -> jax.Array:
        """One device's part: tokens [B, S, M] of its own, the weights it holds."""
        shape = x.shape
        if gather_fsdp and fsdp:
            w = w | {
                "w_gate": lax.all_gather(w["w_gate"], fsdp, axis=1, tiled=True),
                "w_up": lax.all_gather(w["w_up"], fsdp, axis=1, tiled=True),
                "w_down": lax.all_gather(w["w_down"], fsdp, axis=2, tiled=True),
            }
        x = x.reshape(-1, M)
        if how.startswith("all_tokens"):
            with place.scope("dispatch"):
                x = lax.all_gather(x, ep, axis=0, tiled=True)
        with place.scope("router"):
            probs = jax.nn.softmax((x @ w["w_router"]).astype(jnp.float32))
            share, ids = lax.top_k(probs, K)
            share = (share / share.sum(-1, keepdims=True)).astype(x.dtype)
        T = x.shape[0]
        C = T * K // E
        if how in ("copies", "ragged"):
            y = by_copies(w, x, ids, exact=how == "ragged")
        else:
            with place.scope("dispatch"):
                slots, where, fits = into_slots(x, ids, C)
                slots = slots.reshape(E, C, M)
            y = by_slots(w, slots, how).reshape(E * C, M)[where] * fits[:, None]
        with place.scope("combine"):
            out = (y.reshape(T, K, M) * share[..., None]).sum(1)
            if how == "all_tokens":
                out = lax.psum_scatter(out, ep, scatter_dimension=0, tiled=True)
            elif how == "all_tokens_psum":
                mine = lax.axis_index(ep) * (T // W)
                out = lax.dynamic_slice_in_dim(lax.psum(out, ep), mine, T // W)
        return out.reshape(shape)

    def by_slots(w: Tree, slots: jax.Array, how: str) -> jax.Array:
        C = slots.shape[1]
        if how == "slots":
            slots = lax.all_to_all(slots, ep, split_axis=0, concat_axis=1, tiled=True)
            y = dense_experts(w, slots)
            return lax.all_to_all(y, ep, split_axis=1, concat_axis=0, tiled=True)
        if how == "slots_split":
            slots = lax.all_to_all(slots.reshape(W, E // W, C, M), ep, 0, 0)
            slots = slots.transpose(1, 0, 2, 3).reshape(E // W, W * C, M)
            y = dense_experts(w, slots).reshape(E // W, W, C, M).transpose(1, 0, 2, 3)
            return lax.all_to_all(y, ep, 0, 0).reshape(E, C, M)
        if how == "wo_only":
            slots = lax.all_to_all(slots, ep, split_axis=0, concat_axis=1, tiled=True)
            h = jax.nn.silu(lax.batch_matmul(slots, w["w_gate"]))
            h = h * lax.batch_matmul(slots, w["w_up"])
            h = lax.all_to_all(h, ep, split_axis=1, concat_axis=0, tiled=True)
            return lax.batch_matmul(h, lax.all_gather(w["w_down"], ep, axis=0, tiled=True))
        if how == "weights":
            names = ("w_gate", "w_up", "w_down")
            return dense_experts(
                {name: lax.all_gather(w[name], ep, axis=0, tiled=True) for name in names}, slots
            )
        if how == "weights_loop":
            names = ("w_gate", "w_up", "w_down")

            def one(carry: None, each: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
                expert, rows = each
                mine = lax.axis_index(ep) == expert // (E // W)
                here = {n: jnp.where(mine, w[n][expert % (E // W)], 0)[None] for n in names}
                return carry, dense_experts(lax.psum(here, ep), rows[None])[0]

            return lax.scan(one, None, (jnp.arange(E), slots))[1]
        first = lax.axis_index(ep) * (E // W)
        y = dense_experts(w, lax.dynamic_slice_in_dim(slots, first, E // W))
        return lax.dynamic_update_slice_in_dim(jnp.zeros_like(slots), y, first, 0)

    def by_copies(w: Tree, x: jax.Array, ids: jax.Array, exact: bool) -> jax.Array:
        """Send sorted copies of tokens to their experts' devices, and back."""
        T, G = x.shape[0], E // W
        rows = T * K
        with place.scope("dispatch"):
            flat = ids.reshape(-1)
            order = jnp.argsort(flat)
            copies = jnp.repeat(x, K, axis=0)[order]
            counts = jnp.bincount(flat, length=E)  # by expert
            send = counts.reshape(W, G).sum(1)
            start = jnp.cumsum(send) - send
            every = lax.all_gather(send, ep)  # [from, to]
            me = lax.axis_index(ep)
            receive = every[:, me]
            if exact:
                landing = (jnp.cumsum(every, 0) - every)[me]
                buffer = jnp.zeros((W * rows, M), x.dtype)
                got = lax.ragged_all_to_all(
                    copies, buffer, start, send, landing, receive, axis_name=ep
                )
                owner = jnp.zeros((W * rows,), flat.dtype)
                local = lax.ragged_all_to_all(
                    flat[order] % G, owner, start, send, landing, receive, axis_name=ep
                )
                alive = jnp.arange(W * rows) < receive.sum()
            else:
                slot = jnp.arange(rows) - jnp.repeat(start, send, total_repeat_length=rows)
                to = flat[order] // G
                padded = jnp.zeros((W, rows, M), x.dtype).at[to, slot].set(copies)
                names = jnp.full((W, rows), G, flat.dtype).at[to, slot].set(flat[order] % G)
                got = lax.all_to_all(padded, ep, 0, 0).reshape(W * rows, M)
                local = lax.all_to_all(names, ep, 0, 0).reshape(-1)
                alive = local < G
        within = jnp.argsort(jnp.where(alive, local, G))
        sizes = jnp.bincount(jnp.where(alive, local, G), length=G + 1)[:G]
        y = ragged_experts(w, got[within], sizes)[jnp.argsort(within)] * alive[:, None]
        with place.scope("combine"):
            if exact:
                begin = jnp.cumsum(receive) - receive
                back = (jnp.cumsum(every, 1) - every)[:, me]
                y = lax.ragged_all_to_all(
                    y, jnp.zeros((rows, M), x.dtype), begin, receive, back, send, axis_name=ep
                )
            else:
                y = lax.all_to_all(y.reshape(W, rows, M), ep, 0, 0)[to, slot]
            return y[jnp.argsort(order)]

    def layer(w: Tree, x: jax.Array, how: str) -> jax.Array:
        spread = P(place.batch, None, None)
        mapped = jax.shard_map(
            lambda w, x: one_layer(w, x, how),
            mesh=place.mesh,
            in_specs=(specs, spread),
            out_specs=spread,
            check_vma=False,
        )
        return x + mapped(w, x)

    if remat:
        layer = jax.checkpoint(layer, static_argnums=2)

    def loss(params: Tree, x: jax.Array) -> jax.Array:
        if scan:
            x = lax.scan(lambda x, w: (layer(w, x, how[0]), None), x, params)[0]
        else:
            for i, each in enumerate(how):
                w = (
                    params[i]
                    if stacked_by == "layer"
                    else {name: leaf[i] for name, leaf in params.items()}
                )
                x = layer(w, x, each)
        return jnp.mean(x.astype(jnp.float32) ** 2)

    params: Any
    if scan or stacked_by == "weight":
        params = {
            name: place.array((L, *shape), dtype, None, *specs[name])
            for name, shape in shapes.items()
        }
    else:
        params = [
            {name: place.array(shape, dtype, *specs[name]) for name, shape in shapes.items()}
            for _ in how
        ]
    x = place.array((B, S, M), dtype, place.batch, None, None)
    return finish(kind, loss, params, x)
