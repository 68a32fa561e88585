"""Check that every wrong configuration gives a short message with the keys and a fix."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from moe_shard.config import check_against_mesh, load_config
from moe_shard.errors import EXIT_USAGE, UserError, run_command
from tests.config.helpers import check_message, error_of, load, says, write_model


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("num_expert=4", ["unknown key num_expert", "did you mean num_experts?"]),
        ("emb_dim=4", ["emb_dim=4", "fix: base_emb_dim"]),
        ("sliding_window_siz=4", ["unknown key", "sliding_window_size"]),
        ("qqqqqqqq=4", ["unknown key qqqqqqqq", "configs/base.yml"]),
        ("steps", ["steps is not key=value"]),
        ("=5", ["is not key=value"]),
        ("steps=", ["steps=", "is not a whole number"]),
        ("steps=ten", ["steps=ten is not a whole number", "steps=1000"]),
        ("steps=1.5", ["steps=1.5 is not a whole number"]),
        ("steps=true", ["steps=true is not a whole number"]),
        ("steps=null", ["steps=null is not a whole number"]),
        ("steps=[1", ["command line: steps=[1", "expected"]),
        ("steps=99999999999999999999", ["is larger than any number here"]),
        ("learning_rate=fast", ["learning_rate=fast is not a number"]),
        ("learning_rate=.nan", ["learning_rate=nan is out of range"]),
        ("learning_rate=-1", ["learning_rate=-1.0 is out of range", "at least 0"]),
        ("dump_hlo=tru", ["dump_hlo=tru is not true or false", "dump_hlo=false"]),
        ("dump_hlo=1", ["dump_hlo=1 is not true or false"]),
        ("mlp_activations=silu", ["mlp_activations=silu is not a list"]),
        ("mlp_activations=[swish,linear]", ["[swish, linear] is not a known pair", "silu"]),
        ("mlp_activations=[sigmoid,linear]", ["[sigmoid, linear] is not a known pair"]),
        ("dtype=float8", ["dtype=float8", "bfloat16, float16, float32"]),
        ("weight_dtype=int8", ["weight_dtype=int8", "bfloat16, float16, float32"]),
        ("remat_policy=most", ["remat_policy=most", "none, dots, full, save_exchanged"]),
        ("moe_dispatch=sort", ["moe_dispatch=sort", "einsum, gather"]),
        ("ragged_transport=tcp", ["ragged_transport=tcp", "auto, ragged, padded"]),
        ("grouped_product=gmm", ["grouped_product=gmm", "ragged_dot, tokamax, pallas, blocked"]),
        ("optimizer=adam", ["optimizer=adam", "adamw, sgd"]),
        ("load_balance_loss_type=x", ["loss_type=x", "maxtext, sequence, gshard, huggingface"]),
        ("rule_conflicts=maybe", ["rule_conflicts=maybe", "warn, error"]),
        ("num_experts_per_tok=9", ["num_experts_per_tok=9", "num_experts=8", "from 1 to 8"]),
        ("num_experts=0", ["num_experts=0 is out of range", "at least 1"]),
        ("num_experts=1", ["num_experts_per_tok=2", "num_experts=1"]),
        ("base_num_kv_heads=3", ["base_num_query_heads=4", "base_num_kv_heads=3", "[1, 2, 4]"]),
        ("base_emb_dim=66", ["head_dim=-1", "66 / 4", "head_dim=128"]),
        ("head_dim=7", ["head_dim=7 is odd", "head_dim=8"]),
        ("decode_sampling_strategy=beam", ["decode_sampling_strategy=beam", "greedy, weighted"]),
        ("decode_sampling_strategy=nucleus", ["nucleus", "decode_sampling_nucleus_p=0.9"]),
        ("decode_sampling_strategy=topk", ["topk", "decode_sampling_top_k=40"]),
        ("decode_sampling_nucleus_p=1.5", ["nucleus_p=1.5 is out of range", "at most 1, or -1"]),
        ("decode_sampling_temperature=0", ["temperature=0.0 is out of range", "above 0"]),
        ("max_new_tokens=0", ["max_new_tokens=0 is out of range", "at least 1"]),
        ("run_name=a/b", ["run_name=a/b", "not the name of a directory"]),
        ("base_output_directory=s3://b/x", ["Amazon S3", "gs://BUCKET/PATH, or a folder"]),
        ("load_parameters_path=gs://b/0/items", ["gs://b/0/items is an address"]),
        ("ici_data_parallelism=0", ["ici_data_parallelism=0", "at least 1, or -1"]),
        ("force_load_balance=1", ["force_load_balance=1 is not true or false"]),
        ("num_moe_token_chunks=0", ["num_moe_token_chunks=0 is out of range", "at least 1"]),
        ("ragged_buffer_factor=0", ["ragged_buffer_factor=0.0 is out of range", "or -1"]),
        (
            "ici_pipeline_parallelism=2",
            ["ici_pipeline_parallelism=2 asks for pipeline parallelism"],
        ),
        ("custom_mesh_and_rule=pure-fsd", ["custom_mesh_and_rule pure-fsd", "pure-fsdp"]),
        ("logical_axis_rules=[[exp,[experts]]]", ["[exp, [experts]]", "'experts'", "expert"]),
        ("logical_axis_rules=[[exp,[expert,expert]]]", ["[exp, [expert, expert]]", "twice"]),
        ("logical_axis_rules=[exp]", ["rule exp of logical_axis_rules is not [name, [mesh axes]]"]),
        ("logical_axis_rules=[exp,[fsdp]]", ["rule exp of", "fix: logical_axis_rules is a list"]),
        (
            "logical_axis_rules=[[exp,[fsdp]]",
            ["expected ','", "fix: logical_axis_rules=[[norm, []]]"],
        ),
        ("logical_axis_rules=exp", ["is not a list", "fix: logical_axis_rules=[[norm, []]]"]),
        ("logical_axis_rules=[[exp,[[a]]]]", ["is not [name, [mesh axes]]"]),
        ("mesh_axes=[data,stage]", ["mesh_axes names stage", "data, fsdp"]),
        ("mesh_axes=[data,data]", ["mesh_axes=[data, data] names an axis twice"]),
    ],
)
def test_wrong_argument(tmp_path: Path, override: str, parts: list[str]) -> None:
    says(error_of(write_model(tmp_path), [override]), *parts)


@pytest.mark.parametrize("other", ["use_qk_norm", "clip_qkv", "temperature_tuning"])
def test_mla_has_no_weights_for_what_is_asked_of_queries_and_keys(
    tmp_path: Path, other: str
) -> None:
    on = "8" if other == "clip_qkv" else "true"
    message = error_of(write_model(tmp_path), ["attention_type=mla", f"{other}={on}"])
    says(message, f"attention_type=mla with {other}", "attention_type=global")


def test_two_free_axes(tmp_path: Path) -> None:
    message = error_of(
        write_model(tmp_path), ["ici_expert_parallelism=-1", "ici_data_parallelism=-1"]
    )
    says(message, "ici_data_parallelism=-1 and ici_expert_parallelism=-1", "fix: give")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("steps: 1\nsteps: 2\n", ["line 2", "steps stands twice"]),
        ("steps: [1\n", ["small.yml", "line"]),
        ("- steps\n", ["small.yml", "not a mapping"]),
        ("", ["not a mapping"]),
        ("5: 6\n", ["not a mapping"]),
        ("steps: &a [*a]\n", ["line 1", "aliases such as *a are not read"]),
        ("steps: !!python/object/apply:os.getcwd []\n", ["small.yml", "could not determine"]),
        ("step: 5\n", ["small.yml: unknown key step", "did you mean steps?"]),
        ("run_name: 12\n", ["small.yml: run_name=12 is not text"]),
        ('dtype: "a\\nb"\n', ["dtype=a b"]),
        ("opt_type: sgd\noptimizer: sgd\n", ["opt_type and optimizer are two names"]),
    ],
)
def test_wrong_file(tmp_path: Path, text: str, parts: list[str]) -> None:
    says(error_of(write_model(tmp_path, text=text)), *parts)


def test_paths_that_are_no_model(tmp_path: Path) -> None:
    says(error_of(str(tmp_path / "none.yml")), "none.yml", "No such file")
    says(error_of(f"{tmp_path}/"), "Is a directory")
    binary = tmp_path / "binary.yml"
    binary.write_bytes(b"\xff\xfe\x00")
    says(error_of(str(binary)), "not a text file")
    says(error_of("steps=5"), "MODEL comes first")
    says(error_of("mixtral-tiny.yml"), "No such file")


@pytest.mark.parametrize(
    ("devices", "slices", "overrides", "parts"),
    [
        (
            8,
            1,
            ["ici_expert_parallelism=3"],
            ["ici_fsdp_parallelism=-1, ici_expert_parallelism=3", "8 devices", "parallelism=2"],
        ),
        (
            8,
            1,
            ["ici_fsdp_parallelism=4", "ici_expert_parallelism=4"],
            ["ici_fsdp_parallelism=4", "ici_expert_parallelism=4", "multiply to 16", "8 devices"],
        ),
        (8, 1, ["ici_fsdp_parallelism=1"], ["multiply to 1", "fix: ici_fsdp_parallelism=8"]),
        (8, 1, ["dcn_data_parallelism=2"], ["dcn_data_parallelism=2", "1 slice\n"]),
        (8, 3, [], ["8 devices do not split into 3 equal slices"]),
        (16, 2, ["dcn_data_parallelism=4"], ["dcn_data_parallelism=4", "2 slices", "=2"]),
    ],
)
def test_sizes_that_are_not_the_devices(
    tmp_path: Path, devices: int, slices: int, overrides: list[str], parts: list[str]
) -> None:
    mesh = load(tmp_path, *overrides).mesh
    with pytest.raises(UserError) as caught:
        mesh.resolve(devices, slices)
    says(check_message(caught.value), *parts)


@pytest.mark.parametrize(
    ("devices", "overrides", "parts"),
    [
        (
            3,
            ["ici_expert_parallelism=3"],
            ["num_experts=8", "3 equal parts", "expert=3", "1, 2, 4, 8"],
        ),
        (
            # The axes that split the experts are those of the rule, whatever their names.
            6,
            [
                "logical_axis_rules=[[activation_exp,[context,tensor]]]",
                "ici_context_parallelism=2",
                "ici_tensor_parallelism=3",
            ],
            ["num_experts=8", "context=2 * tensor=3"],
        ),
        (
            8,
            ["per_device_batch_size=0.5"],
            ["per_device_batch_size=0.5", "4 sequences", "fsdp=8", "per_device_batch_size=1"],
        ),
        (
            8,
            ["per_device_batch_size=0.3"],
            ["per_device_batch_size=0.3", "2.4 sequences", "per_device_batch_size=0.25"],
        ),
    ],
)
def test_experts_and_batch_against_the_mesh(
    tmp_path: Path, devices: int, overrides: list[str], parts: list[str]
) -> None:
    config = load(tmp_path, *overrides)
    with pytest.raises(UserError) as caught:
        check_against_mesh(config, config.mesh.resolve(devices))
    says(check_message(caught.value), *parts)


def test_a_size_for_an_axis_that_is_left_out(tmp_path: Path) -> None:
    message = error_of(
        write_model(tmp_path), ["custom_mesh_and_rule=pure-fsdp", "ici_expert_parallelism=8"]
    )
    says(message, "ici_expert_parallelism=8", "pure-fsdp.yml", "ici_expert_parallelism=1")


def test_a_command_prints_the_message_and_leaves_with_two(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def main() -> int:
        load_config("mixtral-tiny", ["num_expert=4"])
        return 0

    with pytest.raises(SystemExit) as left:
        run_command(main)
    assert left.value.code == EXIT_USAGE
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: command line: unknown key num_expert\nfix:")
    assert sys.exc_info() == (None, None, None)


@pytest.mark.parametrize(
    "key", ["vocab_size", "max_target_length", "steps", "log_period", "min_capacity"]
)
def test_a_number_that_no_program_counts_to_is_out_of_range(key: str) -> None:
    with pytest.raises(UserError, match=f"{key}=1000000000000 is out of range") as caught:
        load_config("mixtral-tiny", [f"{key}=1000000000000"])
    assert "at most" in str(caught.value)
