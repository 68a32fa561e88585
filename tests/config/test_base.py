"""Check that base.yml is complete, documented, and has exactly the keys of the dataclasses."""

from __future__ import annotations

import dataclasses
import re

import pytest
import yaml

from moe_shard.config import configs_dir, list_models, load_config
from moe_shard.config.attention_config import AttentionConfig, RopeConfig
from moe_shard.config.delta_config import DeltaConfig
from moe_shard.config.eval_config import EvalConfig
from moe_shard.config.generate_config import GenerateConfig
from moe_shard.config.keys import leaf_keys, to_plain
from moe_shard.config.load import LOADER_KEYS, maxtext_keys
from moe_shard.config.local_config import LocalConfig
from moe_shard.config.lora_config import LoraConfig
from moe_shard.config.mamba_config import MambaConfig, ShortConvConfig
from moe_shard.config.mesh_config import LEVELS, MESH_AXES, MeshConfig, parallelism_key
from moe_shard.config.model_config import GatingConfig, ModelConfig
from moe_shard.config.moe_config import MoEConfig, RouterConfig
from moe_shard.config.mtp_config import MTPConfig
from moe_shard.config.remat_config import RematConfig
from moe_shard.config.schema import DataConfig, RunConfig, TrainConfig
from moe_shard.errors import UserError
from tests.config.helpers import says

BASE_TEXT = (configs_dir() / "base.yml").read_text(encoding="utf-8")
BASE = yaml.safe_load(BASE_TEXT)
SCHEMAS = (
    RunConfig,
    ModelConfig,
    RematConfig,
    GatingConfig,
    AttentionConfig,
    RopeConfig,
    DeltaConfig,
    MambaConfig,
    ShortConvConfig,
    MoEConfig,
    RouterConfig,
    MTPConfig,
    LoraConfig,
    MeshConfig,
    TrainConfig,
    DataConfig,
    EvalConfig,
    LocalConfig,
    GenerateConfig,
)


def test_every_leaf_is_a_key_of_base_and_every_key_is_read() -> None:
    leaves = {key.name for schema in SCHEMAS for key in leaf_keys(schema).values()}
    sizes = {parallelism_key(level, axis) for level in LEVELS for axis in MESH_AXES}
    assert leaves | sizes | set(LOADER_KEYS) == set(BASE)


NAMED_BY_THE_RUN = {"run_name", "model_name"}


def test_defaults_of_the_dataclasses_are_those_of_base() -> None:
    checked = set()
    for schema in SCHEMAS:
        fields = {field.name: field for field in dataclasses.fields(schema)}
        for attribute, key in leaf_keys(schema).items():
            assert key.name in (attribute, f"base_{attribute}")
            if key.name in NAMED_BY_THE_RUN:
                continue
            default = fields[attribute].default
            assert to_plain(default) == BASE[key.name], key.name
            assert type(to_plain(default)) is type(BASE[key.name]), key.name
            checked.add(key.name)
    mesh = MeshConfig()
    for level in LEVELS:
        for axis, size in mesh.level_sizes(level).items():
            assert size == BASE[parallelism_key(level, axis)]
            checked.add(parallelism_key(level, axis))
    assert checked | NAMED_BY_THE_RUN | set(LOADER_KEYS) == set(BASE)


@pytest.mark.parametrize("key", BASE)
def test_every_key_has_a_comment(key: str) -> None:
    line = next(line for line in BASE_TEXT.splitlines() if line.startswith(f"{key}:"))
    comment = line.partition("  # ")[2]
    assert comment, f"{key} has no comment"
    if key != "logical_axis_rules":
        assert len(comment.split()) >= 1
    assert len(line) <= 100


def test_every_rule_row_has_a_comment() -> None:
    rows = [line for line in BASE_TEXT.splitlines() if line.startswith("  - [")]
    assert len(rows) == len(BASE["logical_axis_rules"])
    assert all("  # " in row for row in rows)


def test_the_batch_row_stands_before_the_expert_row() -> None:
    names = [row[0] for row in BASE["logical_axis_rules"]]
    assert names.index("activation_batch_moe") < names.index("activation_exp")


def test_choices_of_base_comments_are_those_of_the_schema() -> None:
    for schema in SCHEMAS:
        for key in leaf_keys(schema).values():
            if key.choices:
                # A comment may go on below.
                line = re.search(rf"^{key.name}:.*(\n#.*)*", BASE_TEXT, re.MULTILINE)
                assert line is not None
                says(line[0].replace("\n#", ""), " | ".join(key.choices))


@pytest.mark.parametrize("model", ["mixtral-8x7b", "mixtral-8x22b", "mixtral-tiny"])
def test_models_of_this_project(model: str) -> None:
    config = load_config(model)
    assert config.warnings == ()
    assert config.not_built == ()
    config.require_built()
    assert config.model.moe is not None
    assert config.model.moe.moe_dispatch_no_expert_sharding
    assert config.run.run_name == model
    opening = (configs_dir() / "models" / f"{model}.yml").read_text(encoding="utf-8")
    assert opening.startswith("# Run:")
    says(opening, "# Shows:", "# Source:", model)
    assert model in list_models()


def test_the_tiny_model_fits_eight_devices() -> None:
    config = load_config("mixtral-tiny")
    sizes = config.mesh.resolve(config.mesh.num_simulated_devices)
    assert sizes["expert"] == 8
    assert config.train.global_batch_rows(8) == 32
    assert config.model.attention.head_dim == 32


@pytest.mark.parametrize("rules", ["pure-fsdp", "context-as-expert"])
def test_rule_tables_cover_what_the_default_one_covers(rules: str) -> None:
    table = yaml.safe_load((configs_dir() / "rules" / f"{rules}.yml").read_text(encoding="utf-8"))
    default = {row[0] for row in BASE["logical_axis_rules"]}
    assert {row[0] for row in table["logical_axis_rules"]} == default


def test_maxtext_key_names() -> None:
    names = set(maxtext_keys().defaults)
    assert {"enable_dropout", "capacity_factor", "sparse_matmul"} <= names
    assert "moe_dispatch" not in names


def test_unknown_model() -> None:
    with pytest.raises(UserError) as caught:
        load_config("mixtral-8x7")
    says(str(caught.value), "mixtral-8x7", "did you mean mixtral-8x7b")
