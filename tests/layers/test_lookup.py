"""The gradient of a lookup equals float64 NumPy, by either way of summing, on meshes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_shard.layers.embedding import TABLE
from moe_shard.layers.lookup import lay_out_lookup, sum_by_scatter, sum_in_blocks
from moe_shard.sharding.annotate import Sharding
from tests.layers.build import Sizes, layer_annotator, layer_config
from tests.models.build import QUICK, label

VOCAB = 64
SUMS = {"blocks": sum_in_blocks, "scatter": sum_by_scatter}
RNG = np.random.default_rng(0)
IDS = {
    "zipf": np.minimum(RNG.zipf(1.3, 1000) - 1, VOCAB - 1),
    "one token everywhere": np.full(700, 5),  # a run over six blocks
    "runs that end with blocks": np.repeat([3, 9, 60], 128),
    "a run from the middle of a block to that of another": np.repeat([1, 2, 3], [70, 300, 20]),
    "all different": RNG.permutation(VOCAB),
    "one": np.array([63]),
    "many of others": RNG.integers(-VOCAB, 2 * VOCAB, 500),
    "others alone": np.array([-1, VOCAB, -VOCAB]),
}
MESHES: list[Sizes] = [
    {},
    {"data": 8},
    {"fsdp": 8},
    {"tensor": 8},
    {"fsdp": 4, "context": 2},
    {"data": 2, "tensor": 4},
    {"fsdp": 2, "tensor": 2, "expert": 2},
    {"data": 2, "fsdp_transpose": 2, "tensor": 2},
]


def expected_sums(rows: np.ndarray, ids: np.ndarray, vocab: int) -> np.ndarray:
    sums = np.zeros((vocab, *rows.shape[1:]))
    for row, each in zip(rows.astype(np.float64), ids, strict=True):
        if 0 <= each < vocab:
            sums[each] += row
    return sums


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("case", IDS)
def test_rows_of_equal_ids_are_summed(case: str, name: str) -> None:
    ids = np.random.default_rng(1).permutation(IDS[case]).astype(np.int32)
    rows = np.random.default_rng(2).standard_normal((ids.size, 2, 4)).astype(np.float32)
    found = jax.jit(SUMS[name], static_argnums=2)(rows, ids, VOCAB)
    expected = expected_sums(rows, ids, VOCAB)
    np.testing.assert_allclose(found.swapaxes(0, 1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SUMS)
def test_narrow_rows_are_summed_in_float32(name: str) -> None:
    # In bfloat16, 256 + 1 is 256: 2,000 ones added one by one would be 256.
    rows = jnp.ones((2000, 1, 8), jnp.bfloat16)
    found = jax.jit(SUMS[name], static_argnums=2)(rows, jnp.zeros(2000, jnp.int32), 4)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found[0, 0].astype(np.float32), np.full(8, 2000.0))


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize("sizes", MESHES, ids=label)
def test_lookup_and_gradient_on_meshes(
    sizes: Sizes, platform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sharding, "platform", platform)
    sharding = layer_annotator(layer_config(sizes), sizes)
    rng = np.random.default_rng(4)
    shape = (8, 12, 16)
    lookup = lay_out_lookup(sharding, shape, vocab_size=VOCAB, stored=TABLE, dtype=jnp.float32)
    assert lookup.blocked == (platform == "cuda")
    table = rng.standard_normal((VOCAB, 16)).astype(np.float32)
    tokens = np.minimum(rng.zipf(1.3, shape[:2]) - 1, VOCAB - 1).astype(np.int32)
    probe = rng.standard_normal(shape).astype(np.float32)

    def loss(table: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = lookup(table, tokens)
        return jnp.sum(x * probe), x

    place = sharding.named_sharding("table", TABLE, table.shape)
    rows = sharding.named_sharding("t", ("activation_batch", "activation_length"), shape[:2])
    compiled = (
        jax.jit(
            jax.grad(loss, has_aux=True), in_shardings=(place, rows), out_shardings=(place, None)
        )
        .lower(table, tokens)
        .compile(QUICK)
    )
    grad, x = compiled(jax.device_put(table, place), jax.device_put(tokens, rows))
    np.testing.assert_array_equal(x, table[tokens])
    expected = expected_sums(probe.reshape(-1, 16), tokens.reshape(-1), VOCAB)
    np.testing.assert_allclose(grad, expected, rtol=1e-5, atol=1e-5)
