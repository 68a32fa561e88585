"""Store gate and up fused or separately: a run may switch, and no number changes."""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from moe_shard.checkpoints.checkpoint import Checkpointer
from moe_shard.checkpoints.convert import is_fused, other_layout, to_layout
from moe_shard.config import Config
from moe_shard.errors import UserError
from moe_shard.models.params import ParamSpec
from moe_shard.program.optimizer import make_optimizer
from moe_shard.program.step import Program, TrainState, make_program
from moe_shard.training.loop import Trainer
from tests.models.build import QUICK, annotator, label, random_batch, small_config

KEYS = (
    "base_num_decoder_layers=2",
    "learning_rate=0.01",
    "warmup_steps_fraction=0",
    "steps=4",
    "async_checkpointing=false",
)
FUSED = "prefuse_moe_weights=true"
BIASES = "mlp_bias=true"
EP8 = {"expert": 8}
# E over two axes and H over one; then all of E, M and H sharded.
MESHES = [EP8, {"fsdp": 2, "expert": 2, "tensor": 2}, {"expert": 2, "context": 2, "tensor": 2}]
E, M, H = 8, 16, 32


class Built(NamedTuple):
    config: Config
    program: Program


@functools.cache
def built(sizes: tuple[tuple[str, int], ...], *overrides: str) -> Built:
    config = small_config(dict(sizes), *KEYS, *overrides)
    return Built(config, make_program(config, annotator(config)))


def build(sizes: dict[str, int], *overrides: str) -> Built:
    return built(tuple(sizes.items()), *overrides)


@functools.cache
def compiled_init(*overrides: str) -> jax.stages.Compiled:
    return build(EP8, *overrides).program.init.lower(jax.random.key(0)).compile(QUICK)


@functools.cache
def compiled_step(*overrides: str) -> jax.stages.Compiled:
    program = build(EP8, *overrides).program
    return program.step.lower(program.abstract_state, program.abstract_batch).compile(QUICK)


def first_state(*overrides: str) -> TrainState:
    """Return the first state of a run on `EP8`."""
    return compiled_init(*overrides)(jax.random.key(3))


def made_up(program: Program) -> TrainState:
    """Make a state of random numbers, which needs no compilation."""
    rng = np.random.default_rng(0)

    def values(leaf: Any) -> jax.Array:
        numbers = rng.integers(1, 1000, leaf.shape).astype(leaf.dtype)
        return jax.device_put(numbers, leaf.sharding)

    return jax.tree.map(values, program.abstract_state)


def train(state: TrainState, steps: range, *overrides: str) -> tuple[TrainState, list[float]]:
    """Train these steps on `EP8`, each on its own text."""
    program, step = build(EP8, *overrides).program, compiled_step(*overrides)
    losses = []
    for number in steps:
        batch = jax.device_put(random_batch(seed=number), program.batch_sharding)
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return state, losses


def save(folder: Path, config: Config, state: TrainState, updates: int = 2) -> None:
    checkpointer = Checkpointer(folder, config)
    checkpointer.save(state, updates=updates)
    checkpointer.close()


def restore(folder: Path, built: Built) -> tuple[TrainState, list[str]]:
    """Restore the newest state, and return it with the notes about it."""
    said: list[str] = []
    checkpointer = Checkpointer(folder, built.config)
    try:
        newest = checkpointer.latest()
        assert newest is not None
        checkpointer.check_fits(newest)
        state = checkpointer.restore(newest, built.program.abstract_state, say=said.append)
        return state, said
    finally:
        checkpointer.close()


def arrays(tree: Any) -> dict[str, np.ndarray]:
    """Return all arrays by name."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def stacked(apart: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Fuse by hand: replace each gate and its up by the one array of both."""
    made = dict(apart)
    for end in ("", "_bias"):
        gates = [name for name in apart if name.endswith(f".experts.gate{end}")]
        assert len(gates) == 3 or end, "parameters and two moments"
        for name in gates:
            both, up = (name.replace(".gate", f".{other}") for other in ("gate_up", "up"))
            made[both] = np.stack([made.pop(name), made.pop(up)], axis=-2)
    return made


