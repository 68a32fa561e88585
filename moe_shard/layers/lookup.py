"""Look up the vectors of tokens, and sum the gradients of equal tokens without a serial scatter.

It runs under `jax.shard_map`: the table is gathered over the axes that split its vectors, in the
dtype of the activations, and its gradient is scattered along them. Pieces of vectors stay apart,
[D v m], until they are looked up: joined first, GPUs lay the table out with the vocabulary
innermost, and read and write every vector element by element.

A scatter that adds is one atomic addition after the other on GPUs: slow for frequent tokens,
rounded to the narrow dtype each time, and in an order that no two runs share. Here the tokens are
sorted, runs of equal ones are summed in blocks by small products with float32 sums, and each vector
is written once. CPU's own scatter is in order and faster than that, so it keeps it.

Dims besides those of the package:

    D  pieces of a vector as stored     T  tokens of a device     v  vocabulary of a device
    m  elements of a piece              U  sums of runs
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moe_shard.sharding.annotate import Sharding, axes_by_dim, axes_of, spec_of
from moe_shard.sharding.rules import LogicalAxes

_BLOCK = 128
_EXACT = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Lookup:
    """Describe the lookup of a batch, on a mesh.

    Attributes:
        mesh: the mesh of the devices.
        vectors: spec of the result, [B S M].
        table: spec of the table [V M]: V over axes that split no tokens, M over axes that do.
        dtype: dtype of the vectors and of what crosses the wire.
        blocked: whether the gradient is summed in blocks, or by the platform's scatter.
    """

    mesh: Mesh | AbstractMesh
    vectors: PartitionSpec
    table: PartitionSpec
    dtype: DTypeLike
    blocked: bool

    def __call__(
        self, table: Float[Array, "V M"], tokens: Int[Array, "B S"]
    ) -> Float[Array, "B S M"]:
        """Return the vectors of tokens; the gradient of the table has its dtype and layout."""
        return _look_up(self, table, tokens)

    def vectors_of(
        self, table: Float[Array, "V M"], tokens: Int[Array, "B S"]
    ) -> Float[Array, "B S M"]:
        """Look up vectors; a gradient of this would be XLA's."""
        run = jax.shard_map(
            self._vectors_on_device,
            mesh=self.mesh,
            in_specs=(self.table, PartitionSpec(*self.vectors[:2])),
            out_specs=self.vectors,
            check_vma=False,  # a gathered table is not known to be equal where it is
        )
        return run(table, tokens)

    def gradient(
        self, of_vectors: Float[Array, "B S M"], tokens: Int[Array, "B S"], vocab_size: int
    ) -> Float[Array, "V M"]:
        """Sum the gradients of the vectors of each token, as the table is stored."""
        vocab = vocab_size // math.prod(self.mesh.shape[axis] for axis in self._vocab_axes)
        run = jax.shard_map(
            partial(self._gradient_on_device, vocab=vocab),
            mesh=self.mesh,
            in_specs=(self.vectors, PartitionSpec(*self.vectors[:2])),
            out_specs=self.table,
            check_vma=False,
        )
        return run(of_vectors, tokens)

    @property
    def _vocab_axes(self) -> tuple[str, ...]:
        return axes_of(self.table[0])

    def _ids(self, tokens: Int[Array, "b s"], vocab: int) -> Int[Array, "T"]:
        """Number tokens in this device's part of the vocabulary; others are out of its range."""
        first = jax.lax.axis_index(self._vocab_axes) * vocab if self._vocab_axes else 0
        return tokens.reshape(-1) - first

    def _vectors_on_device(
        self, table: Float[Array, "v m"], tokens: Int[Array, "b s"]
    ) -> Float[Array, "b s _"]:
        narrow, axes = table.astype(self.dtype), axes_of(self.table[1])
        pieces = jax.lax.all_gather(narrow, axes) if axes else narrow[None]
        ids = self._ids(tokens, table.shape[0])
        found = jnp.take(pieces, ids, axis=1, mode="clip").swapaxes(0, 1)
        x = found.reshape(*tokens.shape, -1)
        if not self._vocab_axes:
            return x
        here = ((ids >= 0) & (ids < table.shape[0])).reshape(*tokens.shape, 1)
        x = jnp.where(here, x, jnp.zeros_like(x))  # one device has it, so the sum is exact
        if axes_of(self.vectors[2]):
            return jax.lax.psum_scatter(x, self._vocab_axes, scatter_dimension=2, tiled=True)
        return jax.lax.psum(x, self._vocab_axes)

    def _gradient_on_device(
        self, g: Float[Array, "b s _"], tokens: Int[Array, "b s"], *, vocab: int
    ) -> Float[Array, "v m"]:
        stored = axes_of(self.table[1])
        if embed_axes := axes_of(self.vectors[2]):
            g = jax.lax.all_gather(g, embed_axes, axis=2, tiled=True)
        ids = self._ids(tokens, vocab)
        pieces = math.prod(self.mesh.shape[axis] for axis in stored)
        rows = g.astype(self.dtype).reshape(ids.size, pieces, -1)
        add = sum_in_blocks if self.blocked else sum_by_scatter
        sums = add(rows, ids, vocab)
        sums = jax.lax.psum_scatter(sums, stored) if stored else sums[0]
        token_axes = (*axes_of(self.vectors[0]), *axes_of(self.vectors[1]))
        others = tuple(axis for axis in token_axes if axis not in stored)
        return jax.lax.psum(sums, others) if others else sums


