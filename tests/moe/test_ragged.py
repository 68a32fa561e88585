"""Check what `ragged` compiles to, that it is deterministic, what it drops and records."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_shard.config.load import load_config
from moe_shard.config.moe_config import LoadBalanceLoss, MoEConfig
from moe_shard.config.strategies import find_strategy
from moe_shard.errors import UserError
from moe_shard.lowering.expect import assert_collectives
from moe_shard.lowering.reports import report_from_text
from moe_shard.moe.exchange.equal_pieces import _sum_in_order
from moe_shard.moe.layer import MoELayer
from moe_shard.moe.record import MoERecord
from moe_shard.scopes import FURTHER_ROUNDS
from moe_shard.sharding.annotate import Sharding
from tests.moe.build import RULES, BuiltLayer, Outputs, build_layer, mesh_of
from tests.moe.inputs import random_inputs
from tests.moe.oracle import moe_layer
from tests.moe.test_contract import DIMS, WHOLE, set_check_vma, towards
from tests.moe.test_factorisations import assert_equal_to_oracle, label
from tests.moe.test_lowering import COLLECTIVE, Collective, collectives, kinds, remat

EXPERT_8 = {"expert": 8}


def build(sizes: dict[str, int], dispatch: str = "ragged", **route: Any) -> BuiltLayer:
    dims = DIMS | {name: route.pop(name) for name in tuple(route) if name in DIMS}
    return build_layer(mesh_of(sizes), WHOLE, dispatch=dispatch, flag=True, **dims, **route)


def forward(layer: BuiltLayer) -> Any:
    """Compile the forward pass alone."""
    params, tokens = layer.shardings()
    apply = jax.jit(layer.apply, in_shardings=(params, tokens), out_shardings=(tokens, None))
    return apply.lower(layer.shapes, layer.tokens).compile()


def in_every_step(text: str) -> list[Collective]:
    """Return the collectives that are outside of the loop of further rounds."""
    lines = (line for line in text.splitlines() if COLLECTIVE.search(line))
    return collectives("\n".join(line for line in lines if FURTHER_ROUNDS not in line))


def test_two_exchanges_forward_two_backward_and_one_of_counts() -> None:
    layer = build(EXPERT_8, tokens=128, model=64, hidden=128)
    found = in_every_step(forward(layer).as_text())
    assert kinds(found) == {"all-to-all": 2, "all-gather": 1}
    (counts,) = (each for each in found if each.kind == "all-gather")
    assert counts.bytes == 8 * 8 * 4  # of 8 devices, for 8 experts
    both = layer.lower().compile().as_text()
    # And what every step has: the sum of the router's gradient and of the losses.
    assert kinds(in_every_step(both)) == {"all-to-all": 4, "all-gather": 1, "all-reduce": 1}
    count = partial(assert_collectives, both, mesh=EXPERT_8, axis="expert")
    count(scope="dispatch", pass_="forward", all_to_all=1, all_gather=1)
    count(scope="combine", pass_="forward", all_to_all=1, all_gather=0)
    count(scope="dispatch", pass_="backward", all_to_all=1, all_gather=0)
    count(scope="combine", pass_="backward", all_to_all=1, all_gather=0)
    report = report_from_text(both, mesh=EXPERT_8)
    assert report.verdict == "expert-parallel"
    assert [line for line in report.warnings if "further MoE exchanges" in line] == [
        "not counted: 2 loops of further MoE exchanges, which run only where a router exceeds what"
        " one exchange holds"
    ]


@pytest.mark.parametrize("names", [("routing",), ("routing", "exchanged")])
def test_recomputation_repeats_no_exchange_that_was_saved(names: tuple[str, ...]) -> None:
    layer = build(EXPERT_8, tokens=64)
    found = in_every_step(layer.lower(wrap=remat(*names)).compile().as_text())
    exchanges = 4 if "exchanged" in names else 6
    assert kinds(found) == {"all-to-all": exchanges, "all-gather": 1, "all-reduce": 1}


@pytest.mark.parametrize("chunks", [1, 2])
def test_chunks_share_one_exchange_of_counts(chunks: int) -> None:
    layer = build(EXPERT_8, tokens=64, num_moe_token_chunks=chunks)
    found = in_every_step(forward(layer).as_text())
    assert kinds(found) == {"all-to-all": 2 * chunks, "all-gather": 1}


@pytest.mark.parametrize("sizes", [{"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 4}], ids=label)
def test_without_an_expert_group_the_layer_says_nothing(
    sizes: dict[str, int], strategy: str
) -> None:
    layer = build(sizes, strategy)
    # FSDP gathers weights and sums their gradients; tokens, counts and capacities are not sent.
    experts = 8 * 16 * 32
    for each in collectives(forward(layer).as_text()):
        assert each.kind == "all-gather"
        assert "fsdp" in sizes
        assert {int(np.prod(shape)) for _, shape in each.arrays} == {experts}
    weights, kernel = {experts, experts // sizes.get("fsdp", 1)}, 16 * 8
    for each in collectives(layer.lower().compile().as_text()):
        elements = {int(np.prod(shape)) for _, shape in each.arrays}
        assert elements <= weights | {kernel, 1}
        assert each.kind != "all-to-all"


@pytest.mark.parametrize("tokens", [16, 13])
def test_forced_balance_sorts_nothing_and_counts_nothing(strategy: str, tokens: int) -> None:
    layer = build(EXPERT_8, strategy, force_load_balance=True, tokens=tokens)
    text = layer.lower().compile().as_text()
    assert " sort(" not in text
    assert kinds(collectives(text)) == {"all-to-all": 4, "all-reduce": 1}
    assert " while(" not in text
    if not find_strategy(strategy).has_slots and tokens == 16:
        # 16 * 2 choices: 4 copies to each of 8 peers
        sent = [each.bytes for each in collectives(text) if each.kind == "all-to-all"]
        assert sent == [8 * 4 * 16 * 4] * 4
        assert " gather(" not in text


@pytest.mark.parametrize("chosen", ["force_load_balance", "use_random_routing"])
def test_the_weights_of_forced_routing_are_the_routers(chosen: str) -> None:
    forced: dict[str, Any] = {chosen: True}
    layer, inputs = build(EXPERT_8, **forced), random_inputs(**DIMS)
    counts = layer.run(inputs).stats.expert_counts
    assert (counts.sum(axis=1) == 32).all()
    assert ((counts == 4).all()) == (chosen == "force_load_balance")


def run_twice(layer: BuiltLayer, **options: Any) -> tuple[Outputs, Outputs]:
    params, tokens = layer.shardings()
    inputs = towards([0.4 * e for e in range(8)], tokens=128)
    arguments = jax.device_put(
        (inputs.params, inputs.x, inputs.cotangent), (params, tokens, tokens)
    )
    step = layer.lower(**options).compile()
    return jax.device_get(step(*arguments)), jax.device_get(step(*arguments))


def assert_same_bits(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("route", [{}, {"force_load_balance": True}], ids=["routed", "forced"])
@pytest.mark.parametrize("sizes", [EXPERT_8, {"data": 2, "expert": 4}], ids=label)
def test_the_same_bits_every_run_and_under_remat(
    sizes: dict[str, int], route: dict[str, Any]
) -> None:
    layer = build(sizes, tokens=128, **route)
    once, again = run_twice(layer)
    assert_same_bits(once, again)
    for names in (("routing",), ("routing", "exchanged")):
        recomputed, _ = run_twice(layer, wrap=remat(*names))
        assert_same_bits(once.y, recomputed.y)
        assert_same_bits(once.stats, recomputed.stats)
        assert_same_bits(once.grads, recomputed.grads)


@pytest.mark.parametrize("order", [(1e20, 1.0, -1e20), (-1e20, 1.0, 1e20)])
def test_the_sum_over_k_is_in_order(order: tuple[float, ...]) -> None:
    rows = jnp.array(order)[None, :, None]
    assert float(jax.jit(_sum_in_order)(rows, jnp.ones((1, 3)))[0, 0]) == 0.0


@pytest.mark.parametrize(
    ("factor", "biases"),
    [(0.5, ()), (1.0, ()), (1.5, ()), (1.0, ("gate_bias", "up_bias", "down_bias"))],
)
def test_what_is_dropped_is_counted_and_is_the_last_of_a_piece(
    factor: float, biases: tuple[str, ...]
) -> None:
    # One sequence and one expert a device: a piece of the padded exchange is what one sequence
    # sends to one expert, so its bound is that expert's capacity for that sequence.
    inputs = towards([0.4 * e for e in range(8)], tokens=64, biases=biases)
    layer = build(EXPERT_8, tokens=64, ragged_buffer_factor=factor, biases=bool(biases))
    settings = dataclasses.replace(WHOLE, capacity_factor=factor)
    expected = moe_layer(inputs.x, inputs.params, inputs.cotangent, settings)
    assert expected.dropped.sum() > 0
    assert_equal_to_oracle(layer.run(inputs), expected)


@pytest.mark.parametrize(
    "sizes", [{"context": 2, "expert": 4}, {"fsdp": 2, "tensor": 2, "expert": 2}], ids=label
)
def test_what_is_dropped_is_counted_on_every_mesh(sizes: dict[str, int]) -> None:
    inputs = towards([0.4 * e for e in range(8)], tokens=64)
    found = build(sizes, tokens=64, ragged_buffer_factor=1.0).run(inputs)
    whole = build(sizes, tokens=64).run(inputs)
    assert found.stats.dropped.shape == (8,)
    assert found.stats.dropped.sum() > 0
    assert whole.stats.dropped.sum() == 0
    # The output is zero for a token whose choices were all dropped, and for no other.
    lost = (found.y == 0).all(axis=-1).sum(axis=1)
    assert (2 * lost <= found.stats.dropped).all()


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("convention", ["maxtext", "gshard"])
def test_what_should_be_equal_on_all_devices_is(
    convention: LoadBalanceLoss, check_vma: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_check_vma(monkeypatch, check_vma)
    settings = dataclasses.replace(WHOLE, load_balance=convention)
    layer = build_layer(
        mesh_of({"data": 2, "tensor": 2, "expert": 2}),
        settings,
        dispatch="ragged",
        flag=True,
        **DIMS,
    )
    params, tokens = layer.shardings()
    inputs = towards([0.4 * e for e in range(8)])
    arguments = jax.device_put(
        (inputs.params, inputs.x, inputs.cotangent), (params, tokens, tokens)
    )
    found = layer.lower().compile()(*arguments)
    replicated = {
        "total": found.total, "kernel": found.grads["kernel"], "loss": found.load_balance
    }  # fmt: skip
    for name, array in {**found.grads, **replicated}.items():
        by_index: dict[str, list[np.ndarray]] = {}
        for shard in array.addressable_shards:
            by_index.setdefault(str(shard.index), []).append(np.asarray(shard.data))
        for first, *others in by_index.values():
            for other in others:
                np.testing.assert_array_equal(first, other, err_msg=name)
        if name in replicated:
            assert len(by_index) == 1


def record_of(sizes: dict[str, int], dispatch: str = "ragged", **route: Any) -> MoERecord:
    return build(sizes, dispatch, **route).record()


def test_the_record() -> None:
    plain = record_of(EXPERT_8)
    assert plain == MoERecord(
        strategy="ragged",
        transport="padded all-to-all",
        grouped_product="single",
        fast_paths=(),
        router="softmax, top 2",
        reasons={
            "transport padded all-to-all": "CPU has no ragged-all-to-all",
            "product single": "one group is one plain product",
        },
        not_taken={
            "singleton": "expert axis of 8",
            "forced-balance": "force_load_balance=false",
            "equal-pieces": "counts differ",
            "fused-gate-up": "prefuse_moe_weights=false, each is one plain product",
            "token-chunks": "num_moe_token_chunks=1",
        },
    )
    assert plain.lines("layers 0-3")[0] == (
        "MoE in layers 0-3: dispatch ragged, transport padded all-to-all, product single, "
        "fast paths: none"
    )
    assert plain.lines("layers 0-3")[1] == "  router: softmax, top 2"


@pytest.mark.parametrize(
    ("model", "router"),
    [
        (
            "deepseek3-671b",
            "sigmoid, top 8 in 4 of 8 groups, correction bias, 1 shared expert",
        ),
        ("deepseek2-16b", "softmax, top 6, 2 shared experts"),
        ("llama4-17b-16e", "sigmoid, top 1, weights on the input, 1 shared expert"),
    ],
)
def test_the_record_names_the_router(model: str, router: str) -> None:
    config = load_config(model).model.moe
    assert config is not None
    nothing = ("none", "")
    record = MoERecord.of(
        config, transport=nothing, grouped_product=nothing, singleton="", equal_pieces=""
    )
    assert record.router == router


@pytest.mark.parametrize(
    ("sizes", "dispatch", "route", "transport", "product", "paths"),
    [
        ({"data": 8}, "ragged", {}, "none", "blocked", {"singleton", "fused-gate-up"}),
        ({"data": 8}, "gather", {}, "none", "batched", {"singleton"}),
        (EXPERT_8, "gather", {}, "all-to-all", "batched", {"equal-pieces"}),
        (
            EXPERT_8,
            "ragged",
            {"force_load_balance": True},
            "equal all-to-all",
            "batched",
            {"forced-balance", "equal-pieces"},
        ),
        (
            {"data": 2, "expert": 4},
            "ragged",
            {"force_load_balance": True, "tokens": 13},
            "padded all-to-all",
            "blocked",
            {"forced-balance", "fused-gate-up"},
        ),
        (
            {"data": 2, "expert": 4},
            "ragged",
            {
                "prefuse_moe_weights": True,
                "num_moe_token_chunks": 2,
                "grouped_product": "ragged_dot",
            },
            "padded all-to-all",
            "ragged_dot",
            {"fused-gate-up", "token-chunks"},
        ),
    ],
)
def test_the_record_of_every_path(
    sizes: dict[str, int],
    dispatch: str,
    route: dict[str, Any],
    transport: str,
    product: str,
    paths: set[str],
) -> None:
    record = record_of(sizes, dispatch, **route)
    assert (record.strategy, record.transport, record.grouped_product, set(record.fast_paths)) == (
        dispatch,
        transport,
        product,
        paths,
    )
    assert not paths & record.not_taken.keys()


def test_an_axis_of_size_1_is_not_the_same_as_no_axis() -> None:
    one = record_of({"data": 8}).reasons["transport none"]
    assert one == "the expert axis has size 1"
    rules = [
        (name, [axis for axis in axes if axis != "expert"] if name != "activation_exp" else [])
        for name, axes in RULES
    ]
    layer = build_layer(
        mesh_of({"data": 8}), WHOLE, dispatch="ragged", flag=True, rules=rules, **DIMS
    )
    assert layer.record().reasons["transport none"] == "no axis is for experts"


def test_a_named_transport_that_cannot_run_is_an_error() -> None:
    with pytest.raises(UserError, match="no ragged-all-to-all on CPU"):
        build(EXPERT_8, ragged_transport="ragged")


@pytest.mark.parametrize(
    ("row", "axes", "says"),
    [
        ("activation_batch_moe", ["data", "fsdp"], "tokens are not split over expert"),
        ("exp", ["fsdp", "expert"], "which must come first"),
    ],
)
def test_a_table_that_cannot_carry_rows_is_an_error(row: str, axes: list[str], says: str) -> None:
    rows = RULES
    rules = [(name, axes if name == row else was) for name, was in rows]
    layer = build_layer(
        mesh_of({"fsdp": 2, "expert": 4}), WHOLE, dispatch="ragged", flag=True, rules=rules, **DIMS
    )
    with pytest.raises(UserError, match=says) as caught:
        layer.lower()
    assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize(
    ("dispatch", "route"),
    [
        ("gather", {}),
        ("ragged", {}),
        ("ragged", {"force_load_balance": True}),
    ],
)
@pytest.mark.parametrize("sizes", [EXPERT_8, {"data": 8}], ids=label)
def test_a_record_is_what_the_program_does(
    sizes: dict[str, int], dispatch: str, route: dict[str, Any]
) -> None:
    # The layer reports no part of this record: the program is compiled independently of it.
    layer = build(sizes, dispatch, **route)
    record = layer.record()
    text = forward(layer).as_text()
    found = kinds(in_every_step(text))
    exchanges = 0 if record.transport == "none" else 2
    assert found["all-to-all"] == exchanges
    assert ("singleton" in record.fast_paths) == (not exchanges)
    # Counts are exchanged where pieces differ, choices sorted where they are not known.
    assert (found["all-gather"] > 0) == (record.transport == "padded all-to-all")
    assert (" sort(" in text) == ("forced-balance" not in record.fast_paths)
    # In a loop over blocks of token copies, or of further rounds.
    assert (" while(" in text) == (record.grouped_product != "batched")


def test_two_layers_of_different_configurations_have_two_records() -> None:
    sharding = Sharding(mesh_of({"data": 2, "expert": 4}))
    plain = MoEConfig(num_experts=8, num_experts_per_tok=2, moe_mlp_dim=32)
    changed = dataclasses.replace(plain, moe_dispatch="ragged", num_moe_token_chunks=2)
    layers = [
        nnx.eval_shape(
            lambda config=config: MoELayer(
                config, model_dim=16, sharding=sharding, rngs=nnx.Rngs(0)
            )
        )
        for config in (plain, changed)
    ]
    first, second = (layer.record((8, 16, 16)) for layer in layers)
    assert (first.strategy, first.grouped_product) == ("gather", "batched")
    assert (second.strategy, second.transport) == ("ragged", "padded all-to-all")
    assert "token-chunks" in second.fast_paths
    assert layers[0].record((8, 16, 16)) == first
