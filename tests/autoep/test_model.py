"""Accept a Hugging Face directory as MODEL: the command line overrides its settings."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moe_shard.autoep.detect import detect
from moe_shard.checkpoints.resolve import directory_settings, load_model
from moe_shard.cli.train import main as train
from moe_shard.config import load_config
from moe_shard.errors import Finding, UserError
from tests.autoep.directory import small_models, write_model
from tests.autoep.test_families import own_family, own_model

ROOT = Path(__file__).parents[2]


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    model = small_models()["mixtral-0"]
    return write_model(tmp_path / "Small-Mixtral", model["config"], model["saved"])


def test_a_directory(mixtral: Path) -> None:
    config = load_model(str(mixtral))
    assert (config.run.model_name, config.run.run_name) == ("Small-Mixtral", "Small-Mixtral")
    assert config.run.load_parameters_path == str(mixtral)
    assert config.data.tokenizer_path == str(mixtral)  # whose error shows where text is read
    model, moe = config.model, config.model.moe
    assert moe is not None
    assert (model.emb_dim, model.num_decoder_layers, model.dtype) == (24, 2, "bfloat16")
    assert (moe.num_experts, moe.moe_dispatch, moe.capacity_factor) == (4, "ragged", -1.0)
    assert (moe.load_balance_loss_type, moe.load_balance_loss_weight) == ("huggingface", 0.001)
    assert config.detected == detect(mixtral).lines
    assert config.detected[0] == "family: mixtral; layers: 2, with experts in all"
    assert not config.warnings
    config.require_built()


def test_arguments_are_stronger(mixtral: Path) -> None:
    config = load_model(
        str(mixtral), ["weight_dtype=float32", "moe_dispatch=gather", "load_parameters_path="]
    )
    assert config.model.moe is not None
    assert config.model.weight_dtype == "float32"
    assert config.model.moe.moe_dispatch == "gather"
    assert config.run.load_parameters_path == ""
    with pytest.raises(UserError, match=r"unknown key .*\nfix: did you mean weight_dtype"):
        load_model(str(mixtral), ["weight_dtyp=float32"])


def test_a_tokenizer_that_lies_beside(mixtral: Path) -> None:
    (mixtral / "tokenizer.json").write_text("{}")
    assert directory_settings(mixtral, detect(mixtral))["tokenizer_path"] == str(mixtral)


def test_what_was_loaded_loads_again_as_a_file(mixtral: Path, tmp_path: Path) -> None:
    config = load_model(str(mixtral))
    path = tmp_path / "again.yml"
    path.write_text(config.to_yaml())
    again = load_config(str(path))
    assert again.model == config.model
    assert again.run == config.run


def test_names_and_files_are_as_ever(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert load_model("mixtral-tiny") == load_config("mixtral-tiny")
    # A run's folder of that name does not hide the model.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mixtral-tiny").mkdir()
    assert load_model("mixtral-tiny") == load_config("mixtral-tiny")
    with pytest.raises(UserError, match="did you mean mixtral-tiny"):
        load_model("mixtral-tinny")


def test_a_family_of_ones_own(tmp_path: Path) -> None:
    directory = str(write_model(tmp_path / "model", *own_model()))
    with pytest.raises(UserError, match=r'model_type="my_moe".*no family.*\nfix: hf_family=FILE'):
        load_model(directory)
    path = own_family(tmp_path)
    config = load_model(directory, [f"hf_family={path}"])
    assert config.model.num_experts == 3
    assert config.run.hf_family == path
    with pytest.raises(UserError, match=r"hf_family mixtrl is not in configs/families/\nfix: did"):
        load_model(directory, ["hf_family=mixtrl"])


def test_a_directory_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a directory without config\.json"):
        load_model(str(tmp_path))


def test_train_says_first_what_was_found(
    mixtral: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object) -> None:
        raise Finding("far enough")

    monkeypatch.setattr("moe_shard.training.run.make_program", stop)
    with pytest.raises(Finding):
        train([str(mixtral), "steps=0"])
    said = capsys.readouterr().out.splitlines()
    assert tuple(said[1:]) == detect(mixtral).lines


def test_explain_sharding_takes_a_directory(mixtral: Path) -> None:
    command = [sys.executable, "tools/explain_sharding.py", str(mixtral), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    names = {param["name"] for param in json.loads(done.stdout)["parameters"]}
    assert "layers.mlp.experts.gate" in names
