"""Load configurations: layers, -1 sizes, rule tables, MaxText's files, and YAML written back."""

from __future__ import annotations

import dataclasses
import string
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_shard.config import check_against_mesh, configs_dir, expert_parallelism, load_config
from moe_shard.errors import UserError
from tests.config.helpers import check_message, load, says


def test_order_of_layers(tmp_path: Path) -> None:
    assert load(tmp_path).train.steps == 1000
    assert load(tmp_path, extra="steps: 20").train.steps == 20
    assert load(tmp_path, "steps=1", "steps=3", extra="steps: 20").train.steps == 3


def test_values_as_people_write_them(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "learning_rate=1e-5",
        "adam_eps='1e-7'",
        "run_name=12",
        "dataset_path=a.txt",
        "mlp_activations=[gelu,linear]",
        "dump_hlo=True",
        "per_device_batch_size=2",
        extra="rope_max_timescale: 1_000_000\nmax_num_checkpoints_to_keep: None\n",
    )
    assert config.train.learning_rate == 1e-5
    assert config.train.adam_eps == 1e-7
    assert config.run.run_name == "12"
    assert config.data.dataset_path == ("a.txt",)
    assert config.model.gating.activation == "gelu"
    assert config.train.dump_hlo
    assert config.train.per_device_batch_size == 2.0
    assert config.model.attention.rope.rope_max_timescale == 1e6
    assert config.train.max_num_checkpoints_to_keep == -1
    assert load(tmp_path, "dataset_path=").data.dataset_path == ()
    assert load(tmp_path, "dataset_path=[a, b]").data.dataset_path == ("a", "b")


