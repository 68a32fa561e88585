"""Cross entropy by chunks equals float64 NumPy: loss and gradients, every option, on meshes."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_shard.config import Config
from moe_shard.errors import UserError
from moe_shard.layers.embedding import Embedding, loss_of
from moe_shard.layers.loss import CHUNK_BYTES, CHUNK_TOKENS, IGNORED, number_of_chunks
from moe_shard.sharding.annotate import Sharding
from tests.layers import oracle
from tests.layers.build import (
    Params,
    Sizes,
    describe,
    layer_annotator,
    layer_config,
    packed,
    random_like,
)
from tests.models.build import QUICK, assert_close, label

OPTIONS = {
    "plain": (),
    "tied": ("logits_via_embedding=true",),
    "bias": ("logits_bias=true",),
    "scaling": ("logits_scaling=8",),
    "soft-cap": ("final_logits_soft_cap=1.5",),
    "multiplier": ("embedding_multiplier=12", "logits_via_embedding=true"),
}
EVERYTHING = ("logits_bias=true", "logits_scaling=0.5", "final_logits_soft_cap=1.5")
MESHES: list[Sizes] = [
    {"data": 8},
    {"fsdp": 8},
    {"tensor": 8},
    {"expert": 8},
    {"fsdp": 4, "context": 2},
    {"data": 2, "tensor": 4},
    {"fsdp_transpose": 2, "tensor": 2, "context": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"fsdp": 2, "tensor": 2, "expert": 2},
    {"data": 2, "context": 2, "expert": 2},
]


def by_hand(
    x: np.ndarray,
    targets: np.ndarray,
    counted: np.ndarray,
    p: Params,
    keys: dict[str, Any],
    divisor: float | None,
) -> tuple[float, Any]:
    """Compute loss and gradients in float64, with the chain rule written out."""
    share = counted / (divisor or max(counted.sum(), 1))
    logits = oracle.logits(x, p, keys)
    scores = np.exp(logits - logits.max(-1, keepdims=True))
    probs = scores / scores.sum(-1, keepdims=True)
    chosen = np.take_along_axis(probs, targets[..., None], -1)[..., 0]
    d = (probs - np.eye(logits.shape[-1])[targets]) * share[..., None]
    if cap := keys["final_logits_soft_cap"]:
        d *= 1 - (logits / cap) ** 2
    d /= keys["logits_scaling"]
    kernel = p["kernel"] if "kernel" in p else p["table"].T
    of_kernel = np.einsum("bsm,bsv->mv", x, d)
    grads = {"kernel": of_kernel} if "kernel" in p else {"table": of_kernel.T}
    if "bias" in p:
        grads["bias"] = d.sum((0, 1))
    return float(-(np.log(chosen) * share).sum()), (grads, d @ kernel.T)


def computed(
    sizes: Sizes,
    overrides: tuple[str, ...],
    chunks: int,
    rows: int,
    routine: Any,
    share: float | None,
    divisor: float | None,
) -> tuple[Any, tuple[float, Any]]:
    """Return loss and gradients of the package, and by hand."""
    config = layer_config(sizes, *overrides)
    sharding = layer_annotator(config, sizes)
    layer = describe(lambda rngs: Embedding(config.model, sharding, rngs=rngs), sharding)
    x, params = packed(rows).x, random_like(layer.shapes)
    rng = np.random.default_rng(3)
    targets = rng.integers(0, config.model.vocab_size, x.shape[:2])
    counted = np.ones(x.shape[:2], bool) if share is None else rng.random(x.shape[:2]) < share
    place = sharding.named_sharding(
        "x", ("activation_batch", "activation_length", "activation_embed"), x.shape
    )

    def loss(params: Params, x: jax.Array) -> jax.Array:
        module = nnx.merge(layer.graph, params)
        mask = None if share is None else jnp.asarray(counted)
        ids = jnp.where(jnp.asarray(counted), jnp.asarray(targets), IGNORED)
        total = None if divisor is None else jnp.float32(divisor)
        return 3 * module.cross_entropy(x, ids, routine, chunks, mask, total)

    compiled = (
        jax.jit(
            jax.value_and_grad(loss, argnums=(0, 1)),
            in_shardings=(layer.places, place),
            out_shardings=(None, (layer.places, place)),
        )
        .lower(layer.shapes, jax.ShapeDtypeStruct(x.shape, np.float32))
        .compile(QUICK)
    )
    narrow = jax.tree.map(lambda a: np.asarray(a, np.float32), (params, x))
    found = jax.device_get(compiled(*jax.device_put(narrow, (layer.places, place))))
    keys = config.as_flat_dict()
    return found, by_hand(x.astype(np.float64), targets, counted, params, keys, divisor)


def check(
    sizes: Sizes,
    overrides: tuple[str, ...],
    chunks: int,
    rows: int,
    routine: str = "auto",
    share: float | None = None,
    divisor: float | None = None,
) -> None:
    found, by_numpy = computed(sizes, overrides, chunks, rows, routine, share, divisor)
    (loss, (grads, dx)), (expected, (by_name, of_x)) = found, by_numpy
    np.testing.assert_allclose(loss / 3, expected, rtol=1e-5)
    if share == 0:
        assert loss == 0
        assert not any(grad.any() for grad in jax.tree.leaves((grads, dx)))
        return
    for name, grad in grads.items():
        if name in by_name:
            assert_close({name: grad / 3}, {name: by_name[name]})
        else:
            assert not grad.any(), name  # the table, where the kernel is another
    assert_close({"x": dx / 3}, {"x": of_x})


@pytest.mark.parametrize("chunks", [1, 5])  # 36 tokens: the last of 5 chunks is filled up
@pytest.mark.parametrize("case", OPTIONS)
def test_on_one_device(case: str, chunks: int) -> None:
    check({}, OPTIONS[case], chunks, rows=3)


@pytest.mark.parametrize("tied", ["true", "false"])
@pytest.mark.parametrize("sizes", MESHES, ids=label)
def test_all_options_together_on_meshes(sizes: Sizes, tied: str) -> None:
    check(sizes, (*EVERYTHING, f"logits_via_embedding={tied}"), chunks=5, rows=8)


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize(
    "sizes", [{}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "context": 2}], ids=label
)
def test_the_mean_is_over_the_tokens_that_count(sizes: Sizes, chunks: int) -> None:
    check(sizes, EVERYTHING, chunks, rows=8, share=0.3)


def test_the_sum_over_them_is_divided_by_what_is_said() -> None:
    check({"data": 2, "tensor": 4}, EVERYTHING, 5, rows=8, share=0.3, divisor=7.5)


def test_no_token_counts() -> None:
    check({"data": 8}, (), 1, rows=8, share=0.0)


@pytest.mark.parametrize("tokens", [1, 12, 4096, 8192, 28672, 131072, 5000, 4099])
@pytest.mark.parametrize("vocab", [64, 32000, 50304, 131072, 201088])
def test_chunks_are_few_and_within_the_stated_size(tokens: int, vocab: int) -> None:
    chunks = number_of_chunks(tokens, vocab)
    most = max(CHUNK_TOKENS, CHUNK_BYTES / 4 / vocab)
    assert -(-tokens // chunks) <= most
    assert chunks < 2 * max(1, tokens / most) + 1
    if tokens in (4096, 8192, 28672, 131072):
        assert tokens % chunks == 0


def jaxpr_of(config: Config, sharding: Sharding) -> Any:
    layer = describe(lambda rngs: Embedding(config.model, sharding, rngs=rngs), sharding)
    x, targets = jnp.zeros((3, 12, 16), config.model.dtype), jnp.zeros((3, 12), jnp.int32)

    def loss(params: Params, x: jax.Array) -> jax.Array:
        return nnx.merge(layer.graph, params).cross_entropy(x, targets, "auto", 4)

    return jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 1)))(layer.shapes, x)


def equations(jaxpr: Any) -> Any:
    for each in jaxpr.eqns:
        yield each
        for value in each.params.values():
            for inner in value if isinstance(value, tuple) else [value]:
                if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                    yield from equations(getattr(inner, "jaxpr", inner))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_products_are_narrow_with_wide_sums_and_no_array_has_all_logits(dtype: str) -> None:
    config = layer_config({}, f"dtype={dtype}", *EVERYTHING)
    found = list(equations(jaxpr_of(config, layer_annotator(config, {})).jaxpr))
    products = [each for each in found if each.primitive.name == "dot_general"]
    assert len(products) == 3  # logits once, and two gradients
    for each in products:
        assert {str(value.aval.dtype) for value in each.invars} == {dtype}
        assert str(each.outvars[0].aval.dtype) == "float32"
    shapes = [
        out.aval.shape for each in found for out in each.outvars if hasattr(out.aval, "shape")
    ]
    vocab = config.model.vocab_size
    assert (9, vocab) in shapes  # a chunk's
    assert not [shape for shape in shapes if vocab in shape and np.prod(shape) >= 36 * vocab]


def test_what_is_off_leaves_no_trace_in_the_program() -> None:
    config = layer_config({})
    program = jaxpr_of(config, layer_annotator(config, {})).jaxpr
    names = {each.primitive.name for each in equations(program)}
    assert {"exp", "dot_general"} <= names
    assert {"tanh", "square", "pmax", "psum", "all_gather"}.isdisjoint(names)


def test_the_line_states_chunks_and_sizes() -> None:
    config = layer_config({})
    sharding = layer_annotator(config, {})
    line = loss_of(config.model, sharding, (3, 12), "auto", 4).line()
    assert line.startswith(
        "loss: cross entropy of 36 tokens a device in 4 chunks, whose logits are 2.3 kB in float32"
    )
    assert "in one chunk" in loss_of(config.model, sharding, (3, 12), "auto", -1).line()


def test_more_chunks_than_tokens_are_refused() -> None:
    config = layer_config({"data": 8})
    with pytest.raises(UserError, match="num_vocab_tiling=13: a device has 12 tokens"):
        loss_of(config.model, layer_annotator(config, {"data": 8}), (8, 12), "auto", 13)


REFUSALS = [
    ("cpu", {}, (), -1, "is for TPUs, this is cpu\nfix: cross_entropy=auto"),
    ("cuda", {}, (), -1, "is for TPUs, this is cuda"),
    ("tpu", {"tensor": 2}, (), -1, "the whole vocabulary, which is in 2 parts"),
    ("tpu", {}, ("logits_bias=true",), -1, "knows no logits_bias"),
    ("tpu", {}, ("final_logits_soft_cap=2",), -1, "knows no logits_bias"),
    ("tpu", {}, ("logits_scaling=2",), -1, "knows no logits_bias"),
    ("tpu", {}, (), 4, "num_vocab_tiling=4, but"),
    ("tpu", {}, (), -1, "tokamax is not installed\nfix: pip install tokamax"),
]


@pytest.mark.parametrize(("platform", "sizes", "overrides", "chunks", "message"), REFUSALS)
def test_tokamax_is_refused_where_it_cannot_run(
    platform: str,
    sizes: Sizes,
    overrides: tuple[str, ...],
    chunks: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Sharding, "platform", platform)
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    config = layer_config(sizes, *overrides)
    sharding = layer_annotator(config, sizes)
    with pytest.raises(UserError, match=message):
        loss_of(config.model, sharding, (8, 12), "tokamax", chunks)


@pytest.mark.parametrize("tied", ["true", "false"])
@pytest.mark.parametrize("sizes", [{}, {"data": 2, "fsdp": 2, "context": 2}], ids=label)
def test_tokamax_is_called_by_its_name_with_a_devices_tokens(
    sizes: Sizes, tied: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in of its documented interface: tokamax's kernel runs on TPUs alone."""

    def stand_in(
        x: jax.Array, labels: jax.Array, weights: jax.Array, *, reduction: str, implementation: str
    ) -> jax.Array:
        assert (reduction, implementation) == ("sum", "mosaic_tpu")
        chosen = jnp.take_along_axis(jax.nn.log_softmax(x @ weights), labels[:, None], axis=1)
        return -jnp.sum(chosen)

    monkeypatch.setattr(Sharding, "platform", "tpu")
    module = SimpleNamespace(linear_softmax_cross_entropy_loss=stand_in, __spec__=object())
    monkeypatch.setitem(sys.modules, "tokamax", module)
    check(sizes, (f"logits_via_embedding={tied}",), chunks=-1, rows=8, routine="tokamax")
