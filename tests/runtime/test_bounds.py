"""The least work of the MoE layers, against counts made by hand."""

from __future__ import annotations

from moe_shard.config import load_config
from moe_shard.lowering.collectives import Collective
from moe_shard.moe.capacity import copies_per_sequence
from moe_shard.program.step import make_program
from moe_shard.runtime.bounds import (
    ALL,
    MoEBounds,
    Shares,
    gradient_shares,
    moe_bounds,
    moe_wire_bytes,
)
from moe_shard.sharding.rules import RuleTable
from tests.models.build import annotator, small_config


def bounds(*overrides: str, devices: int = 8, gradients: Shares = ALL) -> MoEBounds:
    config = load_config("mixtral-tiny", overrides)
    table = RuleTable(config.mesh.logical_axis_rules).on(config.mesh.resolve(devices))
    assert config.model.moe is not None
    slots = copies_per_sequence(config.model.moe, tokens=config.train.max_target_length)
    found = moe_bounds(config, table, copies_per_sequence=slots, gradients=gradients)
    assert found is not None
    return found


def test_mixtral_tiny_on_an_expert_axis_of_8() -> None:
    # 4 layers; 32 rows of 128 tokens over 8 devices; M 128, H 256, E 8, k 2, float32.
    # Capacity ceil(128 * 2 / 8) * 1.25 = 40. A device holds 4 rows of 8 * 40 slots of 512 B in
    # each layout: 655,360 B, of which 7/8 leave it, 4 times a layer.
    found = bounds()
    assert found.wire_bytes == 4 * 4 * 655_360 * 7 // 8
    # 4 rows * 128 tokens * 2 choices of 512 B.
    assert found.dropless_wire_bytes == 4 * 4 * 524_288 * 7 // 8
    # 9 products (3 forward, 6 backward) of 2 * 128 * 256 operations a slot.
    assert found.flops == 4 * 4 * 8 * 40 * 9 * 2 * 128 * 256
    assert found.dropless_flops == 4 * 4 * 128 * 2 * 9 * 2 * 128 * 256
    # One expert of 3 * 128 * 256 floats, read twice and its gradient written once, in 4 layers.
    assert found.weight_bytes == 4 * 3 * (3 * 128 * 256 * 4)
    # A slot's vector of 128 in and out, its hidden one of 256 out and in again; three passes.
    assert found.memory_bytes == found.weight_bytes + 4 * 4 * 8 * 40 * 3 * 2 * (128 + 256) * 4


def test_without_slots_the_least_is_that_of_the_tokens() -> None:
    found = bounds("moe_dispatch=ragged")
    assert (found.wire_bytes, found.flops) == (found.dropless_wire_bytes, found.dropless_flops)
    assert found.dropless_wire_bytes == bounds().dropless_wire_bytes


def test_tensor_and_fsdp_axes_take_their_share() -> None:
    keys = ("ici_expert_parallelism=2", "ici_fsdp_parallelism=2", "ici_tensor_parallelism=2")
    found, whole = bounds(*keys), bounds()
    # Rows are split in 4 where they were in 8, vectors in 2: as many bytes in each layout, of
    # which now a half stays.
    assert found.wire_bytes * (7 / 8) == whole.wire_bytes * (1 / 2)
    assert found.flops == whole.flops
    assert found.weight_bytes == 2 * whole.weight_bytes  # 4 experts, each split in 2


def test_no_expert_axis_sends_nothing() -> None:
    assert bounds("ici_expert_parallelism=1", "ici_fsdp_parallelism=8").wire_bytes == 0


def test_accumulation_repeats_everything() -> None:
    once, thrice = bounds(), bounds("gradient_accumulation_steps=3")
    assert thrice.wire_bytes == 3 * once.wire_bytes
    assert thrice.flops == 3 * once.flops
    assert thrice.weight_bytes == 3 * once.weight_bytes


def test_only_layers_with_experts_count_and_not_the_shared_ones() -> None:
    whole = bounds("base_num_decoder_layers=3")
    for keys in (["first_num_dense_layers=1"], ["dense_layers=[2]", "shared_experts=2"]):
        assert bounds("base_num_decoder_layers=4", *keys) == whole
    one_of_two = bounds("base_num_decoder_layers=6", "interleave_moe_layer_step=2", "mlp_bias=true")
    assert one_of_two == whole


def test_a_dense_model_has_no_bounds() -> None:
    config = load_config("mixtral-tiny", ["num_experts=1", "num_experts_per_tok=1"])
    table = RuleTable(config.mesh.logical_axis_rules).on(config.mesh.resolve(8))
    assert moe_bounds(config, table, copies_per_sequence=1) is None


def shares(*overrides: str) -> Shares:
    config = small_config({"expert": 8}, *overrides)
    return gradient_shares(config.model, make_program(config, annotator(config)))


def test_experts_that_stay_are_read_twice_and_have_no_gradient() -> None:
    lora = ("enable_lora=true", "lora_rank=2", "lora_alpha=2")
    assert shares() == shares("trainable_parameters_mask=[experts]") == ALL
    assert shares(*lora) == Shares(1, 0)
    assert shares("trainable_parameters_mask=[experts/down]") == Shares(1, 1 / 3)
    assert shares("trainable_parameters_mask=[final_norm]") == Shares(0, 0)
    whole, still = bounds(), bounds(gradients=Shares(1, 0))
    assert still.wire_bytes == whole.wire_bytes
    assert 3 * still.flops == 2 * whole.flops
    assert 3 * still.memory_bytes == 2 * whole.memory_bytes
    assert 2 * bounds(gradients=Shares(0, 0)).wire_bytes == whole.wire_bytes


def collective(scope: str, axes: tuple[str, ...], wire: int, count: int = 1) -> Collective:
    return Collective(
        "all-to-all", axes, scope, "forward", count, wire, wire, False, True, "", None, (0, 1)
    )


def test_only_moe_stages_along_the_expert_axes_are_held_against_the_bound() -> None:
    program = [
        collective("dispatch", ("expert",), 100, count=4),
        collective("experts", ("fsdp", "expert"), 10),
        collective("experts", ("fsdp",), 1000),
        collective("attention", ("expert",), 1000),
    ]
    assert moe_wire_bytes(program, ["expert"]) == 410
