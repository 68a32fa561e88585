"""Read MaxText's form of a command: base.yml, a model's name, rule tables in folders."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import yaml

from moe_shard.config import check_against_mesh, configs_dir, load_config
from moe_shard.config.load import maxtext_keys
from moe_shard.errors import UserError
from tests.config.helpers import check_message, says
from tests.config.maxtext_files import SMALL, moe_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write base.yml, models/ and custom_mesh_and_rule/ in MaxText's layout."""
    keys = maxtext_keys()
    table = [
        ["embed_attn", ["fsdp"]], ["exp", "expert"], ["activation_exp", ["expert", "diloco"]],
        ["activation_batch_moe", ["data", "fsdp", "expert"]], ["embed", ["fsdp"]],
        ["activation_batch", ["data", "fsdp", "expert"]], ["layers", "stage"],
    ]  # fmt: skip
    base = {key: value for key, value in keys.defaults.items() if key not in keys.refused}
    del base["cosine_learning_rate_final_fraction"]  # of older releases
    base |= {"logical_axis_rules": table, "base_config": None}
    (tmp_path / "base.yml").write_text(yaml.safe_dump(base), encoding="utf-8")
    (tmp_path / "models").mkdir()
    model = SMALL + "decoder_block: mixtral\nnormalization_layer_epsilon: 1e-6\n"
    (tmp_path / "models" / "mixtral-small.yml").write_text(model, encoding="utf-8")
    (tmp_path / "custom_mesh_and_rule").mkdir()
    rules = """
mesh_axes: [data, stage, fsdp, tensor_transpose, expert]
data_sharding: [[data, stage, fsdp, expert]]
logical_axis_rules: [[exp, [expert]], [activation_exp, expert], [activation_kv, context],
  [activation_batch_moe, [data, stage, fsdp, expert]], [activation_batch, [data, fsdp, expert]],
  [embed, [fsdp, tensor_transpose, sequence]]]
"""
    (tmp_path / "custom_mesh_and_rule" / "pure-fsdp.yml").write_text(rules, encoding="utf-8")
    return tmp_path


def test_base_yml_and_a_models_name(folder: Path) -> None:
    command = str(folder / "base.yml"), ["model_name=mixtral-small", "steps=5", "vocab_size=99"]
    config = load_config(*command)
    moe = moe_of(config)
    assert (config.run.model_name, config.run.run_name) == ("mixtral-small", "mixtral-small")
    assert (moe.num_experts, config.model.emb_dim, config.model.vocab_size) == (8, 64, 99)
    assert (config.model.normalization_layer_epsilon, config.train.steps) == (1e-6, 5)
    assert config.model.attention.attention_scale == 1
    notes = "\n".join(config.warnings)
    says(notes, "over what models/mixtral-small.yml says", "override_model_config=true", "vocab")
    command[1].append("override_model_config=true")
    assert "over what" not in "\n".join(load_config(*command).warnings)
    # The file's table replaces the default; a logical axis without a rule is not sharded.
    assert config.mesh.axes_of("embed") == ("fsdp",)
    assert config.mesh.axes_of("activation_exp") == ("expert",)
    assert config.mesh.axes_of("mlp") == config.mesh.axes_of("layers") == ()
    assert config.mesh.axes_of("activation_batch_no_exp") == ("data", "fsdp")
    names = [name for name, _ in config.mesh.logical_axis_rules]
    assert names.index("activation_batch_no_exp") == names.index("activation_batch_moe") + 1
    says(notes, "no rule, so not sharded, as in MaxText", "stage")


def test_base_yml_alone_is_llama_2(folder: Path) -> None:
    config = load_config(str(folder / "base.yml"), ["steps=0"])
    assert config.model.moe is None
    assert (config.model.num_decoder_layers, config.model.emb_dim) == (16, 2048)


