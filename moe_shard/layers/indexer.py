"""Choose the tokens that each token attends to: the lightning indexer of DeepSeek-V3.2.

Source: arXiv 2512.02556, section 2.1 (DeepSeek Sparse Attention). A few small heads score all
earlier tokens, and the `indexer_topk` best of them take part in attention. A choice has no
gradient, so neither have the indexer's parameters. Further dims:

    H  heads of the indexer     Di  elements of its queries and keys     Rq  latent of queries
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from moe_shard.config.attention_config import AttentionConfig
from moe_shard.layers.heads import make_weight
from moe_shard.layers.norm import LayerNorm
from moe_shard.layers.rope import apply_rope
from moe_shard.sharding.annotate import Sharding

_EPSILON = 1e-6
_QUERY, _DOWN = ("q_lora", None, "head_dim"), ("embed", "head_dim")
# Its heads have no axis, so that it is no matrix for the casts ahead of a step: it is in float32.
_WEIGHT = ("embed", None)


class Indexed(NamedTuple):
    """Hold what the indexer makes of tokens that attend.

    Attributes:
        query: rotated by their positions.
        weight: of each head, with the scale of the scores in it.
    """

    query: Float[Array, "B S H Di"]
    weight: Float[Array, "B S H"]


class Indexer(nnx.Module):
    """Score the tokens that a token may attend to.

    Every device of a tensor axis has all heads: they are few, and their scores are summed.

    Args:
        config: sizes and positions.
        model_dim: M, the model dim.
        rope: whether queries and keys are rotated by their positions.
        dtype: dtype of the projections; scores are float32.
        weight_dtype: dtype of the parameters.
        sharding: the mesh and its rules.
        rngs: source of the initial weights.
    """

    def __init__(
        self,
        *,
        config: AttentionConfig,
        model_dim: int,
        rope: bool,
        dtype: DTypeLike,
        weight_dtype: DTypeLike,
        sharding: Sharding,
        rngs: nnx.Rngs,
    ) -> None:
        heads, size = config.indexer_n_heads, config.indexer_head_dim
        of_query = (config.q_lora_rank, heads, size)
        self.query = make_weight(of_query, _QUERY, dtype=weight_dtype, rngs=rngs)
        self.key = make_weight((model_dim, size), _DOWN, dtype=weight_dtype, rngs=rngs)
        self.key_norm = LayerNorm(dim=size, epsilon=_EPSILON, weight_dtype=weight_dtype)
        self.weight = make_weight((model_dim, heads), _WEIGHT, dtype=weight_dtype, rngs=rngs)
        self.turned_dim = config.turned_dim if rope else 0
        self.rope = replace(config.rope, rope_interleave=config.indexer_rope_interleave)
        self.dtype, self.sharding = dtype, sharding
        self.scale = (heads * size) ** -0.5

    def queries(
        self,
        x: Float[Array, "B S M"],
        latent: Float[Array, "B S Rq"],
        positions: Int[Array, "B S"],
        length: int,
    ) -> Indexed:
        """Make the queries and the weights of the heads.

        Args:
            x: normalised activations.
            latent: the latents of the attention's queries, normalised.
            positions: position of each token in its document.
            length: tokens that a sequence has or may come to have.
        """
        latent, x = jax.lax.stop_gradient((latent, x))
        kernel = self._in_use(self.query, _QUERY, self.dtype, "query")
        query = self._turn(jnp.einsum("bsr,rhd->bshd", latent, kernel), positions, length)
        kernel = self._in_use(self.weight, _WEIGHT, jnp.float32, "weight")
        weight = jnp.einsum("bsm,mh->bsh", x.astype(jnp.float32), kernel)
        return Indexed(query, weight * self.scale)

    def keys(
        self, x: Float[Array, "B S M"], positions: Int[Array, "B S"], length: int
    ) -> Float[Array, "B S Di"]:
        """Make the key of each token; see `queries` for the arguments."""
        x = jax.lax.stop_gradient(x)
        kernel = self._in_use(self.key, _DOWN, self.dtype, "key")
        key = self.key_norm(jnp.einsum("bsm,md->bsd", x, kernel))
        return self._turn(key[:, :, None], positions, length)[:, :, 0]

    def _turn(
        self, x: Float[Array, "B S H Di"], positions: Int[Array, "B S"], length: int
    ) -> Float[Array, "B S H Di"]:
        if self.turned_dim == 0:
            return x
        return apply_rope(x, positions, rope=self.rope, turned_dim=self.turned_dim, length=length)

    def _in_use(
        self,
        param: nnx.Param[Array],
        stored: tuple[str | None, ...],
        dtype: DTypeLike,
        name: str,
    ) -> Float[Array, "*D"]:
        kernel = jax.lax.stop_gradient(param[...].astype(dtype))
        used = (None,) * len(stored)
        return self.sharding.use_weight(kernel, stored, used, name=f"indexer {name}")


def chosen(
    indexed: Indexed,
    key: Float[Array, "B T Di"],
    seen: Bool[Array, "B S T"],
    *,
    most: int,
) -> Bool[Array, "B S T"]:
    """Mask the tokens that each token attends to: at most so many of those that it sees.

    Args:
        indexed: the tokens that attend.
        key: keys of the tokens attended to.
        seen: which of them each token sees.
        most: how many it may attend to.
    """
    indexed, key = jax.lax.stop_gradient((indexed, key))
    with jax.named_scope("indexer"):
        products = jnp.einsum(
            "bshd,btd->bsht", indexed.query, key, preferred_element_type=jnp.float32
        )
        scores = jnp.einsum("bsh,bsht->bst", indexed.weight, jax.nn.relu(products))
        return seen & best(jnp.where(seen, scores, -jnp.inf), most)


def best(scores: Float[Array, "*B T"], most: int) -> Bool[Array, "*B T"]:
    """Mask the highest scores of each row, exactly so many; of equal ones the first.

    >>> import jax.numpy as jnp
    >>> best(jnp.array([3.0, 1.0, 2.0, 1.0]), 3).tolist()
    [True, True, True, False]
    """
    # A sort, and not `top_k`: the partitioner would gather all rows for that.
    least = jnp.sort(scores, axis=-1)[..., -most][..., None]
    above, equal = scores > least, scores == least
    left = most - jnp.sum(above, axis=-1, keepdims=True)
    return above | (equal & (jnp.cumsum(equal, axis=-1) <= left))
