"""Causal grouped-query attention (arXiv 2305.13245) over packed documents."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import variance_scaling
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moe_shard.layers.norm import RMSNorm
from moe_shard.layers.rope import apply_rope
from moe_shard.sharding.annotate import Annotator

QUERY = ("embed", "heads", "head_dim")
KEY_VALUE = ("embed", "kv_heads", "head_dim")
OUT = ("heads", "head_dim", "embed")


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions and, optionally, normalised queries and keys.

    Args:
        model_dim: M.
        num_query_heads: N.
        num_kv_heads: J; divides N.
        head_dim: D.
        rope_max_timescale: see `apply_rope`.
        qk_norm_epsilon: RMSNorm over D of queries and keys before the rotation; None: no norm.
        dtype: of the products.
        weight_dtype: of the parameters.
        annotate: the mesh and its rules.
        rngs: source of the initial weights.
    """

    def __init__(
        self,
        *,
        model_dim: int,
        num_query_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rope_max_timescale: float,
        qk_norm_epsilon: float | None,
        dtype: DTypeLike,
        weight_dtype: DTypeLike,
        annotate: Annotator,
        rngs: nnx.Rngs,
    ) -> None:
        init_in = variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=0, out_axis=(1, 2))
        init_out = variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=(0, 1), out_axis=2)
        q_shape = (model_dim, num_query_heads, head_dim)
        kv_shape = (model_dim, num_kv_heads, head_dim)
        out_shape = (num_query_heads, head_dim, model_dim)
        self.query = nnx.Param(init_in(rngs.params(), q_shape, weight_dtype), logical_axes=QUERY)
        self.key = nnx.Param(init_in(rngs.params(), kv_shape, weight_dtype), logical_axes=KEY_VALUE)
        self.value = nnx.Param(
            init_in(rngs.params(), kv_shape, weight_dtype), logical_axes=KEY_VALUE
        )
        self.out = nnx.Param(init_out(rngs.params(), out_shape, weight_dtype), logical_axes=OUT)

        def head_norm() -> RMSNorm | None:
            if qk_norm_epsilon is None:
                return None
            return RMSNorm(
                dim=head_dim, epsilon=qk_norm_epsilon, weight_dtype=weight_dtype, axis="head_dim"
            )

        self.query_norm, self.key_norm = head_norm(), head_norm()
        self.rope_max_timescale = rope_max_timescale
        self.dtype = dtype
        self.annotate = annotate

    def __call__(
        self,
        x: Float[Array, "B S M"],
        positions: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"],
    ) -> Float[Array, "B S M"]:
        """Attend from each token to itself and the earlier ones of its document.

        Args:
            x: normalised activations.
            positions: place of each token in its document.
            segment_ids: equal for tokens of one document.
        """
        with jax.named_scope("attention"):
            query = self._project(x, self.query, "heads", "query")
            key = self._project(x, self.key, "kv_heads", "key")
            value = self._project(x, self.value, "kv_heads", "value")
            if self.query_norm is not None and self.key_norm is not None:
                query, key = self.query_norm(query), self.key_norm(key)
            query = apply_rope(query, positions, self.rope_max_timescale)
            key = apply_rope(key, positions, self.rope_max_timescale)
            same_document = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
            attended = jax.nn.dot_product_attention(
                query, key, value, mask=same_document, is_causal=True
            )
            attended = self._by_head(attended, "heads", "attended")
            out = self.annotate.use_weight(
                self.out[...].astype(self.dtype),
                OUT,
                ("activation_heads", "activation_head_dim", None),
                name="attention out",
            )
            y = jnp.einsum("bsnd,ndm->bsm", attended, out)
            return self.annotate(
                y,
                "activation_batch",
                "activation_length",
                "activation_embed",
                name="attention output",
            )

    def _project(
        self, x: Float[Array, "B S M"], kernel: nnx.Param[Array], heads: str, name: str
    ) -> Float[Array, "B S N D"]:
        kernel_in_use = self.annotate.use_weight(
            kernel[...].astype(self.dtype),
            ("embed", heads, "head_dim"),
            (None, f"activation_{heads}", "activation_head_dim"),
            name=f"attention {name}",
        )
        return self._by_head(jnp.einsum("bsm,mnd->bsnd", x, kernel_in_use), heads, name)

    def _by_head(
        self, x: Float[Array, "B S N D"], heads: str, name: str
    ) -> Float[Array, "B S N D"]:
        return self.annotate(
            x,
            "activation_batch",
            "activation_length",
            f"activation_{heads}",
            "activation_head_dim",
            name=f"{name} by head",
        )
