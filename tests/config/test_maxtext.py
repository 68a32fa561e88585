"""Load MaxText's files: their keys, their defaults, and what they request that is not supported.

The files are written here, with MaxText's keys; tests/maxtext has those of the installed package.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_shard.config import check_against_mesh, load_config
from moe_shard.config.load import base_settings, maxtext_keys
from moe_shard.config.maxtext_blocks import BLOCKS, OTHER_BLOCKS
from moe_shard.config.maxtext_model import translate_model
from moe_shard.config.maxtext_run import KEYS as RUN_KEYS
from moe_shard.errors import UserError
from tests.config.helpers import check_message, says
from tests.config.maxtext_files import MIXTRAL, SMALL, error, load, moe_of


def test_every_key_has_one_class_and_ours_are_among_those_that_are_kept() -> None:
    keys, base = maxtext_keys(), base_settings()
    classes = [
        *(keys.same, set(keys.translated), set(keys.implied)),
        *(set(keys.harmless), keys.data, set(keys.refused)),
    ]
    assert sum(map(len, classes)) == len(set().union(*classes)) == len(keys.defaults)
    assert keys.same <= set(base)
    # A key that both packages have must not be ignored or refused in a MaxText file.
    assert set(base) & set(keys.defaults) <= keys.same | set(keys.translated)
    assert all(other in keys for other in keys.implied.values() if other.isidentifier())
    assert not keys.logical_axes & {row[0] for row in base["logical_axis_rules"]}
    assert not set(keys.mesh_axes) & set(base["mesh_axes"])


class Recorded(Mapping[str, Any]):
    """Record which settings were read."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = settings
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return self._settings[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._settings)

    def __len__(self) -> int:
        return len(self._settings)


def test_what_is_called_translated_is_read_by_the_translation() -> None:
    keys, read = maxtext_keys(), set[str]()
    for block in [*BLOCKS, *OTHER_BLOCKS]:
        for tied in (True, False):
            more: dict[str, object] = {
                "num_experts": 4,
                "logits_via_embedding": tied,
                "norm_topk_prob": False,
            }
            more |= {"rope_type": "yarn" if tied else "llama3.1", "decoder_block": block}
            more |= {"scan_layers": False, "dropout_rate": 0.5}
            recorded = Recorded({**keys.defaults, **more})
            translate_model(recorded, frozenset(more), "m", is_named=False)
            read |= recorded.read
    # megablox is the kernel of the path that sparse_matmul chooses.
    assert set(keys.translated) <= read | RUN_KEYS | {"megablox"}
    assert not RUN_KEYS & read
    assert set(keys.translated) >= RUN_KEYS


def test_a_file_of_maxtexts_has_maxtexts_defaults(tmp_path: Path) -> None:
    config = load(tmp_path, "decoder_block: mixtral")
    moe, train = moe_of(config), config.train
    assert (moe.moe_dispatch, moe.capacity_factor) == ("ragged", -1)
    assert (moe.load_balance_loss_weight, moe.load_balance_loss_type) == (0, "sequence")
    assert (train.adam_decay_vectors, train.learning_rate_rule) == (True, "maxtext")
    assert (train.steps, train.per_device_batch_size) == (150_001, 12)
    assert (train.checkpoint_period, train.log_period) == (10_000, 1)
    assert config.data.dataset_type == "synthetic"
    assert config.model.remat_policy == "full"
    assert config.run.base_output_directory == "outputs"
    assert not config.not_built
    notes = "\n".join(config.warnings)
    says(notes, "small.yml is read as a MaxText file", "steps=150001", "adam_decay_vectors=true")
    says(notes, "sparse_matmul=true: moe_dispatch=ragged")
    without = {k: v for k, v in yaml.safe_load(SMALL).items() if k != "head_dim"}
    path = tmp_path / "headless.yml"
    path.write_text(yaml.safe_dump({**without, "decoder_block": "mixtral"}), encoding="utf-8")
    assert load_config(str(path)).model.attention.head_dim == 128


@pytest.mark.parametrize(("tiles", "chunks"), [(1, -1), (4, 4)])
def test_one_tile_of_the_vocabulary_leaves_the_number_to_us(
    tmp_path: Path, tiles: int, chunks: int
) -> None:
    # 1 is MaxText's default, and all logits at once: never better than what is chosen here.
    config = load(tmp_path, f"decoder_block: mixtral\nnum_vocab_tiling: {tiles}")
    assert config.train.num_vocab_tiling == chunks


def test_a_file_of_ours_keeps_our_defaults(tmp_path: Path) -> None:
    config = load(tmp_path, "steps: 3")
    assert (moe_of(config).moe_dispatch, config.data.dataset_type) == ("gather", "text")
    assert config.warnings == ()


def test_a_configuration_that_a_run_has_written_is_ours(tmp_path: Path) -> None:
    config = load(tmp_path, "decoder_block: mixtral", "steps=2")
    written = tmp_path / "config.yml"
    written.write_text(config.to_yaml(), encoding="utf-8")
    again = load_config(str(written))
    assert dataclasses.replace(again, warnings=()) == dataclasses.replace(config, warnings=())
    assert again.warnings == ()
    # Also where it names a value that only MaxText has.
    written.write_text(config.to_yaml() + "compress_ratios: [0, 4]\n", encoding="utf-8")
    assert load_config(str(written)).not_built == ("compressed attention (compress_ratios=[0, 4])",)


