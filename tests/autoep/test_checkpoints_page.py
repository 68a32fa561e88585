"""Run the commands of docs/checkpoints.md on a small directory of the model that it names.

What is trained is read up to the first batch, and what is compiled up to its model and its target;
training and compilers are tested elsewhere.
"""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_shard.checkpoints.imported import find_weights
from moe_shard.checkpoints.resolve import load_model
from moe_shard.cli import command
from moe_shard.data.batches import batches
from moe_shard.runtime.targets.target import parse_target
from tests.autoep.directory import small_models, write_model
from tests.data.chats import chat_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "checkpoints.md"
MODEL = "path/to/Qwen3-30B-A3B"
EXPERTS, VOCAB_SIZE = 8, 320


def write_qwen3(folder: Path) -> None:
    """Write a small Qwen3 MoE with its tokenizer: experts for eight devices."""
    chat_tokenizer(folder)
    small = small_models()["qwen3_moe-0"]
    config = small["config"] | {"num_local_experts": EXPERTS, "vocab_size": VOCAB_SIZE}
    shapes: dict[str, list[int]] = {}
    for name, shape in small["saved"].items():
        if ".experts." in name:
            for expert in range(EXPERTS):
                shapes[re.sub(r"(experts\.)\d+", rf"\g<1>{expert}", name)] = shape
        elif name.endswith("mlp.gate.weight"):
            shapes[name] = [EXPERTS, *shape[1:]]
        elif shape[0] == small["config"]["vocab_size"]:
            shapes[name] = [VOCAB_SIZE, *shape[1:]]
        else:
            shapes[name] = shape
    write_model(folder, config, shapes)


def commands() -> list[list[str]]:
    """Return the words of the first block's commands."""
    block = re.search(r"^```text\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert block is not None
    return [shlex.split(line, comments=True) for line in block[1].splitlines()]


def test_every_command_reads_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_qwen3(tmp_path / MODEL)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "book.txt").write_text("A book. " * 20_000)
    done: list[str] = []
    for program, name, *arguments in commands():
        assert program == "moe-shard"
        if name == "compile":
            path, target = arguments
            shutil.copy(Path(MODEL) / "config.json", path)
            assert parse_target(target).shape == (64,)
            alone = load_model(path, []).model
            assert alone == load_model(MODEL, []).model
            done.append(name)
            continue
        assert arguments[0] == MODEL
        if name != "train":
            assert command(name)(arguments) == 0
            done.append(name)
            continue
        config = load_model(arguments[0], arguments[1:])
        assert config.model.moe is not None
        assert config.model.moe.num_experts == EXPERTS
        if config.train.steps == 0:
            done.append("steps=0")
            continue
        lines: list[str] = []
        made = batches(
            config.data,
            vocab_size=config.model.vocab_size,
            seq_len=64,
            rows=8,
            microbatches=1,
            sharding=NamedSharding(Mesh(jax.devices(), "x"), PartitionSpec(None, "x", None)),
            say=lines.append,
        )
        next(made)
        made.close()
        assert "1 documents in 1 files (1 text), 0.16 MB: corpus/" in lines[0]
        assert any(line.startswith("tokenizer: ") and f"{MODEL}, 272" in line for line in lines)
        done.append("corpus")
    assert done == ["detect", "steps=0", "corpus", "import", "compile"]
    assert "qwen3_moe" in capsys.readouterr().out
    assert find_weights("models/qwen3") is not None
    imported: Any = load_model("models/qwen3", []).model
    assert imported.vocab_size == VOCAB_SIZE