def assert_bitwise(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


def assert_placed(state: TrainState, program: Program) -> None:
    found: Any = jax.tree.structure(state)
    assert found == jax.tree.structure(program.abstract_state)
    places = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state)
    assert jax.tree.map(lambda array: array.sharding, state) == places


@pytest.mark.parametrize("sizes", MESHES, ids=label)
def test_to_fused_and_back_is_bit_for_bit_on_any_mesh(
    tmp_path: Path, sizes: dict[str, int]
) -> None:
    apart = build(EP8)
    state, _ = train(first_state(), range(2))
    original = arrays(state)
    for leaf in ("gate", "up"):
        for tree in ("params", "opt_state.1.0.mu", "opt_state.1.0.nu"):
            assert original[f"{tree}.layers.mlp.experts.{leaf}"].any()
    save(tmp_path / "apart", apart.config, state)

    fused = build(sizes, FUSED)
    restored, said = restore(tmp_path / "apart", fused)
    assert said == [
        "the experts' gate and up, saved apart, are now one array (prefuse_moe_weights=true)"
    ]
    assert_placed(restored, fused.program)
    assert_bitwise(arrays(restored), stacked(original))
    save(tmp_path / "fused", fused.config, restored)

    for back in (build(sizes), apart):
        again, said = restore(tmp_path / "fused", back)
        assert said == [
            "the experts' gate and up, saved as one array, are now apart "
            "(prefuse_moe_weights=false)"
        ]
        assert_placed(again, back.program)
        assert_bitwise(arrays(again), original)


@pytest.mark.parametrize("sizes", MESHES, ids=label)
def test_biases_are_converted_with_their_weights(tmp_path: Path, sizes: dict[str, int]) -> None:
    apart = build(EP8, BIASES)
    state = made_up(apart.program)
    original = arrays(state)
    assert sum(".experts." in name and name.endswith("_bias") for name in original) == 3 * 3
    save(tmp_path / "apart", apart.config, state)

    fused = build(sizes, BIASES, FUSED)
    restored, _ = restore(tmp_path / "apart", fused)
    assert_placed(restored, fused.program)
    assert_bitwise(arrays(restored), stacked(original))
    assert other_layout(fused.program.abstract_state) == build(sizes, BIASES).program.abstract_state

    save(tmp_path / "fused", fused.config, restored)
    again, _ = restore(tmp_path / "fused", apart)
    assert_placed(again, apart.program)
    assert_bitwise(arrays(again), original)


