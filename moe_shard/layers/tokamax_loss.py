"""Compute cross entropy by tokamax's kernel for TPUs, if installed."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_shard.errors import UserError

_KERNEL = "mosaic_tpu"


def check_tokamax_loss(platform: str, *, parts: int, plain: bool, chunks: int) -> None:
    """Check that tokamax's kernel can run.

    Args:
        platform: "cpu", "tpu", "cuda" or "rocm"; "unknown" is accepted.
        parts: parts of the vocabulary, each on another device.
        plain: whether logits are hidden states times a kernel, and nothing more, of tokens that all
            count.
        chunks: chunks asked for; -1: none.

    Raises:
        UserError: it cannot.
    """
    if platform not in {"tpu", "unknown"}:
        why = f"tokamax's kernel is for TPUs, this is {platform}"
    elif parts > 1:
        why = f"tokamax's kernel needs the whole vocabulary, which is in {parts} parts"
    elif not plain:
        why = (
            "tokamax's kernel knows no logits_bias, logits_scaling or final_logits_soft_cap, and "
            "counts all tokens"
        )
    elif chunks != -1:
        why = f"num_vocab_tiling={chunks}, but tokamax's kernel chooses its own blocks"
    elif importlib.util.find_spec("tokamax") is None:
        raise UserError("cross_entropy: tokamax is not installed\nfix: pip install tokamax")
    else:
        return
    raise UserError(f"cross_entropy: {why}\nfix: cross_entropy=auto")


def summed(
    x: Float[Array, "T M"],
    ids: Int[Array, "T"],
    kernel: Float[Array, "M V"],
    *,
    share: float | None,
) -> tuple[Float[Array, ""], Any, Any]:
    """Sum the tokens' losses; and compute, of `share` of the sum, the gradients of x and kernel.

    Args:
        x: hidden states.
        ids: the tokens to predict.
        kernel: the projection to the vocabulary.
        share: factor of the gradients; None: no gradients.

    Raises:
        UserError: tokamax has no kernel for the accelerator of this process, or the accelerator is
            only compiled for: tokamax needs the device.
    """
    tokamax = importlib.import_module("tokamax")  # optional, and takes seconds

    def total(x: Float[Array, "T M"], kernel: Float[Array, "M V"]) -> Float[Array, ""]:
        loss = tokamax.linear_softmax_cross_entropy_loss(
            x, ids, kernel, reduction="sum", implementation=_KERNEL
        )
        return jnp.asarray(loss, jnp.float32)

    try:
        if share is None:
            return total(x, kernel), None, None
        loss, gradients = jax.vjp(total, x, kernel)
        return loss, *gradients(jnp.float32(share))
    except (NotImplementedError, ValueError) as error:
        why = str(error).splitlines()[0][:100] if str(error) else "not implemented"
        raise UserError(
            f"cross_entropy: tokamax has no kernel for this device ({why})\nfix: cross_entropy=auto"
        ) from error