def lay_out_lookup(
    sharding: Sharding,
    shape: tuple[int, int, int],
    *,
    vocab_size: int,
    stored: LogicalAxes,
    dtype: DTypeLike,
) -> Lookup:
    """Describe the lookup of a batch, as the rule table lays its arrays out.

    Args:
        sharding: the mesh and its rules.
        shape: [B S M] of the result on all devices together.
        vocab_size: V.
        stored: logical axes of the table as a parameter.
        dtype: of the vectors.

    Raises:
        UserError: see `RuleTable.resolve`.
    """
    place = partial(sharding.named_sharding, dtype=dtype)
    table = place("embedding table as stored", stored, (vocab_size, shape[2])).spec
    place("embedding table in use", ("vocab", None), (vocab_size, shape[2]))
    x = place("embedded", ("activation_batch", "activation_length", "activation_embed"), shape)
    batch_axes, length_axes, embed_axes = axes_by_dim(x.spec, 3)
    token_axes = {*batch_axes, *length_axes}
    # What else the table splits is joined by the partitioner, before the lookup.
    by_vocab, by_embed = axes_by_dim(table, 2)
    vocab_axes = tuple(axis for axis in by_vocab if axis not in token_axes)
    kept = tuple(axis for axis in by_embed if axis in token_axes)
    return Lookup(
        mesh=sharding.mesh,
        vectors=spec_of(batch_axes, length_axes, embed_axes if embed_axes == vocab_axes else ()),
        table=spec_of(vocab_axes, kept),
        dtype=dtype,
        blocked=sharding.platform != "cpu",
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _look_up(
    lookup: Lookup, table: Float[Array, "V M"], tokens: Int[Array, "B S"]
) -> Float[Array, "B S M"]:
    return lookup.vectors_of(table, tokens)


def _look_up_fwd(
    lookup: Lookup, table: Float[Array, "V M"], tokens: Int[Array, "B S"]
) -> tuple[Float[Array, "B S M"], Any]:
    # An empty array tells the backward pass the table's dtype and rows without keeping it.
    return lookup.vectors_of(table, tokens), (tokens, table[:, :0])


def _look_up_bwd(lookup: Lookup, kept: Any, g: Float[Array, "B S M"]) -> tuple[Any, None]:
    tokens, like = kept
    return lookup.gradient(g, tokens, like.shape[0]).astype(like.dtype), None


_look_up.defvjp(_look_up_fwd, _look_up_bwd)


def sum_by_scatter(
    rows: Float[Array, "T D m"], ids: Int[Array, "T"], vocab: int
) -> Float[Array, "D v m"]:
    """Sum the rows of each id in [0, vocab) by XLA's scatter, in float32."""
    none = jnp.zeros((vocab, *rows.shape[1:]), jnp.float32)
    at = jnp.where(ids < 0, vocab, ids)  # a negative index would count from the end
    sums = none.at[at].add(rows.astype(jnp.float32), mode="drop")
    return sums.astype(rows.dtype).swapaxes(0, 1)


def sum_in_blocks(
    rows: Float[Array, "T D m"], ids: Int[Array, "T"], vocab: int
) -> Float[Array, "D v m"]:
    """Sum the rows of each id in [0, vocab), in float32 and always in the same order.

    Sorted, equal ids are runs. A product with a 0/1 matrix sums the runs in each block of rows. A
    run that goes on in later blocks belongs to the one where it begins, and only the first run of a
    block can have begun before; so one small product over blocks adds what later ones have of it.

    Args:
        rows: what is summed.
        ids: of the rows; those out of range are left out.
        vocab: v.

    Returns:
        The sums, in the dtype of the rows.
    """
    blocks = -(-ids.size // _BLOCK)
    ids = jnp.where((ids >= 0) & (ids < vocab), ids, vocab)
    ids = jnp.pad(ids, (0, blocks * _BLOCK - ids.size), constant_values=vocab)
    ids, order = jax.lax.sort((ids, jnp.arange(ids.size, dtype=jnp.int32)), num_keys=1)
    # A row that fills up the last block reads any row, for a sum that is left out.
    x = jnp.take(rows.reshape(rows.shape[0], -1), order, axis=0, mode="clip")
    x, ids = x.reshape(blocks, _BLOCK, -1), ids.reshape(blocks, _BLOCK)
    begins = jnp.concatenate([jnp.zeros((blocks, 1), bool), ids[:, 1:] != ids[:, :-1]], axis=1)
    run = jnp.cumsum(begins, axis=1, dtype=jnp.int32)  # the number of each row's run in its block
    number = jnp.arange(_BLOCK)
    is_of_run = run[:, :, None] == number
    member = is_of_run.astype(x.dtype)
    total = partial(jnp.einsum, preferred_element_type=jnp.float32, precision=_EXACT)
    sums = total("brj,brm->bjm", member, x)
    first_run = total("br,brm->bm", member[:, :, 0], x)
    first, last, last_run = ids[:, 0], ids[:, -1], run[:, -1]
    later = jnp.arange(blocks)[:, None] < jnp.arange(blocks)
    goes_on = ((last[:, None] == first) & later).astype(jnp.float32)
    more = total("bc,cm->bm", goes_on, first_run)
    sums = sums + jnp.where((number == last_run[:, None])[..., None], more[:, None], 0)
    begun_here = jnp.concatenate([jnp.ones(1, bool), last[:-1] != first[1:]])
    own = (number <= last_run[:, None]) & ((number > 0) | begun_here[:, None])
    of_run = jnp.max(jnp.where(is_of_run, ids[:, :, None], 0), axis=1)
    # Indices out of range differ too, as is promised of all.
    at = jnp.where(own & (of_run < vocab), of_run, vocab + jnp.arange(ids.size).reshape(ids.shape))
    values = sums.astype(rows.dtype).reshape(-1, *rows.shape[1:]).swapaxes(0, 1)
    none = jnp.zeros((rows.shape[1], vocab, rows.shape[2]), rows.dtype)
    return none.at[:, at.reshape(-1)].set(values, mode="drop", unique_indices=True)