def test_derived_values(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert config.model.attention.head_dim == 16
    assert config.model.moe is not None
    assert config.model.moe.moe_mlp_dim == config.model.mlp_dim == 128
    assert (config.run.model_name, config.run.run_name) == ("small", "small")
    assert config.train.schedule_steps == config.train.steps
    assert load(tmp_path, "gradient_accumulation_steps=3").train.global_batch_rows(8) == 24
    assert load(tmp_path, "per_device_batch_size=0.5").train.global_batch_rows(8) == 4


def test_default_minus_one_takes_what_is_left(tmp_path: Path) -> None:
    mesh = load(tmp_path, "ici_expert_parallelism=4").mesh
    assert mesh.resolve(8)["fsdp"] == 2
    assert list(mesh.resolve(8)) == list(mesh.mesh_axes)
    ici, dcn = mesh.resolve_levels(16, num_slices=2)
    assert (ici["fsdp"], ici["expert"], dcn["data"]) == (2, 4, 2)
    assert mesh.resolve(16, num_slices=2)["data"] == 2


@pytest.mark.parametrize("where", ["file", "arguments"])
def test_own_minus_one_takes_over_from_the_default_one(tmp_path: Path, where: str) -> None:
    if where == "file":
        config = load(tmp_path, extra="ici_expert_parallelism: -1\ndcn_fsdp_parallelism: -1\n")
    else:
        config = load(tmp_path, "ici_expert_parallelism=-1", "dcn_fsdp_parallelism=-1")
    assert config.mesh.resolve(8)["expert"] == 8
    assert config.mesh.resolve(8)["fsdp"] == 1
    assert config.mesh.resolve(16, num_slices=2)["fsdp"] == 2


def test_own_minus_one_on_the_default_axis_stays(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, "ici_expert_parallelism=-1", extra="ici_fsdp_parallelism: -1\n")
    says(check_message(caught.value), "ici_fsdp_parallelism=-1 and ici_expert_parallelism=-1")


def test_rows_replace_those_of_their_logical_axis(tmp_path: Path) -> None:
    default = load(tmp_path).mesh.logical_axis_rules
    mesh = load(tmp_path, extra="logical_axis_rules: [[embed, fsdp], [extra, null]]\n").mesh
    assert [row for row in mesh.logical_axis_rules if row[0] == "embed"] == [("embed", ("fsdp",))]
    assert mesh.logical_axis_rules[-2:] == (("embed", ("fsdp",)), ("extra", ()))
    assert len(mesh.logical_axis_rules) == len(
        default
    )  # one rule replaces the two of embed, and one is new
    assert mesh.axes_of("activation_exp") == ("expert",)
    assert mesh.axes_of("nobody") == ()


def test_rows_can_be_the_whole_table(tmp_path: Path) -> None:
    extra = "logical_axis_rules: [[exp, [expert]]]\noverride_logical_axis_rules: true\n"
    assert load(tmp_path, extra=extra).mesh.logical_axis_rules == (("exp", ("expert",)),)
    more = load(
        tmp_path, "logical_axis_rules=[[embed,[fsdp]]]", extra=extra
    ).mesh.logical_axis_rules
    assert more == (("exp", ("expert",)), ("embed", ("fsdp",)))


def test_custom_table_by_name_and_by_path(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "custom_mesh_and_rule=context-as-expert",
        "ici_context_parallelism=2",
        "ici_expert_parallelism=4",
    )
    sizes = config.mesh.resolve(8)
    assert expert_parallelism(config, sizes) == 8
    assert check_against_mesh(config, sizes) == ()
    table = tmp_path / "table.yml"
    table.write_text("mesh_axes: [expert]\nlogical_axis_rules: [[exp, expert]]\n")
    config = load(tmp_path, f"custom_mesh_and_rule={table}", "ici_expert_parallelism=-1")
    assert config.mesh.logical_axis_rules == (("exp", ("expert",)),)
    assert config.mesh.resolve(4)["expert"] == 4


def test_custom_table_with_a_foreign_axis(tmp_path: Path) -> None:
    table = tmp_path / "table.yml"
    table.write_text("mesh_axes: [data, rack]\nlogical_axis_rules: [[layers, rack]]\n")
    with pytest.raises(UserError) as caught:
        load(tmp_path, f"custom_mesh_and_rule={table}")
    says(check_message(caught.value), "table.yml", "rack", "data, fsdp")
    table.write_text("logical_axis_rules: [[layers, rack]]\n")
    with pytest.raises(UserError) as caught:
        load(tmp_path, f"custom_mesh_and_rule={table}")
    says(check_message(caught.value), "[layers, [rack]]", "'rack'")
    table.write_text("mesh_axes: [data]\n")
    with pytest.raises(UserError) as caught:
        load(tmp_path, f"custom_mesh_and_rule={table}")
    says(check_message(caught.value), "no logical_axis_rules")


def test_what_would_be_passed_over_in_silence_is_noted(tmp_path: Path) -> None:
    config = load(
        tmp_path, "sliding_window_size=8", "max_position_embeddings=16", "max_target_length=32"
    )
    window, length = check_against_mesh(config, config.mesh.resolve(8))[:2]
    says(window, "sliding_window_size=8 has no effect", "no layer of attention_pattern is sliding")
    says(length, "max_target_length=32", "max_position_embeddings=16")


SAMPLES = Path(__file__).parent / "samples"


def test_deepseek_of_maxtext() -> None:
    config = load_config(str(SAMPLES / "deepseek2-16b.yml"))
    assert config.not_built == ()
    model = config.model
    assert model.moe is not None
    attention = model.attention
    assert attention.attention_type == "mla"
    assert (attention.kv_lora_rank, attention.q_lora_rank, attention.turned_dim) == (512, 0, 64)
    assert (attention.rope.rope_type, attention.rope.mscale, attention.rope.rope_interleave) == (
        "yarn",
        0.707,
        True,
    )
    assert [kind.moe for kind in model.layer_kinds] == [False] + [True] * 26
    assert (model.moe.shared_dim, model.moe.router.norm_topk_prob) == (2 * 1408, False)


def test_gpt_oss_of_maxtext() -> None:
    config = load_config(str(SAMPLES / "gpt-oss-20b.yml"))
    assert config.not_built == ()
    model = config.model
    assert model.moe is not None
    assert [kind.span for kind in model.layer_kinds[:3]] == ["sliding", "global", "sliding"]
    attention = model.attention
    assert attention.attention_bias
    assert attention.attention_out_bias
    assert attention.attention_sink
    assert (model.moe.router.router_bias, model.moe.router.routed_bias) == (True, False)
    gating = model.gating
    assert (
        gating.activation,
        gating.mlp_activations_limit,
        gating.mlp_linear_offset,
        gating.mlp_bias,
    ) == (
        "quick_gelu",
        7.0,
        1.0,
        True,
    )


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["num_experts=1", "num_experts_per_tok=1"],
        ["custom_mesh_and_rule=context-as-expert", "ici_context_parallelism=2"],
        ["ici_expert_parallelism=-1", "dataset_path=[a,b]", "learning_rate=1e-5"],
        ["attention_type=mla", "shared_experts=2", "compress_ratios=[0,4]"],
        [
            "dense_layers=[1]",
            "rope_type=yarn",
            "attention_pattern=[sliding,global]",
            "sliding_window_size=8",
            "n_routing_groups=2",
            "topk_routing_group=1",
        ],
    ],
)
def test_round_trip(tmp_path: Path, overrides: list[str]) -> None:
    config = load(tmp_path, *overrides)
    written = tmp_path / "config.yml"
    written.write_text(config.to_yaml(), encoding="utf-8")
    again = load_config(str(written))
    assert dataclasses.replace(again, warnings=()) == dataclasses.replace(config, warnings=())
    assert again.as_flat_dict() == config.as_flat_dict() == yaml.safe_load(config.to_yaml())


