"""Check the references: every feature has an effect, nothing is near a tie, caches agree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.models import oracle
from tests.moe.oracle import Settings
from tests.parity import weights
from tests.parity.families import COMMON, FAMILIES, NEWER, SHAPES, Shape, each_shape

pytestmark = pytest.mark.parity

# The value of a setting that turns its feature off or changes it. The tensors stay the same.
OFF: dict[str, Callable[[Any], Any]] = {
    "attention_chunk_size": lambda _: 64,
    "attention_multiplier": lambda _: 0.35,
    "attn_scale": lambda _: 1e-6,
    "clip_qkv": lambda _: None,
    "embedding_multiplier": lambda _: 1.0,
    "final_logit_softcapping": lambda _: None,
    "floor_scale": lambda _: 64,
    "logits_scaling": lambda _: 1.0,
    "no_rope_layer_interval": lambda _: 64,
    "norm_topk_prob": lambda on: not on,
    "num_experts_per_tok": lambda k: k + 1,
    "residual_multiplier": lambda _: 1.0,
    "rms_norm_eps": lambda _: 1e-6,
    "rope_interleave": lambda on: not on,
    "rope_parameters": lambda _: COMMON["rope_parameters"] | {"partial_rotary_factor": 1.0},
    "routed_scaling_factor": lambda _: 1.0,
    "router_jitter_noise": lambda _: 0.01,
    "sliding_window": lambda _: 64,
    "swiglu_limit": lambda _: 100.0,
    "top_k_experts": lambda k: k + 1,
    "topk_group": lambda kept: kept + 1,
    "use_qk_norm": lambda on: not on,
}
# They change the tensors, or need a second setting.
NOT_ALONE = {
    ("phimoe", "num_experts_per_tok"),
    ("glm4_moe", "use_qk_norm"),
    ("kimi_k25", "topk_group"),
    # Sections for images, which change nothing for text.
    ("qwen3_vl_moe", "rope_parameters"),
    ("qwen3_omni_moe_thinker", "rope_parameters"),
    ("glm4v_moe", "rope_parameters"),
    ("ernie4_5_vl_moe", "rope_parameters"),
    ("qwen3_5_moe", "rope_parameters"),
    # They are of types of layers.
    ("gemma4", "rope_parameters"),
    ("gemma4_text", "rope_parameters"),
}


SWITCHES = [
    pytest.param(
        shape,
        key,
        id=f"{shape.id}-{key}",
        marks=[pytest.mark.parity_all] if shape in NEWER else [],
    )
    for shape in SHAPES
    for key in OFF
    if shape.settings.get(key) is not None and (shape.family, key) not in NOT_ALONE
]


@pytest.mark.parametrize(("shape", "key"), SWITCHES)
def test_what_a_shape_sets_acts(
    shape: Shape, key: str, reference: Callable[[Shape], Any], tmp_path: Path
) -> None:
    import transformers

    from tests.parity.reference import forward, load

    known = reference(shape)
    settings = shape.config_with(shape.settings | {key: OFF[key](shape.settings[key])})
    transformers.AutoConfig.for_model(shape.family, **settings).save_pretrained(tmp_path)
    (path,) = known.directory.glob("*.safetensors")
    (tmp_path / path.name).symlink_to(path)
    other = forward(shape, load(shape, tmp_path), known.inputs, known.targets)["logits"]
    assert np.abs(other.detach().numpy() - known.logits).max() > 1e-2


@each_shape()
def test_nothing_is_near_a_tie(shape: Shape, reference: Callable[[Shape], Any]) -> None:
    known = reference(shape)
    assert known.margin > 1e-4
    assert known.greedy_margin > 1e-4


@each_shape()
def test_routing_is_diverse(shape: Shape, reference: Callable[[Shape], Any]) -> None:
    names = ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts")
    k = next(shape.settings[name] for name in names if name in shape.settings)
    for logits in reference(shape).router_logits:
        chosen = np.argsort(logits)[..., -k:]
        assert len(np.unique(chosen)) > 0.8 * logits.shape[-1]


@each_shape()
def test_a_cache_does_not_change_what_is_written(
    shape: Shape, reference: Callable[[Shape], Any]
) -> None:
    known = reference(shape)
    np.testing.assert_array_equal(known.greedy, known.greedy_without_cache)
    assert len(set(known.greedy.ravel())) > 5


@each_shape()
def test_every_weight_is_as_the_rule_says(shape: Shape, reference: Callable[[Shape], Any]) -> None:
    tensors = weights.read(reference(shape).directory)
    for name, values in tensors.items():
        drawn = weights.tensor(name, values.shape, shape.seed, shape.zero_centered)
        np.testing.assert_array_equal(values, drawn)
        assert values.size == 1 or values.std() > 0.05, name


@each_shape(shape for shape in NEWER if "linear_num_key_heads" in shape.settings)
def test_float32_determines_the_gradients(shape: Shape, tmp_path: Path) -> None:
    """Leave half of the tolerance to the package, at least."""
    from tests.parity.float64 import error_of_gradients

    assert error_of_gradients(shape, tmp_path) < 5e-6


def test_two_shapes_or_more_of_every_family() -> None:
    for family in FAMILIES:
        assert sum(shape.family == family for shape in SHAPES) >= 2
    assert len({shape.id for shape in SHAPES}) == len(SHAPES)


def test_the_first_family_in_float64(reference: Callable[[Shape], Any]) -> None:
    """Compute Mixtral again in NumPy, head by head, by code that nothing else here uses."""
    shape = SHAPES[0]
    known, settings = reference(shape), shape.config
    heads, size = settings["num_attention_heads"], settings["hidden_size"]
    found = weights.read(known.directory)

    def layer(index: int) -> dict[str, Any]:
        prefix = f"model.layers.{index}."

        def get(name: str) -> np.ndarray:
            return found[f"{prefix}{name}.weight"]

        def head(name: str) -> np.ndarray:
            return get(f"self_attn.{name}").T.reshape(size, -1, size // heads)

        def experts(name: str) -> np.ndarray:
            each = range(settings["num_local_experts"])
            return np.stack([get(f"block_sparse_moe.experts.{e}.{name}").T for e in each])

        return {
            "attention_norm": {"scale": get("input_layernorm")},
            "mlp_norm": {"scale": get("post_attention_layernorm")},
            "attention": {
                "query": head("q_proj"),
                "key": head("k_proj"),
                "value": head("v_proj"),
                "out": get("self_attn.o_proj").T.reshape(heads, size // heads, size),
            },
            "mlp": {
                "router": {"kernel": get("block_sparse_moe.gate").T},
                "experts": {
                    n: experts(w) for n, w in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
                },
            },
        }

    import jax

    layers = [layer(index) for index in range(settings["num_hidden_layers"])]
    params = {
        "embedding": {
            "table": found["model.embed_tokens.weight"],
            "kernel": found["lm_head.weight"].T,
        },
        "layers": jax.tree.map(lambda *each: np.stack(each), *layers),
        "final_norm": {"scale": found["model.norm.weight"]},
    }
    architecture = oracle.Architecture(
        theta=10_000.0,
        epsilon=1e-5,
        activation="silu",
        moe=Settings(k=2, capacity_factor=-1),
    )
    positions = np.broadcast_to(np.arange(known.inputs.shape[1]), known.inputs.shape)
    answer = oracle.forward(params, known.inputs, positions, np.zeros_like(positions), architecture)
    np.testing.assert_allclose(known.logits, answer.logits, atol=1e-5)
