"""Read where MaxText's text is from, and how it is fine-tuned on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_shard.errors import UserError
from tests.config.helpers import says
from tests.config.maxtext_files import MIXTRAL, error, load


def test_data(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("text", encoding="utf-8")
    config = load(tmp_path, MIXTRAL + "\ntokenizer_path: there/llama", f"dataset_path={text}",
                  "tokenizer_path=")  # fmt: skip
    assert (config.data.dataset_type, config.data.dataset_path) == ("text", (str(text),))
    config = load(tmp_path, MIXTRAL + "\ntokenizer_path: there/llama\nadd_bos: false")
    assert (config.data.dataset_type, config.data.tokenizer_path) == ("synthetic", "")
    says("\n".join(config.warnings), "nothing is read from tokenizer_path", "add_bos")
    message = error(tmp_path, MIXTRAL + "\nadd_bos: false", f"dataset_path={text}")
    says(message, "add_bos=false asks for text read in another way", "add_bos=true")


@pytest.mark.parametrize(
    ("overrides", "paths"),
    [
        (["dataset_type=grain", "grain_train_files=/d/*.array_record"], ["/d/*.array_record"]),
        (["dataset_type=grain", "grain_train_files=/d/x*,1.0", "grain_file_type=parquet"],
         ["/d/x*"]),
        (["dataset_type=hf", "hf_path=parquet", "hf_train_files=/d/*.parquet"], ["/d/*.parquet"]),
        (["dataset_type=hf", "hf_path=json", "hf_train_files=[/a.jsonl, /b.jsonl]"],
         ["/a.jsonl", "/b.jsonl"]),
        (["dataset_type=hf", "hf_path={here}"], ["{here}"]),
        (["dataset_type=hf", "hf_path={here}", "hf_data_dir=fr"], ["{here}/fr"]),
    ],
)  # fmt: skip
def test_the_files_of_its_pipelines_are_the_text(
    tmp_path: Path, overrides: list[str], paths: list[str]
) -> None:
    here = str(tmp_path)
    given = [each.replace("{here}", here) for each in overrides]
    more = ["train_data_columns=[body]", "tokenizer_path=/t", "train_split=test"]
    data = load(tmp_path, MIXTRAL, *given, *more).data
    assert data.dataset_path == tuple(each.replace("{here}", here) for each in paths)
    assert (data.dataset_type, data.train_data_columns) == ("text", ("body",))
    assert (data.tokenizer_path, data.train_split) == ("/t", "test")


def test_its_fine_tuning_trains_on_what_it_does_there(tmp_path: Path) -> None:
    files = ["dataset_type=hf", f"hf_path={tmp_path}", "train_data_columns=[messages]"]
    more = ["use_sft=true", "tokenizer_path=/t", "chat_template_path=a.jinja"]
    data = load(tmp_path, MIXTRAL, *files, *more).data
    assert (data.use_sft, data.train_data_columns) == (True, ("messages",))
    assert data.chat_template_path == "a.jinja"
    assert not data.sft_train_on_completion_only  # MaxText's default; ours is true
    narrow = load(tmp_path, MIXTRAL, *files, *more, "sft_train_on_completion_only=true").data
    assert narrow.sft_train_on_completion_only


def test_its_mixtures(tmp_path: Path) -> None:
    data = load(tmp_path, MIXTRAL, "dataset_type=grain", "grain_train_files=/a*,0.3;/b*, 0.7").data
    assert (data.dataset_path, data.dataset_weights) == (("/a*", "/b*"), (0.3, 0.7))
    path = tmp_path / "mixture.json"
    path.write_text('{"x": {"path": "/c", "weight": 2}, "y": {"path": "/d", "weight": 1}}')
    data = load(tmp_path, MIXTRAL, "dataset_type=grain",
                f"grain_train_mixture_config_path={path}").data  # fmt: skip
    assert (data.dataset_path, data.dataset_weights) == (("/c", "/d"), (2.0, 1.0))


def test_its_block_of_lora(tmp_path: Path) -> None:
    block = "\nlora: {enable_lora: true, lora_rank: 4, lora_alpha: 8.0, lora_weight_qtype: null}"
    lora = load(tmp_path, MIXTRAL + block).model.lora
    assert (lora.enable_lora, lora.lora_rank, lora.lora_alpha, lora.scale) == (True, 4, 8.0, 2.0)
    wanted = "\nlora: {enable_lora: true, lora_rank: 4, lora_alpha: 8.0, lora_weight_qtype: nf4}"
    says(error(tmp_path, MIXTRAL + wanted), "QLoRA")
    twice = error(tmp_path, MIXTRAL + block + "\nlora_rank: 8")
    says(twice, "lora_rank is 4 in the block lora and 8 beside it")
    says(error(tmp_path, MIXTRAL + "\nlora: [1]"), "lora=[1] is no block of keys")
    says(error(tmp_path, MIXTRAL + "\nlora: {lora_rank: 4}"), "lora_rank=4 has no effect")


def test_adapters_that_a_file_leaves_open_are_said_to_be_others(tmp_path: Path) -> None:
    block = "\nlora: {enable_lora: true, lora_rank: 4, lora_alpha: 8.0"
    lines = load(tmp_path, MIXTRAL + block + "}").warnings
    says("\n".join(lines), "lora_module_path is empty: attention, experts and MLPs")
    plain = load(tmp_path, MIXTRAL + block + ", lora_module_path: self_attention/query}")
    assert not any("lora_module_path" in line for line in plain.warnings)


SFT = [
    ("use_sft=false", {"use_sft": False}),
    ("sft_train_on_completion_only=true", {"sft_train_on_completion_only": True}),
    ("chat_template_path=b.json", {"chat_template_path": "b.json"}),
    ("train_data_columns=[prompt, completion]", {"train_data_columns": ("prompt", "completion")}),
    ("train_split=train_sft", {"train_split": "train_sft"}),
    ("packing=false", {"packing": False}),
    ("formatting_func_kwargs={a: 1}", "formatting_func_kwargs"),
    ("use_grpo=true", "training on preferences or rewards"),
    ("dpo_beta=0.1", "of no meaning here: dpo_beta"),
    ("dpo={algo: orpo}", "of no meaning here: dpo"),
    ("use_tunix_gradient_accumulation=true", "use_tunix_gradient_accumulation (microbatches"),
    ("hf_lora_adapter_path=/x", "lora_restore_path=a directory"),
    ("lora_tile_size=32", "QLoRA"),
    ("quantize_router_proj=false", "of no meaning here: quantize_router_proj"),
]


@pytest.mark.parametrize(("override", "expected"), SFT)
def test_no_key_of_its_fine_tuning_is_dropped_in_silence(
    tmp_path: Path, override: str, expected: str | dict[str, Any]
) -> None:
    """It reaches the configuration, or a line or an error names it."""
    files = ["dataset_type=hf", f"hf_path={tmp_path}", "train_data_columns=[messages]"]
    given = [*files, "use_sft=true", "tokenizer_path=/t", override]
    if isinstance(expected, dict):
        data = load(tmp_path, MIXTRAL, *given).data
        assert {key: getattr(data, key) for key in expected} == expected
        return
    try:
        lines: tuple[str, ...] = load(tmp_path, MIXTRAL, *given).warnings
    except UserError as refusal:
        lines = (str(refusal),)
    says("\n".join(lines), expected)


def test_the_evaluation_files_of_its_pipelines(tmp_path: Path) -> None:
    files = ["grain_train_files=/d", "grain_eval_files=/e", "eval_interval=5"]
    config = load(tmp_path, MIXTRAL, "dataset_type=grain", *files)
    assert config.data.eval_dataset_path == ("/e",)
    by_split = ["hf_path=" + str(tmp_path), "hf_eval_split=dev", "eval_interval=5"]
    config = load(tmp_path, MIXTRAL, "dataset_type=hf", *by_split)
    assert config.data.eval_dataset_path == (str(tmp_path),)
    assert config.data.eval_split == "dev"


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["dataset_type=hf"], ["without hf_path"]),
        (["dataset_type=grain"], ["without grain_train_files"]),
        (["dataset_type=hf", "hf_path=allenai/c4"], ["hub", "hf download", "dataset_path=DIR"]),
        (["dataset_type=hf", "hf_path=org/x", "hf_train_files=a*"], ["hub"]),
        (["dataset_type=hf", "hf_path=json", "grain_train_files=a"], ["grain_train_files=a"]),
        (["dataset_type=grain", "grain_train_files=a,0.3;b"], ["b has no weight"]),
        (["dataset_type=grain", "grain_train_mixture_config_path=/none"], ["is no mixture"]),
        (["dataset_type=grain", "grain_train_files=a", "grain_file_type=tfrecord"], ["tfrecord"]),
        (["dataset_type=text", "hf_path=x"], ["hf_path=x", "dataset_type=text"]),
        (["dataset_type=grain", "grain_train_files=a", "train_data_columns=[a, b]"],
         ["not one field"]),
    ],
)  # fmt: skip
def test_what_is_not_read_of_its_pipelines_is_refused(
    tmp_path: Path, overrides: list[str], parts: list[str]
) -> None:
    says(error(tmp_path, MIXTRAL, *overrides), *parts)
