"""Check the product of slots with experts' weights, and its gradients, against float64 NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_shard.moe.experts import batched_product

E, B, C, R, A, H = 3, 2, 5, 7, 4, 6
CASES = {
    "sequences": ((E, B, C, A), (E, A, H), "ebca,eah->ebch"),
    "sorted": ((E, R, A), (E, A, H), "era,eah->erh"),
    "fused": ((E, B, C, A), (E, A, 2, H), "ebca,eagh->ebcgh"),
    "sorted-fused": ((E, R, A), (E, A, 2, H), "era,eagh->ergh"),
}


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_equal_numpy(case: str, with_bias: bool) -> None:
    x_shape, w_shape, words = CASES[case]
    draw = np.random.default_rng(0).standard_normal
    x, w, bias = draw(x_shape), draw(w_shape), draw((E, *w_shape[2:]))
    inputs, output = words.split("->")
    of_x, of_w = inputs.split(",")
    y = np.einsum(words, x, w)
    if with_bias:
        y = y + bias.reshape(E, *(1,) * (x.ndim - 2), *bias.shape[1:])
    dy = draw(y.shape)
    wanted = (
        y,
        np.einsum(f"{output},{of_w}->{of_x}", dy, w),
        np.einsum(f"{of_x},{output}->{of_w}", x, dy),
        dy.sum(axis=tuple(range(1, x.ndim - 1))),
    )

    def multiply(x: jax.Array, w: jax.Array, bias: jax.Array) -> jax.Array:
        return batched_product(x, w, bias if with_bias else None)

    found, backward = jax.vjp(multiply, *(jnp.float32(each) for each in (x, w, bias)))
    results = (found, *backward(jnp.float32(dy)))
    for one, other in zip(results[: 3 + with_bias], wanted, strict=False):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_weight_gradients_have_the_token_copies_first() -> None:
    """XLA on CPU transposes the first operand of a sum over rows, with all that it is made of."""
    x_shape, w_shape, _ = CASES["sequences"]
    x, w = jnp.ones(x_shape), jnp.ones(w_shape)
    traced = jax.make_jaxpr(jax.grad(lambda w: jnp.sum(jnp.sin(batched_product(x, w)))))(w)
    text = str(traced.jaxpr)
    shapes = [
        [operand.aval.shape for operand in each.invars]
        for each in traced.jaxpr.eqns
        if each.primitive.name == "dot_general"
    ]
    assert [x_shape, (E, B, C, H)] in shapes, text
