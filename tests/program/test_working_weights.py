"""Weights are cast once a step, those that the layers cast and no others, to the same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_shard.config import list_models, load_config
from moe_shard.models.params import describe
from moe_shard.program.step import make_program
from moe_shard.program.working_weights import is_cast
from tests.models.build import QUICK, annotator, random_batch, random_params, small_config

LENGTH = 64
REPEATED = {
    *("deepseek3.2-671b", "dots1-142b-a14b", "ernie4.5-21b-a3b", "flex-olmo-7x7b", "gpt-oss-120b"),
    *("granite3-1b-a400m", "hunyuan-80b-a13b", "k-exaone-236b-a23b", "kimi-k2-1t", "ling-mini-2.0"),
    *("minimax-m2", "mixtral-8x22b", "nemotron3-nano-30b-a3b", "qwen1.5-moe-a2.7b"),
    *("qwen3-235b-a22b", "qwen3.5-35b-a3b", "sarvam-105b", "sarvam-30b", "solar-open-100b"),
}
"""Models whose weights are of kinds that others here have."""
MODELS = [
    pytest.param(name, marks=pytest.mark.recorded) if name in REPEATED else name
    for name in list_models()
]


def uses(jaxpr: Any, var: Any) -> Iterator[Any]:
    """Yield the equations that read a variable, those of scans and calls included."""
    for eqn in jaxpr.eqns:
        for at, read in enumerate(eqn.invars):
            if read is not var:
                continue
            inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            inner = getattr(inner, "jaxpr", inner)
            if inner is not None and len(inner.invars) == len(eqn.invars):
                yield from uses(inner, inner.invars[at])
            else:
                yield eqn


@pytest.mark.parametrize("name", MODELS)
def test_what_is_cast_ahead_is_what_every_model_casts(name: str) -> None:
    """Of the published sizes, without allocating them."""
    config = load_config(
        name,
        [
            *("dtype=bfloat16", "weight_dtype=float32", "remat_policy=none"),
            *("ici_data_parallelism=8", "ici_fsdp_parallelism=1", "ici_expert_parallelism=1"),
            *("num_simulated_devices=8", f"max_target_length={LENGTH}", "moe_dispatch=gather"),
            "indexer_topk=8",
        ],
    )
    model = describe(config.model, annotator(config))
    tokens = jax.ShapeDtypeStruct((8, LENGTH), jnp.int32)
    params = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype), model.specs)
    traced = jax.make_jaxpr(lambda p, *batch: model.apply(p)(*batch)[0])(params, *[tokens] * 3)
    specs = jax.tree.leaves(model.specs)
    for spec, var in zip(specs, traced.jaxpr.invars, strict=False):
        casts = [
            eqn.primitive.name == "convert_element_type" and eqn.params["new_dtype"] == jnp.bfloat16
            for eqn in uses(traced.jaxpr, var)
        ]
        in_scan = spec.logical_axes[0] == "layers"
        if is_cast(spec):
            assert casts, spec.name
            assert all(casts), f"{spec.name} is used in float32"
        elif in_scan and spec.is_matrix:
            assert not any(casts), f"{spec.name} is cast in every pass"
    assert sum(map(is_cast, specs)) > 0


def test_one_cast_gives_the_same_bits() -> None:
    found = []
    for once in ("true", "false"):
        config = small_config(
            {"fsdp": 2, "expert": 4}, "dtype=bfloat16", f"cast_weights_once={once}",
            "base_num_decoder_layers=2", "learning_rate=1.0", "optimizer=sgd",
        )  # fmt: skip
        program = make_program(config, annotator(config))
        step = program.step.lower(program.abstract_state, program.abstract_batch).compile(QUICK)
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), program.abstract_state)
        places = jax.tree.map(lambda x: x.sharding, program.abstract_state)
        state = jax.device_put(zeros._replace(params=random_params(config)), places)
        batch = jax.device_put(random_batch(), program.batch_sharding)
        after, metrics = step(state, batch)
        assert all(x.dtype == np.float32 for x in jax.tree.leaves(after.params))
        found.append(jax.device_get((after.params, metrics)))
    jax.tree.map(np.testing.assert_array_equal, *found)