def test_the_runs_keys(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        """
decoder_block: mixtral
opt_type: sgd
cosine_learning_rate_final_fraction: 0.2
learning_rate_schedule_steps: 40
steps: -1
init_weights_seed: 5
remat_policy: minimal
profiler: xplane
max_num_checkpoints_to_keep: None
enable_goodput_recording: false
dataset_type: synthetic
""",
    )
    train = config.train
    assert (train.optimizer, train.learning_rate_final_fraction, train.steps) == ("sgd", 0.2, 40)
    assert (train.seed, config.data.seed) == (5, 5)
    assert (config.model.remat_policy, train.profile) == ("minimal", True)
    assert train.max_num_checkpoints_to_keep == -1
    notes = "\n".join(config.warnings)
    says(notes, "of no meaning here: enable_goodput")


REFUSED = [
    ("load_full_state_path=/x", ["load_full_state_path=/x", "load_parameters_path=PATH"]),
    ("hf_path=a/b", ["hf_path=a/b", "dataset_path=FILES"]),
    ("use_dpo=true", ["use_dpo=true asks for training on preferences or rewards"]),
    ("formatting_func_path=a.b", ["a function of its own that makes conversations"]),
    ("lora_weight_qtype=nf4", ["QLoRA"]),
    ("ici_pipeline_parallelism=2", ["pipeline parallelism", "ici_pipeline_parallelism=1"]),
    ("max_segments_per_seq=4", ["max_segments_per_seq=4"]),
    ("grain_train_files=/x", ["a dataset of MaxText's pipelines"]),
    ("lora_input_adapters_path=/x", ["lora_restore_path=a directory in peft's format"]),
    ("dense_init_scale=2", ["other first parameters"]),
    ("use_qwix_quantization=true", ["quantized products (qwix)"]),
    ("lr_schedule_type=wsd", ["lr_schedule_type=cosine"]),
]


@pytest.mark.parametrize(("override", "parts"), REFUSED)
def test_no_key_that_would_change_the_run_is_passed_over(
    tmp_path: Path, override: str, parts: list[str]
) -> None:
    says(error(tmp_path, MIXTRAL, override), *parts)
    with pytest.raises(UserError) as caught:  # nor with a model of this package
        load_config("mixtral-tiny", [override]).require_built()
    says(str(caught.value), *parts)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("dataset_type=tfds", ["dataset_type=tfds", "dataset_path=FILES"]),
        ("init_weights_seed=3", ["there is one seed here"]),
        ("profiler=perf", ["profiler=xplane"]),
        ("adamw_mask=[norm]", ["adam_decay_vectors=false"]),
        ("base_emb_dim=abc", ["command line: base_emb_dim=abc is not a whole number"]),
        ("base_emb_dim=6.5", ["is not a whole number"]),
        ("base_emb_dim=true", ["is not a whole number"]),
        ("rope_factor=[1]", ["rope_factor=[1] is not a number"]),
        ("sparse_matmul=2", ["sparse_matmul=2 is not true or false"]),
        ("mlp_activations=silu", ["mlp_activations=silu is not a list"]),
        ("nope_layer_interval={}", ["nope_layer_interval={} is not a whole number"]),
        ("decoder_block=[mixtral]", ["layers of the kind [mixtral]"]),
        ("num_experts=0", ["num_experts=0 is out of range"]),
        ("remat_policy=x", ["remat_policy=x is not a known remat_policy"]),
        ("scan_layer=true", ["unknown key scan_layer"]),
    ],
)
def test_wrong_values(tmp_path: Path, override: str, parts: list[str]) -> None:
    says(error(tmp_path, MIXTRAL + "\ndata_shuffle_seed: 2", override), *parts)


def test_our_keys_in_a_file_of_theirs(tmp_path: Path) -> None:
    config = load(tmp_path, MIXTRAL + "\nmoe_dispatch: einsum", "num_simulated_devices=3")
    assert (moe_of(config).moe_dispatch, config.mesh.num_simulated_devices) == ("einsum", 3)


def test_their_keys_beside_a_model_of_ours() -> None:
    config = load_config(
        "mixtral-tiny",
        *[["opt_type=sgd", "sparse_matmul=true", "init_weights_seed=4", "hardware=cpu",
           "capacity_factor=-1", "scan_layers=true", "profiler=xplane"]],
    )  # fmt: skip
    assert (config.train.optimizer, config.train.seed, config.train.profile) == ("sgd", 4, True)
    assert moe_of(config).moe_dispatch == "ragged"
    says(config.warnings[0], "hardware (devices, compilers and layouts of MaxText's own)")
    for override in (
        "decoder_block=gemma",
        "rope_use_scale=false",
        "normalize_embedding_logits=false",
    ):
        with pytest.raises(UserError) as caught:
            load_config("mixtral-tiny", [override])
        says(check_message(caught.value), override, "this model is none of them")


VALUES: st.SearchStrategy[object] = st.one_of(
    st.sampled_from([None, True, -1, 0, 3, 1.5, "None", "", [], {}, [[1]], "x", [None], 10**30]),
    st.text(max_size=4),
    st.lists(st.sampled_from(["silu", "linear", "fsdp", 1]), max_size=3),
)

NAMES = sorted(maxtext_keys().defaults)


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=3), st.sampled_from([*BLOCKS, "?"]))
def test_any_file_gives_a_config_or_a_user_error(
    tmp_path: Path, extra: dict[str, Any], block: str
) -> None:
    path = tmp_path / "any.yml"
    content = {**yaml.safe_load(SMALL), "decoder_block": block, **extra}
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    try:
        config = load_config(str(path))
        check_against_mesh(config, config.mesh.resolve(8))
        yaml.safe_load(config.to_yaml())
    except UserError as caught:
        check_message(caught)
