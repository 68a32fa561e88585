"""Causal grouped-query attention (arXiv 2305.13245) over packed documents."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import variance_scaling
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from moe_shard.config.attention import AttentionConfig
from moe_shard.config.model import LayerKind
from moe_shard.layers.cache import LayerCache, Memory
from moe_shard.layers.norm import RMSNorm
from moe_shard.layers.rope import apply_rope
from moe_shard.sharding.annotate import Annotator

QUERY = ("embed", "heads", "head_dim")
KEY_VALUE = ("embed", "kv_heads", "head_dim")
OUT = ("heads", "head_dim", "embed")


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions and, optionally, normalised queries and keys.

    Args:
        config: heads, norms, positions.
        kind: the layer's span, and whether it has RoPE.
        model_dim: M.
        norm_epsilon: of the norms of queries and keys.
        dtype: of the products.
        weight_dtype: of the parameters.
        annotate: the mesh and its rules.
        rngs: source of the initial weights.
    """

    def __init__(
        self,
        *,
        config: AttentionConfig,
        kind: LayerKind,
        model_dim: int,
        norm_epsilon: float,
        dtype: DTypeLike,
        weight_dtype: DTypeLike,
        annotate: Annotator,
        rngs: nnx.Rngs,
    ) -> None:
        init_in = variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=0, out_axis=(1, 2))
        init_out = variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=(0, 1), out_axis=2)
        head_dim = config.head_dim
        q_shape = (model_dim, config.num_query_heads, head_dim)
        kv_shape = (model_dim, config.num_kv_heads, head_dim)
        out_shape = (config.num_query_heads, head_dim, model_dim)
        self.query = nnx.Param(init_in(rngs.params(), q_shape, weight_dtype), logical_axes=QUERY)
        self.key = nnx.Param(init_in(rngs.params(), kv_shape, weight_dtype), logical_axes=KEY_VALUE)
        self.value = nnx.Param(
            init_in(rngs.params(), kv_shape, weight_dtype), logical_axes=KEY_VALUE
        )
        self.out = nnx.Param(init_out(rngs.params(), out_shape, weight_dtype), logical_axes=OUT)

        def head_norm() -> RMSNorm | None:
            if not config.use_qk_norm:
                return None
            return RMSNorm(
                dim=head_dim, epsilon=norm_epsilon, weight_dtype=weight_dtype, axis="head_dim"
            )

        self.query_norm, self.key_norm = head_norm(), head_norm()
        self.config, self.kind = config, kind
        self.dtype = dtype
        self.annotate = annotate

    def __call__(
        self,
        x: Float[Array, "B S M"],
        positions: Int[Array, "B S"],
        segment_ids: Int[Array, "B S"],
        memory: Memory | None = None,  # noqa: ARG002
    ) -> tuple[Float[Array, "B S M"], LayerCache]:
        """Attend from each token to itself and the earlier ones of its document.

        Args:
            x: normalised activations.
            positions: place of each token in its document.
            segment_ids: equal for tokens of one document.
            memory: what earlier calls left, while a text is being written; None in training.

        Returns:
            What is added to the residual stream, and the memory's cache with these tokens in it;
            empty without one.
        """
        with jax.named_scope("attention"):
            query = self._project(x, self.query, "heads", "query")
            key = self._project(x, self.key, "kv_heads", "key")
            value = self._project(x, self.value, "kv_heads", "value")
            if self.query_norm is not None and self.key_norm is not None:
                query, key = self.query_norm(query), self.key_norm(key)
            query = apply_rope(query, positions, self.config.rope.max_timescale)
            key = apply_rope(key, positions, self.config.rope.max_timescale)
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
            y = self.annotate(
                y,
                "activation_batch",
                "activation_length",
                "activation_embed",
                name="attention output",
            )
            return y, {}

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
