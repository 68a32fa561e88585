"""Compute cross entropy from hidden states in chunks of tokens, with its gradients.

The logits [B S V] of a batch never exist. A device takes its tokens chunk by chunk: one product
makes a chunk's logits, and while they are there, two more make what the chunk adds to the gradients
of hidden states and kernel. That is possible because the loss is a mean: the gradient of each term
is known at once, up to one factor for all. So a step computes the logits once, with three products
in all, where a recomputing gradient needs four; and it holds the kernel's gradient in float32
instead of the logits.

It runs under `jax.shard_map`: the kernel is gathered once, in the dtype of the products, and its
gradient is scattered once. Where the vocabulary is split, devices exchange numbers per token only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from moe_shard.config.model_config import CrossEntropyName
from moe_shard.errors import UserError
from moe_shard.layers import tokamax_loss
from moe_shard.sharding.annotate import Sharding, axes_by_dim, axes_of, spec_of
from moe_shard.sharding.rules import LogicalAxes
from moe_shard.sharding.varying import vary_over, zeros
from moe_shard.units import human_bytes

CHUNK_BYTES = 2**28
"""Logits of a chunk, in float32, that the number of chunks is chosen for."""

CHUNK_TOKENS = 2048
"""Tokens of a chunk, however many bytes they make: each chunk reads and writes the kernel's
gradient, which with fewer tokens takes longer than the products do."""

IGNORED = -1
"""Target of a token that has no loss; see `counted` of `CrossEntropy`."""

# Reports read the pass from JAX's own name of a gradient.
_BACKWARD = "transpose(jvp(logits))"


def number_of_chunks(tokens: int, vocab: int) -> int:
    """Choose into how many chunks a device divides its tokens.

    Args:
        tokens: tokens of one device.
        vocab: entries of the vocabulary on one device.

    Returns:
        The fewest chunks within `CHUNK_BYTES`, or within `CHUNK_TOKENS` where those are more; up to
        twice as many where that divides the tokens.
    """
    most = max(CHUNK_TOKENS, CHUNK_BYTES // (4 * vocab))
    fewest = -(-tokens // most)
    return next((n for n in range(fewest, 2 * fewest) if tokens % n == 0), fewest)


def lay_out_loss(
    sharding: Sharding,
    shape: tuple[int, int, int],
    *,
    vocab_size: int,
    stored: LogicalAxes,
    dtype: DTypeLike,
    scaling: float,
    soft_cap: float,
    chunks: int,
    routine: CrossEntropyName = "auto",
    biased: bool = False,
    masked: bool = False,
) -> CrossEntropy:
    """Describe the loss of a batch, as the rule table lays its arrays out.

    Args:
        sharding: the mesh and its rules.
        shape: [B S M], of the hidden states on all devices together.
        vocab_size: V.
        stored: logical axes of the projection as a parameter; one of them is "vocab".
        dtype: see `CrossEntropy`, as the next two.
        scaling: of the logits.
        soft_cap: of the logits.
        chunks: chunks of a device's tokens; -1: `number_of_chunks`.
        routine: "auto": chunks; "tokamax": its kernel.
        biased: whether the logits have a bias.
        masked: whether some tokens may not count.

    Raises:
        UserError: see `RuleTable.resolve`; or more chunks than tokens, or tokamax where it cannot
            run.
    """
    rows = ("activation_batch", "activation_length")
    size = tuple(vocab_size if axis == "vocab" else shape[2] for axis in stored)
    used = tuple("activation_vocab" if axis == "vocab" else None for axis in stored)
    place = partial(sharding.named_sharding, dtype=dtype)
    where = place("logits kernel as stored", stored, size).spec
    place("logits kernel in use", used, size)
    hidden = place("embedded", (*rows, "activation_embed"), shape).spec  # hidden states lie alike
    logits = sharding.named_sharding(
        "logits", (*rows, "activation_vocab"), (*shape[:2], vocab_size), dtype=jnp.float32
    ).spec
    batch_axes, length_axes, vocab_axes = axes_by_dim(logits, 3)
    token_axes = (*batch_axes, *length_axes)
    vocab_dim = stored.index("vocab")
    # What else the table splits is joined by the partitioner, before the loss.
    kept = tuple(axis for axis in axes_by_dim(where, 2)[1 - vocab_dim] if axis in token_axes)
    weight = (kept, vocab_axes) if vocab_dim else (vocab_axes, kept)
    split_alike = axes_by_dim(hidden, 3)[2] == vocab_axes
    tokens = shape[0] * shape[1] // math.prod(sharding.mesh.shape[axis] for axis in token_axes)
    if chunks > tokens:
        raise UserError(
            f"num_vocab_tiling={chunks}: a device has {tokens} tokens of a microbatch\n"
            f"fix: at most {tokens}, or -1 to have it chosen"
        )
    split = math.prod(sharding.mesh.shape[axis] for axis in vocab_axes)
    if routine == "tokamax":
        plain = not biased and not masked and scaling == 1 and soft_cap == 0
        tokamax_loss.check_tokamax_loss(sharding.platform, parts=split, plain=plain, chunks=chunks)
    return CrossEntropy(
        mesh=sharding.mesh,
        tokens=spec_of(batch_axes, length_axes, vocab_axes if split_alike else ()),
        vocab_axes=vocab_axes,
        weight=spec_of(*weight),
        vocab_dim=vocab_dim,
        dtype=dtype,
        scaling=scaling,
        soft_cap=soft_cap,
        chunks=number_of_chunks(tokens, vocab_size // split) if chunks == -1 else chunks,
        routine="tokamax" if routine == "tokamax" else "chunks",
        device_tokens=tokens,
        device_vocab=vocab_size // split,
    )


class Gradients(NamedTuple):
    """Hold the gradients of the loss, each as the array it belongs to."""

    hidden: Float[Array, "b s m"]
    weight: Float[Array, "_ _"]
    bias: Float[Array, "v"] | None


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """Describe the loss of hidden states under a projection to the vocabulary, on a mesh.

    Attributes:
        mesh: the mesh of the devices.
        tokens: spec of the hidden states, [B S M].
        vocab_axes: mesh axes that split the vocabulary; none of them splits tokens.
        weight: spec of the projection, whose vocabulary is over `vocab_axes`, and its other dim
            over axes of tokens.
        vocab_dim: 0 for an embedding table [V M], 1 for a kernel [M V].
        dtype: dtype of the products and of what crosses the wire; sums are float32.
        scaling: number that logits are divided by.
        soft_cap: logits l become cap * tanh(l / cap); 0: no cap.
        chunks: chunks of a device's tokens.
        routine: "chunks", or "tokamax" for its kernel.
        device_tokens: tokens of a device.
        device_vocab: entries of the vocabulary on a device.
    """

    mesh: Mesh | AbstractMesh
    tokens: PartitionSpec
    vocab_axes: tuple[str, ...]
    weight: PartitionSpec
    vocab_dim: int
    dtype: DTypeLike
    scaling: float
    soft_cap: float
    chunks: int
    routine: Literal["chunks", "tokamax"]
    device_tokens: int
    device_vocab: int

    def line(self) -> str:
        """Write how the loss runs, and why, on one line."""
        if self.routine == "tokamax":
            return "loss: cross entropy by tokamax's kernel, by name; it chooses its own blocks"
        size = -(-self.device_tokens // self.chunks)
        used = human_bytes(4 * size * self.device_vocab)
        pieces = "one chunk" if self.chunks == 1 else f"{self.chunks} chunks"
        return (
            f"loss: cross entropy of {self.device_tokens} tokens a device in {pieces}, whose "
            f"logits are {used} in float32 (-1 chooses up to {CHUNK_TOKENS} tokens, or "
            f"{human_bytes(CHUNK_BYTES)} if that is more)"
        )

    def __call__(
        self,
        hidden: Float[Array, "B S M"],
        targets: Int[Array, "B S"],
        weight: Float[Array, "_ _"],
        bias: Float[Array, "V"] | None,
        counted: Bool[Array, "B S"] | None = None,
        divisor: Float[Array, ""] | None = None,
    ) -> Float[Array, ""]:
        """Compute the mean negative log-likelihood, in nats per token.

        Args:
            hidden: what the logits are made of.
            targets: ids of the tokens to predict.
            weight: the kernel, or the embedding table, as stored.
            bias: of the logits.
            counted: the tokens that the mean is over, 0 where there are none; None: all.
            divisor: what the sum over them is divided by; None: their number.
        """
        return _mean(self, hidden, targets, weight, bias, counted, divisor)

    def run(
        self,
        hidden: Float[Array, "B S M"],
        targets: Int[Array, "B S"],
        weight: Float[Array, "_ _"],
        bias: Float[Array, "V"] | None,
        counted: Bool[Array, "B S"] | None,
        divisor: Float[Array, ""] | None,
        *,
        differentiate: bool,
    ) -> tuple[Float[Array, ""], Gradients | None]:
        """Compute the loss and, in the same pass, its gradients if asked for."""
        of_bias = None if bias is None else PartitionSpec(self.vocab_axes or None)
        specs: Any = (self.tokens, self.weight, of_bias)
        by_token = PartitionSpec(*self.tokens[:2])
        run: Callable[..., tuple[Float[Array, ""], Gradients | None]] = jax.shard_map(
            partial(self._on_device, count=targets.size, differentiate=differentiate),
            mesh=self.mesh,
            in_specs=(self.tokens, by_token, self.weight, of_bias, by_token, PartitionSpec()),
            out_specs=(PartitionSpec(), Gradients(*specs) if differentiate else None),
            check_vma=self.routine == "chunks",  # tokamax does not declare how its results vary
        )
        return run(hidden, targets, weight, bias, counted, divisor)

    def _on_device(
        self,
        hidden: Float[Array, "b s m"],
        targets: Int[Array, "b s"],
        weight: Float[Array, "_ _"],
        bias: Float[Array, "v"] | None,
        counted: Bool[Array, "b s"] | None,
        divisor: Float[Array, ""] | None,
        *,
        count: int,
        differentiate: bool,
    ) -> tuple[Float[Array, ""], Gradients | None]:
        """Compute what one device adds to the loss, and sum over all; `count` is B * S."""
        token_axes = (*axes_of(self.tokens[0]), *axes_of(self.tokens[1]))
        embed_axes, stored_axes = axes_of(self.tokens[2]), axes_of(self.weight[self._embed_dim])
        everywhere = (*token_axes, *self.vocab_axes)
        with jax.named_scope("logits"):
            x = vary_over(hidden.astype(self.dtype), everywhere)
            if embed_axes:
                x = jax.lax.all_gather(x, embed_axes, axis=2, tiled=True)
            w = vary_over(weight.astype(self.dtype), everywhere)
            if stored_axes:
                w = jax.lax.all_gather(w, stored_axes, axis=self._embed_dim, tiled=True)
            b = None if bias is None else vary_over(bias.astype(jnp.float32), everywhere)
        rows, ids = x.reshape(-1, x.shape[2]), vary_over(targets.reshape(-1), everywhere)
        total: Any = count if divisor is None else divisor
        if counted is not None:
            if divisor is None:
                total = jnp.sum(counted, dtype=jnp.float32)
                total = jnp.maximum(jax.lax.psum(total, token_axes) if token_axes else total, 1)
            counted = counted.reshape(-1)
        share = 1 / total if differentiate else None
        if self.routine == "tokamax":
            kernel = w if self.vocab_dim else w.T
            losses, dx, dw = tokamax_loss.summed(rows, ids, kernel, share=share)
            dw, db = (dw if self.vocab_dim or dw is None else dw.T), None
        else:
            losses, dx, dw, db = self._by_chunks(rows, ids, w, b, counted, share=share)
        with jax.named_scope("loss"):
            loss = jnp.sum(losses) / total
            loss = jax.lax.psum(loss, token_axes) if token_axes else loss
        if not differentiate:
            return loss, None
        with jax.named_scope(_BACKWARD):
            dx = dx.reshape(x.shape)
            if embed_axes:
                dx = jax.lax.psum_scatter(dx, embed_axes, scatter_dimension=2, tiled=True)
            elif self.vocab_axes:
                dx = jax.lax.psum(dx, self.vocab_axes)
            # What crosses the wire is narrow, as the gradients of other weights are.
            dw = dw.astype(self.dtype) if token_axes else dw
            if stored_axes:
                dim = self._embed_dim
                dw = jax.lax.psum_scatter(dw, stored_axes, scatter_dimension=dim, tiled=True)
            if others := tuple(axis for axis in token_axes if axis not in stored_axes):
                dw = jax.lax.psum(dw, others)
            if bias is not None and db is not None:
                db = (jax.lax.psum(db, token_axes) if token_axes else db).astype(bias.dtype)
        return loss, Gradients(dx.astype(hidden.dtype), dw.astype(weight.dtype), db)

    @property
    def _embed_dim(self) -> int:
        return 1 - self.vocab_dim

    def _by_chunks(
        self,
        x: Float[Array, "T M"],
        ids: Int[Array, "T"],
        weight: Float[Array, "_ _"],
        bias: Float[Array, "v"] | None,
        counted: Bool[Array, "T"] | None,
        *,
        share: Any,
    ) -> tuple[Float[Array, "..."], Any, Any, Any]:
        """Return the losses and the gradients of all chunks; the last one is filled with zeros."""
        tokens, size = ids.size, -(-ids.size // self.chunks)
        chunk = partial(self._chunk, weight=weight, bias=bias, share=share)
        if self.chunks == 1:
            return chunk(x, ids, counted)
        missing = self.chunks * size - tokens
        if missing:
            x, ids = jnp.pad(x, ((0, missing), (0, 0))), jnp.pad(ids, (0, missing))
            there = jnp.arange(ids.size) < tokens
            counted = there if counted is None else there & jnp.pad(counted, (0, missing))
        if counted is not None:
            counted = counted.reshape(self.chunks, size)
        xs = (x.reshape(self.chunks, size, -1), ids.reshape(self.chunks, size), counted)

        def add(sums: Any, each: tuple[Any, Any, Any]) -> tuple[Any, Any]:
            losses, dx, *more = chunk(*each)
            return jax.tree.map(jnp.add, sums, more), (losses, dx)

        shapes = jax.eval_shape(chunk, *jax.tree.map(lambda each: each[0], xs))[2:]
        none = jax.tree.map(lambda each: zeros(each.shape, each.dtype, x, ids, weight), [*shapes])
        sums, (losses, dx) = jax.lax.scan(add, none, xs)
        dx = None if dx is None else dx.reshape(-1, dx.shape[-1])[:tokens]
        return losses, dx, *sums

    def _chunk(
        self,
        x: Float[Array, "t M"],
        ids: Int[Array, "t"],
        counted: Bool[Array, "t"] | None,
        *,
        weight: Float[Array, "_ _"],
        bias: Float[Array, "v"] | None,
        share: Any,
    ) -> tuple[Float[Array, "t"], Any, Any, Any]:
        """Return the tokens' losses; and, of `share` of their sum, the gradients of x and so on.

        Args:
            x: hidden states.
            ids: the tokens to predict.
            counted: which tokens count, and do not only fill the chunk up; None: all.
            weight: the projection.
            bias: of the logits.
            share: factor of the gradients, a number; None: no gradients.
        """
        vocab, axes = self.vocab_dim, self.vocab_axes
        product = partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
        with jax.named_scope("logits"):
            logits = product(x, weight, (((1,), (self._embed_dim,)), ((), ())))
            logits = bounded(logits if bias is None else logits + bias, self.scaling, self.soft_cap)
        with jax.named_scope("loss"):
            first = jax.lax.axis_index(axes) * weight.shape[vocab] if axes else 0
            # A mask picks the target's logit, in a pass over the logits that is made anyway.
            is_target = jnp.arange(logits.shape[1]) == (ids - first)[:, None]
            top = jnp.max(logits, axis=1)
            top = jax.lax.pmax(top, axes) if axes else top
            total = jnp.sum(jnp.exp(logits - top[:, None]), axis=1)
            target = jnp.sum(jnp.where(is_target, logits, 0), axis=1)
            if axes:
                total, target = jax.lax.psum(jnp.stack([total, target]), axes)  # one exchange
            log_total = jnp.log(total) + top
            losses = log_total - target
            losses = losses if counted is None else jnp.where(counted, losses, 0)
        if share is None:
            return losses, None, None, None
        with jax.named_scope(_BACKWARD):
            d = jnp.exp(logits - log_total[:, None]) - is_target
            if counted is not None:
                d = jnp.where(counted[:, None], d, 0)
            if self.soft_cap != 0:
                d = d * (1 - jnp.square(logits / self.soft_cap))
            # The share comes after the products: float16 could not hold it before.
            share = share / self.scaling
            db = None if bias is None else jnp.sum(d, axis=0) * share
            d = d.astype(self.dtype)
            dx = product(d, weight, (((1,), (vocab,)), ((), ()))) * share
            dw = product(*((x, d) if vocab else (d, x)), (((0,), (0,)), ((), ()))) * share
        return losses, dx.astype(self.dtype), dw, db


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mean(
    loss: CrossEntropy,
    hidden: Float[Array, "B S M"],
    targets: Int[Array, "B S"],
    weight: Float[Array, "_ _"],
    bias: Float[Array, "V"] | None,
    counted: Bool[Array, "B S"] | None,
    divisor: Float[Array, ""] | None,
) -> Float[Array, ""]:
    return loss.run(hidden, targets, weight, bias, counted, divisor, differentiate=False)[0]


def _mean_fwd(
    loss: CrossEntropy,
    hidden: Float[Array, "B S M"],
    targets: Int[Array, "B S"],
    weight: Float[Array, "_ _"],
    bias: Float[Array, "V"] | None,
    counted: Bool[Array, "B S"] | None,
    divisor: Float[Array, ""] | None,
) -> tuple[Float[Array, ""], Gradients | None]:
    return loss.run(hidden, targets, weight, bias, counted, divisor, differentiate=True)


def _mean_bwd(
    _loss: CrossEntropy, gradients: Gradients, cotangent: Float[Array, ""]
) -> tuple[Any, ...]:
    def times(gradient: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
        return (gradient.astype(jnp.float32) * cotangent).astype(gradient.dtype)

    hidden, weight, bias = jax.tree.map(times, gradients)
    return hidden, None, weight, bias, None, None


_mean.defvjp(_mean_fwd, _mean_bwd)


def bounded(logits: Float[Array, "*T v"], scaling: float, soft_cap: float) -> Float[Array, "*T v"]:
    """Divide logits by `scaling`; then cap them softly, unless `soft_cap` is 0."""
    if scaling != 1:
        logits = logits / scaling
    if soft_cap != 0:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    return logits