def test_a_models_name_that_is_not_there(folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_config(str(folder / "base.yml"), ["model_name=mixtral-smal"])
    says(check_message(caught.value), "model_name=mixtral-smal", "did you mean mixtral-small")


def test_a_file_that_inherits(folder: Path) -> None:
    child = folder / "models" / "child.yml"
    child.write_text("base_config: mixtral-small.yml\nnum_experts: 4\n", encoding="utf-8")
    config = load_config(str(child))
    assert (moe_of(config).num_experts, config.model.emb_dim) == (4, 64)
    child.write_text("base_config: base.yml\nnum_experts: 4\n", encoding="utf-8")
    assert load_config(str(child)).model.emb_dim == 2048
    child.write_text("base_config: child.yml\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_config(str(child))
    says(check_message(caught.value), "base_config=child.yml")
    child.write_text("base_config: nowhere.yml\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_config(str(child))
    says(check_message(caught.value), "base_config=nowhere.yml is not beside it")


def test_a_run_in_a_file_of_its_own(folder: Path) -> None:
    run = folder / "gpu" / "models" / "run.yml"
    run.parent.mkdir(parents=True)
    said = "base_config: base.yml\nmodel_name: mixtral-small\nsteps: 7\nvocab_size: 5\n"
    run.write_text(said + "max_segments_per_seq: 32\nprofiler: nsys\nreuse_example_batch: 1\n")
    with pytest.raises(UserError) as caught:
        load_config(str(run))
    says(check_message(caught.value), "run.yml: max_segments_per_seq=32")
    config = load_config(str(run), ["max_segments_per_seq=-1"])
    assert (config.train.steps, config.model.vocab_size) == (7, 320)
    notes = "\n".join(config.warnings)
    says(notes, "models/mixtral-small.yml wins over run.yml, as in MaxText: not vocab_size=5")


def test_a_rule_table_of_theirs(folder: Path) -> None:
    config = load_config(
        str(folder / "base.yml"),
        ["model_name=mixtral-small", "custom_mesh_and_rule=pure-fsdp", "ici_expert_parallelism=2"],
    )
    assert config.mesh.axes_of("embed") == ("fsdp",)
    assert config.mesh.axes_of("activation_batch_moe") == ("data", "fsdp", "expert")
    assert config.mesh.axes_of("activation_batch_no_exp") == ("data", "fsdp")
    assert config.mesh.resolve(8)["fsdp"] == 4
    notes = "\n".join(config.warnings)
    says(notes, "read as size 1: stage, tensor_transpose, sequence", "data_sharding")
    # The same for a model of this package, by path.
    table = str(folder / "custom_mesh_and_rule" / "pure-fsdp.yml")
    ours = load_config("mixtral-tiny", [f"custom_mesh_and_rule={table}"])
    assert ours.mesh.logical_axis_rules == config.mesh.logical_axis_rules
    check_against_mesh(ours, ours.mesh.resolve(8))


def test_a_table_that_ragged_cannot_serve(folder: Path) -> None:
    rules = folder / "custom_mesh_and_rule" / "whole.yml"
    table = "[[exp, expert], [activation_exp, expert], [activation_batch_moe, [data, fsdp]]]"
    rules.write_text(f"data_sharding: [[fsdp]]\nlogical_axis_rules: {table}\n", encoding="utf-8")
    command = ["model_name=mixtral-small", "custom_mesh_and_rule=whole"]
    split = [*command, "ici_expert_parallelism=2"]
    base = str(folder / "base.yml")
    config = load_config(base, split)
    assert (moe_of(config).moe_dispatch, moe_of(config).capacity_factor) == ("gather", -1)
    says(config.warnings[-1], "moe_dispatch=gather instead", "no token is on one device of expert")
    assert moe_of(load_config(base, command)).moe_dispatch == "ragged"
    assert moe_of(load_config(base, [*split, "moe_dispatch=ragged"])).moe_dispatch == "ragged"
    rules.write_text(rules.read_text(encoding="utf-8").replace("[exp, expert]", "[exp, fsdp]"))
    says(load_config(base, split).warnings[-1], "moe_dispatch=gather instead")


def test_our_base_yml_and_a_models_name(tmp_path: Path) -> None:
    base = configs_dir() / "base.yml"
    config = load_config(str(base), ["model_name=mixtral-tiny", "steps=3"])
    assert dataclasses.replace(config) == load_config("mixtral-tiny", ["steps=3"])
    copy = tmp_path / "base.yml"
    shutil.copy(base, copy)
    assert load_config(str(copy), ["model_name=mixtral-tiny", "steps=3"]) == config
    with pytest.raises(UserError) as caught:
        load_config(str(base), ["model_name=mixtral-tin"])
    says(check_message(caught.value), "model_name mixtral-tin", "mixtral-tiny")
