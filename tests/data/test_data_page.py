"""Run the commands of docs/data.md up to the first batch, and compare what the page shows."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import jax
import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_shard.checkpoints.resolve import load_model
from moe_shard.data.batches import batches
from moe_shard.data.held_out import held_out_texts
from tests.data.chats import MISTRAL, chat_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)


def prepare(root: Path) -> None:
    """Write the files that the page's commands name."""
    rows = [f"Document number {n} - naïve café.\nSecond line." for n in range(200)]
    lines = "".join(json.dumps({"text": row, "id": n}) + "\n" for n, row in enumerate(rows))
    (root / "my.jsonl").write_text(lines)
    (root / "more.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    (root / "books").mkdir()
    (root / "books" / "one.txt").write_text("A book. " * 500)
    (root / "dataset" / "data").mkdir(parents=True)
    (root / "dataset" / "README.md").write_text("---\n---\n")
    for split in ("train", "validation", "test"):
        table = pa.table({"text": [f"{split} {row}" for row in rows]})
        path = root / "dataset" / "data" / f"{split}-00000-of-00001.parquet"
        pa.parquet.write_table(table, path)
    chat_tokenizer(root / "Mixtral-8x7B", MISTRAL)
    chats = [
        [{"role": "user", "content": f"Hello, number {n}"},
         {"role": "assistant", "content": f"Good morning, {n}!"}]
        for n in range(40)
    ]  # fmt: skip
    (root / "chats.jsonl").write_text(
        "".join(json.dumps({"messages": each}) + "\n" for each in chats)
    )


def test_every_command_reads_what_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path.with_name("page-cache")))
    commands = [shlex.split(body) for language, body in BLOCKS if language == "sh"]
    assert len(commands) == 4
    mesh = Mesh(jax.devices(), "x")
    sharding = NamedSharding(mesh, PartitionSpec(None, "x", None))
    sizes: dict[str, Any] = {"seq_len": 128, "rows": 32, "sharding": sharding}
    said: list[list[str]] = []
    for command, train, model, *overrides in commands:
        assert (command, train) == ("moe-shard", "train")
        config = load_model(model, overrides)
        lines: list[str] = []
        vocab_size = config.model.vocab_size
        made = batches(
            config.data, vocab_size=vocab_size, microbatches=1, say=lines.append, **sizes
        )
        next(made)
        made.close()
        if config.evaluation.eval_interval != -1:
            held_out_texts(config.data, vocab_size=vocab_size, most=1, say=lines.append, **sizes)
        said.append(lines)
    shown, of_chats = [body.splitlines() for language, body in BLOCKS if language == "text"]
    assert said[0] == shown
    assert [line for line in said[3] if not line.startswith("tokenized")] == of_chats
    assert "201 documents in 2 files (1 jsonl.zst, 1 text)" in said[2][0]
    assert any("<s> TEXT </s>" in line for line in said[2])
    assert "200 documents in 1 files (1 parquet)" in said[1][0]
    assert any("evaluation on dataset: text: 200 documents" in line for line in said[1])
