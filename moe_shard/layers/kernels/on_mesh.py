"""Run an implementation of attention on each device of a mesh, in `jax.shard_map`.

Sequences and heads are split as the rule table splits them, and need no exchange. Where the tokens
of a sequence are split too (the context axis), queries stay where they are, and keys, values and
their tokens are gathered, or pass from device to device (`ring.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from moe_shard.config.attention_config import AttentionConfig, ContextStrategy
from moe_shard.layers.kernels.choose import (
    Attend,
    AttentionKernel,
    choose_attention,
    choose_for_ring,
)
from moe_shard.layers.kernels.rule import AttentionCase, AttentionRule, Tokens
from moe_shard.sharding.annotate import Sharding, axes_by_dim, spec_of

_Axes = tuple[str, ...]


@dataclass(frozen=True)
class AttentionShards:
    """Describe how the arrays of attention are split over a mesh.

    Attributes:
        mesh: the devices.
        batch: mesh axes of the sequences.
        length: mesh axes of the queries' tokens.
        key_length: mesh axes of the keys' tokens: `length`, or none.
        heads: mesh axes of the query heads.
        kv_heads: mesh axes of the key heads: `heads`, or none.
        strategy: how keys reach the queries of other devices.
    """

    mesh: Mesh | AbstractMesh
    batch: _Axes
    length: _Axes
    key_length: _Axes
    heads: _Axes
    kv_heads: _Axes
    strategy: ContextStrategy

    @classmethod
    def of(
        cls,
        sharding: Sharding,
        query: tuple[int, ...],
        key: tuple[int, ...],
        *,
        key_length: str,
        strategy: ContextStrategy,
    ) -> AttentionShards:
        """Resolve the rule table for arrays of these shapes.

        Args:
            sharding: the mesh and its rules.
            query: [B S N D].
            key: [B T J D].
            key_length: logical axis of the keys' tokens as they arrive.
            strategy: how keys reach the queries of other devices.
        """

        def resolve(name: str, shape: tuple[int, ...], *axes: str) -> list[_Axes]:
            spec = sharding.spec(name, ("activation_batch", *axes, None), shape)
            return axes_by_dim(spec, 4)

        batch, length, heads, _ = resolve("queries", query, "activation_length", "activation_heads")
        _, of_keys, kv_heads, _ = resolve("keys", key, key_length, "activation_kv_heads")
        return cls(
            mesh=sharding.mesh,
            batch=batch,
            length=length,
            # What is split otherwise than the queries is brought to that by the partitioner.
            key_length=of_keys if of_keys == length else (),
            heads=heads,
            kv_heads=kv_heads if kv_heads == heads else (),
            strategy=strategy,
        )

    @property
    def is_ring(self) -> bool:
        """Return whether keys and values pass from device to device."""
        return self.strategy == "ring" and self.size(self.key_length) > 1

    def size(self, axes: _Axes) -> int:
        """Return the number of devices along these mesh axes."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    @property
    def query_spec(self) -> PartitionSpec:
        """Return the spec of queries and of the output."""
        return spec_of(self.batch, self.length, self.heads)

    @property
    def key_spec(self) -> PartitionSpec:
        """Return the spec of keys and of values."""
        return spec_of(self.batch, self.key_length, self.kv_heads)

    def local_kv_heads(self, heads: int, kv_heads: int) -> int:
        """Return J of one device, which attends from its share of all query heads.

        Args:
            heads: query heads of all devices together.
            kv_heads: key heads of all devices together.
        """
        if self.kv_heads == self.heads:
            return kv_heads // self.size(self.heads)
        return len(self._kv_heads_of(0, heads // self.size(self.heads), heads // kv_heads))

    def _kv_heads_of(self, first: int, heads: int, group: int) -> list[int]:
        """Return the key heads that query heads from `first` on need, as few as are grouped."""
        needed = [(first + head) // group for head in range(heads)]
        regular = heads % group == 0 or group % heads == 0
        return sorted(set(needed)) if regular else needed

    def own_kv_heads(
        self, x: Float[Array, "b T J D"], heads: int, group: int
    ) -> Float[Array, "b T j D"]:
        """Select the key heads of this device's query heads, from all key heads.

        Args:
            x: keys or values.
            heads: query heads of this device.
            group: query heads of each key head.
        """
        if self.kv_heads == self.heads:
            return x
        parts = self.size(self.heads)
        needed = [self._kv_heads_of(part * heads, heads, group) for part in range(parts)]
        mine = jnp.asarray(np.array(needed, np.int32))[jax.lax.axis_index(self.heads)]
        return jnp.take(x, mine, axis=2)

    def all_tokens(self, x: Shaped[Array, "b t ..."]) -> Shaped[Array, "b T ..."]:
        """Gather what is split over the tokens of keys."""
        if self.size(self.key_length) == 1:
            return x
        return jax.lax.all_gather(x, self.key_length, axis=1, tiled=True)


def plan_attention(
    config: AttentionConfig,
    rule: AttentionRule,
    sharding: Sharding,
    query: tuple[int, ...],
    key: tuple[int, ...],
    value_dim: int,
    *,
    dtype: DTypeLike,
    key_length: str,
    same_tokens: bool,
) -> tuple[AttentionKernel, AttentionShards]:
    """Choose the implementation for arrays of these shapes, and how devices share the work.

    Args:
        config: the layer's configuration.
        rule: mask and scores.
        sharding: the mesh and its rules.
        query: [B S N D].
        key: [B T J D].
        value_dim: Dv.
        dtype: dtype of the arrays.
        key_length: logical axis of the keys' tokens as they arrive.
        same_tokens: whether queries and keys are those of the same tokens; else a cache's.

    Raises:
        UserError: the implementation that `attention` names cannot compute this.
    """
    shards = AttentionShards.of(
        sharding, query, key, key_length=key_length, strategy=config.context_parallel_strategy
    )
    case = AttentionCase(
        platform=sharding.platform,
        rule=rule,
        sink=config.attention_sink,
        rows=query[0] // shards.size(shards.batch),
        queries=query[1] // shards.size(shards.length),
        keys=key[1],
        heads=query[2] // shards.size(shards.heads),
        kv_heads=shards.local_kv_heads(query[2], key[2]),
        key_dim=query[3],
        value_dim=value_dim,
        dtype=dtype,
        same_tokens=same_tokens and shards.size(shards.length) == 1,
    )
    if shards.is_ring:
        return choose_for_ring(config.attention, case), shards
    requested = config.attention
    if not same_tokens and requested != "dot_product":
        requested = "blockwise"  # kernels are for training; this reads any cache
    return choose_attention(requested, case), shards


def attend_on_mesh(
    attend: Attend,
    query: Float[Array, "B S N D"],
    key: Float[Array, "B T J D"],
    value: Float[Array, "B T J Dv"],
    queries: Tokens,
    keys: Tokens,
    *,
    rule: AttentionRule,
    sink: Float[Array, "N"] | None,
    shards: AttentionShards,
    check_vma: bool = True,
) -> Float[Array, "B S N Dv"]:
    """Attend, each device from its own queries.

    Args:
        attend: an implementation.
        query: see `moe_shard.layers.kernels`, as all others.
        key: all, or split over the context axis like the queries.
        value: likewise.
        queries: the tokens that attend.
        keys: the tokens attended to.
        rule: mask and scores.
        sink: of all heads.
        shards: how the arrays are split.
        check_vma: see `AttentionKernel`.
    """
    if shards.mesh.size == 1:
        attended: Float[Array, "B S N Dv"]
        attended = attend(query, key, value, queries, keys, rule=rule, sink=sink)
        return attended
    group = query.shape[2] // key.shape[2]
    is_split = shards.size(shards.length) > 1

    def whole(x: Shaped[Array, "b t ..."]) -> Shaped[Array, "b T ..."]:
        return x if shards.is_ring else shards.all_tokens(x)

    def local(
        arrays: Mapping[str, Float[Array, "..."]], info: Mapping[str, Int[Array, "b _"]]
    ) -> Float[Array, "b s n Dv"]:
        query = arrays["query"]
        key, value = (
            shards.own_kv_heads(whole(arrays[name]), query.shape[2], group)
            for name in ("key", "value")
        )
        order, key_order = queries.order, keys.order
        if order is not None and key_order is not None and is_split:
            # Which queries these are is known when the program runs, not when it is traced.
            first = jax.lax.axis_index(shards.length) * query.shape[1]
            order = jax.lax.dynamic_slice_in_dim(jnp.asarray(order), first, query.shape[1])
            key_order = order if shards.is_ring else key_order
        mine = Tokens(info["positions"], info["segment_ids"], order)
        theirs = Tokens(whole(info["key_positions"]), whole(info["key_segment_ids"]), key_order)
        ring = {"axes": shards.length, "size": shards.size(shards.length)} if shards.is_ring else {}
        return attend(query, key, value, mine, theirs, rule=rule, sink=arrays.get("sink"), **ring)

    arrays = {"query": query, "key": key, "value": value}
    specs = {"query": shards.query_spec, "key": shards.key_spec, "value": shards.key_spec}
    if sink is not None:
        arrays["sink"], specs["sink"] = sink, spec_of(shards.heads)
    own = spec_of(shards.batch, shards.length)
    others = spec_of(shards.batch, shards.key_length)
    info = {
        "positions": queries.positions,
        "segment_ids": queries.segment_ids,
        "key_positions": keys.positions,
        "key_segment_ids": keys.segment_ids,
    }
    mapped = jax.shard_map(
        local,
        mesh=shards.mesh,
        in_specs=(specs, dict(zip(info, (own, own, others, others), strict=True))),
        out_specs=shards.query_spec,
        check_vma=check_vma,
    )
    attended = mapped(arrays, info)
    return attended