def test_a_rule_of_no_logical_axis_of_the_package_is_a_warning(tmp_path: Path) -> None:
    known = load(tmp_path, "logical_axis_rules=[[vocab,[fsdp]]]")
    assert known.warnings == ()
    config = load(tmp_path, "logical_axis_rules=[[vocb,[fsdp]],[zzz,[]]]")
    assert config.warnings == (
        "command line: rules of logical axes that this package does not have: "
        "vocb (did you mean vocab?), zzz",
    )
    assert ("vocb", ("fsdp",)) in config.mesh.logical_axis_rules


def test_flag_that_changes_nothing_is_said(tmp_path: Path) -> None:
    flag = "moe_dispatch_no_expert_sharding=true"

    def notes(*overrides: str) -> tuple[str, ...]:
        config = load(tmp_path, flag, *overrides)
        return config.warnings + check_against_mesh(config, config.mesh.resolve(8))

    assert notes("ici_expert_parallelism=8") == ()
    assert notes() == (
        f"{flag} has no effect: the axes in the rule of activation_exp (expert) have size 1",
    )
    dense = notes("num_experts=1", "num_experts_per_tok=1")
    assert dense == (f"{flag} has no effect: num_experts=1, a dense model",)
    same = notes(
        "ici_expert_parallelism=8",
        "logical_axis_rules=[[activation_batch_no_exp,[data,fsdp,fsdp_transpose,expert]]]",
    )
    says(same[0], "activation_batch_moe and activation_batch_no_exp are the same")
    ragged = notes("ici_expert_parallelism=8", "moe_dispatch=ragged", "capacity_factor=-1")
    assert ragged == (f"{flag} has no effect: moe_dispatch=ragged moves tokens in any case",)


def test_keys_of_another_strategy_are_said(tmp_path: Path) -> None:
    def notes(*overrides: str) -> tuple[str, ...]:
        config = load(tmp_path, "moe_dispatch_no_expert_sharding=false", *overrides)
        return config.warnings + check_against_mesh(config, config.mesh.resolve(8))

    assert notes("moe_dispatch=ragged", "capacity_factor=1") == (
        "capacity_factor=1.0 has no effect: moe_dispatch=ragged does not read it",
    )
    assert notes("ragged_buffer_factor=1.5", "grouped_product=blocked") == (
        "ragged_buffer_factor=1.5 has no effect: moe_dispatch=gather does not read it",
        "grouped_product=blocked has no effect: moe_dispatch=gather does not read it",
    )
    assert notes("moe_dispatch=ragged", "capacity_factor=-1", "ragged_buffer_factor=1.5") == ()


BASE_KEYS = sorted(yaml.safe_load((configs_dir() / "base.yml").read_text(encoding="utf-8")))
KEYS = st.one_of(
    st.sampled_from(BASE_KEYS),
    st.sampled_from(["shared_experts", "opt_type", "enable_dropout", "ici_pipeline_parallelism"]),
    st.text(string.ascii_letters + string.digits + "_- \n", max_size=12),
)
VALUES = st.one_of(
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(
        ["", "true", "None", "null", "[]", "{}", "[[a, b]]", "[1", "&a [*a]", "1:30", "2020-01-01"]
    ),
    st.lists(st.sampled_from(["silu", "linear", "fsdp", "exp", "1"]), max_size=3).map(str),
    st.text(max_size=12),
)


@settings(max_examples=150)
@given(st.lists(st.tuples(KEYS, VALUES), min_size=1, max_size=3))
def test_any_arguments_give_a_config_or_a_user_error(pairs: list[tuple[str, str]]) -> None:
    try:
        config = load_config("mixtral-tiny", [f"{key}={value}" for key, value in pairs])
        check_against_mesh(config, config.mesh.resolve(8))
        yaml.safe_load(config.to_yaml())
    except UserError as error:
        check_message(error)
