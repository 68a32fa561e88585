"""Compare the tokens of conversations with transformers', by templates as published models have."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_shard.config.schema import DataConfig
from moe_shard.data.chat_tokenizer import ChatTokenizer, is_trained, plain_ids
from moe_shard.data.conversations import ConversationColumns
from moe_shard.data.fields import DocumentPiece
from moe_shard.data.tokenizer import find_tokenizer
from moe_shard.errors import UserError
from tests.data.chats import CALLS, MANY, MARKED, ONE, SYSTEM, TEMPLATES, TOOLS, chat_tokenizer
from tests.parity.test_tokenizers import piece_model, ranks

pytestmark = pytest.mark.parity

CHATS: dict[str, dict[str, Any]] = {
    "one": {"messages": ONE},
    "many": {"messages": MANY},
    "system": {"messages": [SYSTEM, *MANY]},
    "tools": {"messages": CALLS, "tools": TOOLS},
    "written": {"messages": [{"role": "user", "content": "a</s><|im_end|>\n<|eot_id|>b"}, ONE[1]]},
}
DATE = {"date_string": "26 Jul 2024"}


def theirs(folder: Path) -> Any:
    transformers = importlib.import_module("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder)


def ours(folder: Path, record: dict[str, Any], *, completions: bool) -> Any:
    config = DataConfig(
        use_sft=True, dataset_path=("a",), tokenizer_path=str(folder),
        sft_train_on_completion_only=completions,
    )  # fmt: skip
    piece = ConversationColumns(("text",)).read(record | {"chat_template_kwargs": DATE}, "line 1")
    assert isinstance(piece, DocumentPiece)
    with ChatTokenizer(config, find_tokenizer(str(folder))) as chat:
        return chat.encode_texts([piece.text])[0]


def expected(folder: Path, record: dict[str, Any], **keys: Any) -> Any:
    return theirs(folder).apply_chat_template(
        record["messages"], tools=record.get("tools"), tokenize=True, return_dict=True,
        **DATE, **keys,
    )  # fmt: skip


@pytest.mark.parametrize("template", TEMPLATES)
def test_ids_equal_those_of_transformers(tmp_path: Path, template: str) -> None:
    folder = chat_tokenizer(tmp_path / "t", TEMPLATES[template])
    refused = []
    for name, record in CHATS.items():
        try:
            found = expected(folder, record)["input_ids"]
        except Exception:  # roles that this template has not
            refused.append(name)
            with pytest.raises(UserError, match="the template refuses it"):
                ours(folder, record, completions=False)
            continue
        tokens = ours(folder, record, completions=False)
        assert is_trained(tokens).all()
        assert tokens.tolist() == found, name
    known = {"mistral": ["tools"], "chatml": ["tools"], "marked": ["tools"], "harmony": ["tools"]}
    assert refused == known.get(template, [])


def test_the_mask_equals_that_of_transformers(tmp_path: Path) -> None:
    folder = chat_tokenizer(tmp_path / "t", MARKED)
    for record in (CHATS["one"], CHATS["system"]):
        found = expected(folder, record, return_assistant_tokens_mask=True)
        tokens = ours(folder, record, completions=True)
        assert plain_ids(tokens).tolist() == found["input_ids"]
        assert is_trained(tokens).astype(int).tolist() == found["assistant_masks"]


@pytest.mark.parametrize("kind", ["llama", "gemma", "tiktoken"])
def test_other_kinds_of_tokenizers_say_where_their_tokens_are(tmp_path: Path, kind: str) -> None:
    """Compare with the difference of two renderings that transformers tokenizes."""
    folder = tmp_path / "t"
    # The turns end where no token of these tokenizers goes on.
    template = (
        "{% for m in messages %}{{ '</s>' + m.content + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '</s>' }}{% endif %}"
    )
    if kind == "tiktoken":
        _, tokenizer = ranks(folder)
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    else:
        piece_model(folder, kind, chat_template=template)
        tokenizer = theirs(folder)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return ids

    for record in (CHATS["one"], CHATS["many"]):
        turns = [each["content"] for each in record["messages"]]
        text = ""
        mask: list[bool] = []
        for number, turn in enumerate(turns):
            before = len(encode(text + "</s>"))
            mask += [False] * (before - len(mask))
            text += f"</s>{turn}</s>"
            mask += [number % 2 == 1] * (len(encode(text)) - len(mask))
        tokens = ours(folder, record, completions=True)
        assert plain_ids(tokens).tolist() == encode(text)
        assert np.array_equal(is_trained(tokens), mask)
