"""Attend by cuDNN, through `jax.nn.dot_product_attention`.

cuDNN takes documents as a mask or not at all: jax's public function has no other form for several
documents of a sequence, so this makes an array of S x T bytes, and of as many numbers, for each
sequence. It is there by name; `autoselected` takes the Triton kernels, which need no such array.

jax asks the GPU's library for its version as a program is traced, so this cannot be compiled for a
card that is absent.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_shard.layers.kernels.rule import (
    AttentionCase,
    AttentionRule,
    Tokens,
    named_context,
    seen_tokens,
)

_LARGEST_HEAD = {True: 256, False: 128}  # from Hopper on, and before


def unsupported(case: AttentionCase) -> str | None:
    """Return why cuDNN cannot compute a case, or None."""
    if case.platform != "cuda":
        return f"cuDNN is a library for NVIDIA, not for {case.platform}"
    if jnp.dtype(case.dtype).name not in ("bfloat16", "float16"):
        return f"cuDNN takes bfloat16 and float16, not {jnp.dtype(case.dtype).name}"
    if case.rule.soft_cap:
        return "cuDNN has no soft cap"
    if case.sink:
        return "jax passes no sinks to cuDNN"
    if case.key_dim != case.value_dim:
        return f"jax passes cuDNN no values of {case.value_dim} with keys of {case.key_dim}"
    if why := absent():
        return why
    largest = _LARGEST_HEAD[_capability() >= (9, 0)]
    if case.key_dim > largest or case.key_dim % 8:
        return f"cuDNN takes heads of a multiple of 8 up to {largest}, not {case.key_dim}"
    return None


def absent() -> str | None:
    """Return why cuDNN cannot be called in this process, or None."""
    if jax.default_backend() != "gpu" or "cuda" not in jax.devices()[0].client.platform_version:
        return "cuDNN is compiled for only where an NVIDIA GPU is present"
    try:
        from jax._src.lib import cuda_versions  # the only place where jax keeps it
    except ImportError:
        return "this jax does not say whether cuDNN is there"
    if cuda_versions is None:
        return "cuDNN is not found"
    try:
        cuda_versions.cudnn_get_version()
    except RuntimeError as error:
        return f"cuDNN is not found: {error}"
    return None


def _capability() -> tuple[int, ...]:
    """Return the compute capability of this process's GPU."""
    return tuple(int(part) for part in jax.local_devices()[0].compute_capability.split("."))


def attend(
    query: Float[Array, "B S N D"],
    key: Float[Array, "B T J D"],
    value: Float[Array, "B T J Dv"],
    queries: Tokens,
    keys: Tokens,
    *,
    rule: AttentionRule,
    sink: Float[Array, "N"] | None,
) -> Float[Array, "B S N Dv"]:
    """Attend with a mask of all pairs.

    Args:
        query: N / J consecutive heads for each key head.
        key: of any tokens.
        value: values of the same tokens.
        queries: the tokens that attend.
        keys: the tokens attended to.
        rule: the layer's span and scale; it has no soft cap.
        sink: None.
    """
    assert sink is None
    assert not rule.soft_cap
    same = queries.order is not None and query.shape[1] == key.shape[1]
    attended = jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=seen_tokens(queries, keys, rule=rule)[:, None],
        scale=rule.scale,
        is_causal=same,  # cuDNN then leaves out the blocks above the diagonal
        implementation="cudnn",
    )
    # Its gradient needs more than this of the kernel, so that recomputation runs it in any case.
    return named_context(attended)