def test_the_meshes_shard_each_dim_of_the_experts() -> None:
    shards = []
    for sizes in MESHES:
        spec = build(sizes, FUSED).program.model.specs["layers"]["mlp"]["experts"]["gate_up"]
        assert spec.shape == (2, E, M, 2, H)
        shards.append(spec.sharding.shard_shape(spec.shape))
    assert shards == [(2, 1, M, 2, H), (2, 2, M, 2, H // 2), (2, 4, M // 2, 2, H // 2)]


@pytest.mark.parametrize("overrides", [(), (FUSED,)], ids=["apart", "fused"])
def test_the_same_layout_is_not_converted(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    run = build(EP8, *overrides)
    state = made_up(run.program)
    save(tmp_path, run.config, state)
    restored, said = restore(tmp_path, run)
    assert said == []
    assert_bitwise(arrays(restored), arrays(state))


def test_a_model_without_experts_is_not_converted(tmp_path: Path) -> None:
    dense = build({"fsdp": 8}, "num_experts=1", "num_experts_per_tok=1")
    assert dense.config.model.moe is None
    assert "gate" in dense.program.model.specs["layers"]["mlp"]
    state = made_up(dense.program)
    save(tmp_path, dense.config, state)
    restored, said = restore(tmp_path, dense)
    assert said == []
    assert_bitwise(arrays(restored), arrays(state))


def test_the_first_weights_are_the_same_numbers() -> None:
    assert_bitwise(arrays(first_state(FUSED)), stacked(arrays(first_state())))


def test_losses_are_the_same_fused_from_the_start_or_from_a_checkpoint_on(tmp_path: Path) -> None:
    state, expected = train(first_state(), range(2))
    save(tmp_path, build(EP8).config, state)
    expected += train(state, range(2, 4))[1]
    assert len(set(expected)) == 4

    _, from_the_start = train(first_state(FUSED), range(4), FUSED)
    np.testing.assert_allclose(from_the_start, expected, rtol=0, atol=1e-6)
    restored, _ = restore(tmp_path, build(EP8, FUSED))
    _, from_step_2 = train(restored, range(2, 4), FUSED)
    np.testing.assert_allclose(from_step_2, expected[2:], rtol=0, atol=1e-6)


def test_the_loop_says_that_it_converted(tmp_path: Path) -> None:
    apart, fused = build(EP8), build(EP8, FUSED)
    state = made_up(apart.program)
    save(tmp_path, apart.config, state)
    trainer = object.__new__(Trainer)
    trainer.first, trainer.program = 2, fused.program
    trainer.checkpointer = Checkpointer(tmp_path, fused.config)
    out = io.StringIO()
    console = Console(width=100, file=out)
    assert is_fused(trainer._first_state(console))
    trainer.checkpointer.close()
    assert out.getvalue().splitlines() == [
        "continuing from the checkpoint after step 2",
        "the experts' gate and up, saved apart, are now one array (prefuse_moe_weights=true)",
    ]


def test_any_tree_of_the_parameters_like_is_converted_and_its_old_arrays_are_freed() -> None:
    """Convert momentum, and a tree in containers that no optimizer here makes."""
    apart, fused = (build(MESHES[1], *keys) for keys in ((), (FUSED,)))
    places = jax.tree.map(lambda spec: spec.sharding, apart.program.model.specs)
    params = jax.device_put(made_up(apart.program).params, places)
    trace = optax.TraceState(jax.tree.map(lambda a: a + 1, params))
    tree = [(trace, {"mean": params}), optax.EmptyState(), None]
    like = jax.tree.map(lambda spec: spec.abstract(), fused.program.model.specs)
    wanted = [(optax.TraceState(like), {"mean": like}), optax.EmptyState(), None]

    mean = arrays(params)
    experts = params["layers"]["mlp"]["experts"]
    router = params["layers"]["mlp"]["router"]["kernel"]
    assert is_fused(tree) is False
    made = to_layout(tree, wanted)
    assert is_fused(made) is True
    name = "layers.mlp.experts"
    both = np.stack([mean[f"{name}.gate"], mean[f"{name}.up"]], axis=3)
    found = [each["layers"]["mlp"] for each in (made[0][1]["mean"], made[0][0].trace)]
    np.testing.assert_array_equal(found[0]["experts"]["gate_up"], both)
    np.testing.assert_array_equal(found[1]["experts"]["gate_up"], both + 1)
    assert found[0]["router"]["kernel"] is router
    assert found[0]["experts"]["down"] is experts["down"]
    assert experts["gate"].is_deleted()
    assert experts["up"].is_deleted()
    assert to_layout(made, wanted)[0][1]["mean"]["layers"]["mlp"] == found[0]


@pytest.mark.parametrize("sizes", MESHES, ids=label)
def test_the_other_layout_is_described_as_a_run_of_it_would(sizes: dict[str, int]) -> None:
    apart, fused = build(sizes).program, build(sizes, FUSED).program
    assert other_layout(apart.abstract_state) == fused.abstract_state
    assert other_layout(fused.abstract_state) == apart.abstract_state


@pytest.mark.parametrize("change", ["base_moe_mlp_dim=64", "num_experts=16", "optimizer=sgd"])
def test_another_models_checkpoint_is_still_refused_by_its_key(tmp_path: Path, change: str) -> None:
    apart = build(EP8)
    save(tmp_path, apart.config, made_up(apart.program))
    with pytest.raises(UserError) as caught:
        restore(tmp_path, build(EP8, FUSED, change))
    message = str(caught.value)
    assert len(message.splitlines()) <= 3
    assert "holds another model" in message
    assert change in message
    assert "fix: " in message


def test_a_structure_that_cannot_be_read_is_an_error_that_names_the_checkpoint(
    tmp_path: Path,
) -> None:
    apart = build(EP8)
    save(tmp_path, apart.config, made_up(apart.program))
    structure = tmp_path / "2" / "state" / "_METADATA"
    structure.write_bytes(structure.read_bytes()[:8])
    with pytest.raises(UserError) as caught:
        restore(tmp_path, build(EP8, FUSED))
    message = str(caught.value)
    assert len(message.splitlines()) <= 3
    assert str(tmp_path / "2") in message
    assert "fix: " in message


def test_weights_decay_alike_in_both_layouts() -> None:
    """Without a gradient, the update is the decay alone."""
    decay = []
    for keys in ((), (FUSED,)):
        config, program = build(EP8, *keys)
        optimizer = make_optimizer(config.train, program.model.specs)
        shapes = program.abstract_state.params

        def update(optimizer: Any = optimizer, shapes: Any = shapes) -> Any:
            ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes)
            nothing = jax.tree.map(jnp.zeros_like, ones)
            return optimizer.update(nothing, optimizer.init(ones), ones)[0]

        decay.append(arrays(jax.jit(update).lower().compile(QUICK)()))
    apart, fused = decay
    name = "layers.mlp.experts"
    assert apart[f"{name}.gate"].all()
    assert not apart["layers.mlp_norm.scale"].any()
    both = np.stack([apart.pop(f"{name}.gate"), apart.pop(f"{name}.up")], axis=-2)
    assert_bitwise(fused, {**apart, f"{name}.gate_up": both})


def test_a_dim_without_a_name_makes_no_matrix_of_a_vector() -> None:
    config, program = build(EP8)
    place = jax.tree.leaves(program.model.specs)[0].sharding
    spec = ParamSpec("scale", (2, 1, 4), np.dtype("float32"), ("layers", None, "norm"), place)
    optimizer = make_optimizer(config.train, {"scale": spec})
    params = {"scale": jnp.ones(spec.shape)}
    nothing = {"scale": jnp.zeros(spec.shape)}
    updates, _ = optimizer.update(nothing, optimizer.init(params), params)
    assert not updates["scale"].any()


@pytest.mark.parametrize("biases", [(), (BIASES,)], ids=["", "biases"])
def test_a_state_of_muon_converts_and_one_of_adafactor_does_not(
    tmp_path: Path, biases: tuple[str, ...]
) -> None:
    fused, apart = (build(EP8, *biases, "optimizer=muon", *more) for more in ((FUSED,), ()))
    there = made_up(fused.program)
    kept = jax.device_get(there)
    back = to_layout(to_layout(there, apart.program.abstract_state), fused.program.abstract_state)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(back), kept)
    abstract = other_layout(apart.program.abstract_state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(
        lambda x: (x.shape, x.dtype), fused.program.abstract_state
    )
    if biases:
        return
    fused, apart = (build(EP8, "optimizer=adafactor", *more) for more in ((FUSED,), ()))
    checkpointer = Checkpointer(tmp_path, apart.config)
    try:
        checkpointer.save(made_up(apart.program), updates=1)
        with pytest.raises(UserError, match="fix: prefuse_moe_weights=false"):
            checkpointer.restore(1, fused.program.abstract_state)
    finally:
        checkpointer.close()
