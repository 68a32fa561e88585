"""Conversations become the tokens that are written here by hand, whole and each once in a sequence.

The judges are texts and masks spelled out below, Python's own readers and plain loops.
"""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import tokenizers
from array_record.python import array_record_module
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_shard.config.schema import DataConfig
from moe_shard.data import chat_template, conversations
from moe_shard.data.chat_template import find_chat_template
from moe_shard.data.chat_text import ChatText, best_fit
from moe_shard.data.found_text import find_text
from moe_shard.data.held_out import HeldOutText
from moe_shard.data.sequences import cut_text
from moe_shard.data.tokenizer import find_tokenizer
from moe_shard.errors import UserError
from moe_shard.layers.cache import PADDING
from moe_shard.layers.loss import IGNORED
from tests.data.chats import (
    CALLS,
    CHATML,
    HARMONY,
    LLAMA,
    MANY,
    MARKED,
    ONE,
    QWEN,
    SYSTEM,
    TOOLS,
    chat_tokenizer,
    said,
    write_chats,
)

Chats = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path.with_name(tmp_path.name + "-cache")))


def read(
    path: str | Path, folder: Path, seq_len: int = 400, **keys: Any
) -> tuple[ChatText, list[str]]:
    lines: list[str] = []
    config = DataConfig(use_sft=True, dataset_path=(str(path),), tokenizer_path=str(folder), **keys)
    found = find_text(config, config.dataset_path)
    tokenizer = find_tokenizer(config.tokenizer_path)
    text = cut_text(config, found.documents, tokenizer, seq_len=seq_len, seed=3, say=lines.append)
    assert isinstance(text, ChatText)
    return text, [*found.lines, *lines, text.summary(2)]


def made(path: Path, records: list[Any], template: str = CHATML, **keys: Any) -> Any:
    folder = path / "tokenizer"
    if not folder.exists():
        chat_tokenizer(folder, template)
    return read(write_chats(path / "chats.jsonl", records), folder, **keys)


def refused(path: Path, records: list[Any], template: str = CHATML, **keys: Any) -> str:
    with pytest.raises(UserError) as caught:
        made(path, records, template, **keys)
    message = str(caught.value)
    assert len(message.splitlines()) <= 3
    assert "fix: " in message
    return message


def by_hand(folder: Path, parts: list[tuple[str, bool]]) -> tuple[list[int], list[int]]:
    """Return ids and targets of a text in parts, each trained on or not."""
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids: list[int] = []
    mask: list[bool] = []
    for text, trained in parts:
        part = library.encode(text, add_special_tokens=False).ids
        ids += part
        mask += [trained] * len(part)
    following = zip(ids[1:], mask[1:], strict=True)
    return ids, [*(token if kept else IGNORED for token, kept in following), IGNORED]


TURNS = [
    ("<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n<|im_start|>assistant\n", False),
    ("Two, naturally.<|im_end|>\n", True),
    ("<|im_start|>user\n  Und auf Japanisch? <|im_end|>\n<|im_start|>assistant\n", False),
    ("二です。\nにー\U0001f98a<|im_end|>\n", True),
    ("<|im_start|>user\n<b>&amp;</b><|im_end|>\n<|im_start|>assistant\n", False),
    ("Ok.<|im_end|>\n", True),
]
MARKS = [part for text, kept in TURNS
         for part in ([(text[:-1], True), ("\n", False)] if kept else [(text, False)])]  # fmt: skip


@pytest.mark.parametrize(("template", "parts"), [(CHATML, TURNS), (MARKED, MARKS)])
def test_tokens_and_what_is_trained_on(tmp_path: Path, template: str, parts: Any) -> None:
    text, lines = made(tmp_path, [{"messages": MANY}], template)
    ids, targets = by_hand(tmp_path / "tokenizer", parts)
    row, size = text[0], len(ids)
    assert row["inputs"].tolist() == ids + [0] * (400 - size)
    assert row["targets"].tolist() == targets + [IGNORED] * (400 - size)
    assert row["positions"].tolist() == [*range(size), *range(400 - size)]
    assert row["segment_ids"].tolist() == [1] * size + [PADDING] * (400 - size)
    kept = sum(each != IGNORED for each in targets)
    assert f"1 conversations, {kept:,} tokens trained on of {size:,} read" in lines[-1]
    everything, _ = made(
        tmp_path, [{"messages": MANY}], template, sft_train_on_completion_only=False
    )
    assert everything[0]["targets"].tolist()[: size - 1] == ids[1:]


def test_a_message_of_the_context_may_look_like_the_assistants(tmp_path: Path) -> None:
    twice = [said("user", "ok"), said("assistant", "ok"), said("user", "ok")]
    text, _ = made(tmp_path, [{"messages": twice}])
    _, targets = by_hand(tmp_path / "tokenizer", [
        ("<|im_start|>user\nok<|im_end|>\n<|im_start|>assistant\n", False),
        ("ok<|im_end|>\n", True), ("<|im_start|>user\nok<|im_end|>\n", False),
    ])  # fmt: skip
    assert text[0]["targets"].tolist()[: len(targets)] == targets


def test_without_packing_each_has_a_sequence_of_its_own(tmp_path: Path) -> None:
    draw = random.Random(1)
    answers = [f"{number} " + "a" * draw.randint(0, 60) for number in range(20)]
    records = [{"messages": [said("user", "u"), said("assistant", each)]} for each in answers]
    text, lines = made(tmp_path, records, seq_len=120, packing=False)
    assert len(text) == 20
    assert all(set(text[row]["segment_ids"]) == {1, PADDING} for row in range(20))
    assert len({text[row]["inputs"].tobytes() for row in range(20)}) == 20
    assert "in 20 sequences of 120" in lines[-1]


def test_each_conversation_is_whole_and_once_in_a_sequence(tmp_path: Path) -> None:
    draw = random.Random(5)
    records = [
        {"messages": [said("user", "u" * draw.randint(1, 9)),
                      said("assistant", f"{number} " + "a" * draw.randint(0, 60))]}
        for number in range(150)
    ]  # fmt: skip
    text, lines = made(tmp_path, records, seq_len=120)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer" / "tokenizer.json"))
    seen: list[str] = []
    read_tokens = targets = 0
    for number in range(len(text)):
        row = text[number]
        last = int(row["segment_ids"].max())
        padding = row["segment_ids"] == PADDING
        assert not row["inputs"][padding].any()
        assert (row["targets"][padding] == IGNORED).all()
        assert not np.diff(padding.astype(int)).min(initial=0) < 0  # at the end
        for segment in range(1, last + 1):
            inside = row["segment_ids"] == segment
            ids, aims = row["inputs"][inside], row["targets"][inside]
            assert row["positions"][inside].tolist() == list(range(len(ids)))
            kept = aims != IGNORED
            assert (aims[:-1][kept[:-1]] == ids[1:][kept[:-1]]).all()
            assert not kept[-1]
            seen.append(library.decode(ids.tolist(), skip_special_tokens=False))
            read_tokens, targets = read_tokens + len(ids), targets + int(kept.sum())
        assert text.targets(number, number + 1) == int((row["targets"] != IGNORED).sum())
    expected = [
        "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in each["messages"])
        for each in records
    ]
    assert sorted(seen) == sorted(expected)
    assert f"{targets:,} tokens trained on of {read_tokens:,} read, in {len(text)}" in lines[-1]
    again, _ = made(tmp_path, records, seq_len=120)
    assert (again.fingerprint() == text.fingerprint()).all()
    assert all((again[0][name] == text[0][name]).all() for name in text[0])


def test_best_fit_fills_sequences_as_a_plain_loop_does() -> None:
    draw = np.random.default_rng(0)
    for room in (7, 40, 1000):
        sizes = draw.integers(1, room + 1, 300)
        bins = best_fit(sizes, room)
        assert np.bincount(bins, weights=sizes).max() <= room
        left: list[int] = []
        for size in sorted(sizes.tolist(), reverse=True):
            fits = [space for space in left if space >= size]
            if fits:
                left.remove(min(fits))
            left.append((min(fits) if fits else room) - size)
        assert bins.max() + 1 == len(left)


def test_long_ones_are_cut_and_idle_ones_left_out_and_it_says_so(tmp_path: Path) -> None:
    records: list[Any] = [
        {"messages": [said("user", "x"), said("assistant", "y" * 200)]},  # cut
        {"messages": [said("user", "x" * 200), said("assistant", "y")]},  # nothing left to train on
        {"messages": [said("user", "only")]},
        {"messages": []},
        {"messages": ONE},
    ]
    text, lines = made(tmp_path, records, seq_len=100)
    whole = "\n".join(lines)
    assert "2 conversations with nothing to train on left out" in whole
    assert "1 conversations longer than max_target_length=100 are cut at their end: 120" in whole
    assert "1 records without text (empty or null) left out" in whole
    assert "chat: 2 conversations, " in whole
    assert len(text) == 2
    with pytest.raises(UserError, match="no conversation of 1 has a token to train on"):
        made(tmp_path, records[2:3])


def test_a_template_that_is_not_stable_is_refused_and_not_guessed(tmp_path: Path) -> None:
    message = refused(tmp_path, [{"messages": MANY}], HARMONY)
    assert "chats.jsonl, line 1: message 2, the assistant's, is written in another" in message
    assert "{% generation %}" in message
    text, _ = made(tmp_path, [{"messages": ONE}])
    end = tokenizers.Tokenizer.from_file(
        str(tmp_path / "tokenizer" / "tokenizer.json")
    ).token_to_id("<|return|>")
    assert end in text[0]["targets"]
    _, lines = made(tmp_path, [{"messages": MANY}], sft_train_on_completion_only=False)
    assert any("all of it (sft_train_on_completion_only=false)" in line for line in lines)


def test_the_date_is_named_and_not_todays(tmp_path: Path) -> None:
    assert "fix: chat_template_date=2" in refused(tmp_path, [{"messages": ONE}], LLAMA)
    text, lines = made(tmp_path, [{"messages": ONE}], chat_template_date="2024-07-26")
    assert "dated 2024-07-26" in "\n".join(lines)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer" / "tokenizer.json"))
    assert "Today: 26 Jul 2024" in library.decode(text[0]["inputs"].tolist())
    own = {"messages": ONE, "chat_template_kwargs": {"date_string": "noon"}}
    text, _ = made(tmp_path, [own])
    assert "Today: noon" in library.decode(text[0]["inputs"].tolist())
    with pytest.raises(UserError, match="is no day"):
        DataConfig(use_sft=True, dataset_path=("a",), chat_template_date="26 Jul 2024")


def test_what_a_template_refuses_is_named_or_counted(tmp_path: Path) -> None:
    calls = {"messages": [*CALLS[:2], said("assistant", None, tool_calls=[{}, {}])]}
    records = [{"messages": ONE}, calls, {"messages": ONE}]
    keys = {"chat_template_date": "2024-07-26"}
    message = refused(tmp_path, records, LLAMA, **keys)
    assert "chats.jsonl, line 2: the template refuses it: one tool call at once" in message
    for _ in range(2):  # the second time, the tokens are kept from the first
        text, lines = made(tmp_path, records, corrupt_records="skip", **keys)
        assert "1 conversations that cannot be read passed over" in "\n".join(lines)
        assert "2 conversations, " in lines[-1]
    assert len(text) == 1


def test_batches_to_judge_by_weigh_as_their_targets(tmp_path: Path) -> None:
    records = [{"messages": [said("user", "x"), said("assistant", "y" * n)]} for n in range(1, 60)]
    text, _ = made(tmp_path, records, seq_len=90)
    sharding = NamedSharding(Mesh(jax.devices()[:1], "x"), PartitionSpec())
    held = HeldOutText("chats", text, rows=2, most=-1, sharding=sharding)
    counts = []
    batches = held.batches()
    for _ in range(held.num_batches):
        batch = next(batches)
        counts.append(int((np.asarray(batch["targets"]) != IGNORED).sum()))
    assert (len(counts), sum(counts)) == (held.num_batches, held.tokens)
    assert len(set(counts)) > 1
    np.testing.assert_allclose(held.weights, np.array(counts) / np.mean(counts), rtol=1e-12)


HOSTILE = {
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": "more than",
    "{% set ns = namespace(s='a') %}{% for a in range(60) %}{% set ns.s = ns.s ~ ns.s %}"
    "{% endfor %}{{ ns.s }}": "",
    "{{ 'a' * 10**12 }}": "",
    "{{ 10 ** (10 ** 10) }}": "",
    "{% set n = 10 ** 10 %}{{ 10 ** n }}": "",
    "{{ '%0999999999999d' | format(1) }}": "",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "itself without end",
    "{{ messages.append(1) }}": "unsafe",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "unsafe",
    "{{ raise_exception.__globals__ }}": "the template writes nothing",
    "{{ dict.__class__ }}{{ namespace.__init__.__globals__ }}": "unsafe",
    "{% set n = namespace(__class__=1) %}": "no attribute",
    "{% include 'x' %}": "no loader",
    "{{ undefined.attribute }}": "undefined",
    "{{ messages": "line 1 of the template",
    "{% generation %}": "line 1 of the template",
}


@pytest.mark.parametrize("template", HOSTILE)
def test_hostile_templates_end_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 0.2)
    monkeypatch.setattr(chat_template, "MEMORY_BYTES", 1 << 28)
    assert HOSTILE[template] in refused(tmp_path, [{"messages": ONE}], template)


def test_a_child_that_the_system_ends_is_followed_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 0.1)
    stuck = "{% if messages[0].content == 'x' %}{% set n = 10 ** 10 %}{{ 10 ** n }}{% endif %}"
    records = [{"messages": [said("user", "x"), said("assistant", "y")]}, {"messages": ONE}]
    _, lines = made(tmp_path, records, stuck + CHATML, corrupt_records="skip")
    assert "1 conversations that cannot be read passed over" in "\n".join(lines)
    assert "1 conversations, " in lines[-1]


def rows(kind: str) -> list[dict[str, Any]]:
    if kind == "messages":
        return [{"messages": ONE, "id": 1}, {"messages": [SYSTEM, *MANY], "id": 2}]
    if kind == "lists":
        return [{"prompt": [SYSTEM, ONE[0]], "completion": ONE[1:]}]
    first, second = ("question", "answer") if kind == "question" else ("prompt", "completion")
    return [{first: "What is 1 + 1?", second: "Two, naturally."}, {first: "[1]", second: "{}"}]


@pytest.mark.parametrize("kind", ["messages", "lists", "prompt", "question"])
@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "parquet", "arrow", "array_record"])
def test_conversations_of_every_file(tmp_path: Path, kind: str, form: str) -> None:
    records, path = rows(kind), tmp_path / f"chats.{form}"
    flat = [
        {name: value if isinstance(value, str) else json.dumps(value) for name, value in r.items()}
        for r in records
    ]
    if form == "jsonl":
        write_chats(path, records)
    elif form == "json":
        path.write_text(json.dumps(records))
    elif form == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(flat[0]))
            writer.writeheader()
            writer.writerows(flat)
    elif form == "parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(records), path)
    elif form == "arrow":
        table = pa.Table.from_pylist(records)
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    else:
        out = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        for each in records:
            out.write(json.dumps(each).encode())
        out.close()
    text, lines = read(path, chat_tokenizer(tmp_path / "tokenizer"), seq_len=800)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer" / "tokenizer.json"))
    expected = []
    for record in records:
        if kind == "messages":
            messages = record["messages"]
        elif kind == "lists":
            messages = record["prompt"] + record["completion"]
        else:
            user, assistant = record.values()
            messages = [said("user", user), said("assistant", assistant)]
        shown = (f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
        expected.append("".join(shown))
    assert len(text) == 1
    ids, segments = text[0]["inputs"], text[0]["segment_ids"]
    found = [
        library.decode(ids[segments == number].tolist(), skip_special_tokens=False)
        for number in range(1, len(records) + 1)
    ]
    assert sorted(found) == sorted(expected)
    assert f"text: {len(records)} conversations in 1 files" in lines[0]


def test_records_that_are_no_conversations_are_named(tmp_path: Path) -> None:
    bad: list[tuple[Any, str]] = [
        ({"text": "a"}, "no field messages, or prompt and completion, or question and answer"),
        ({"messages": "hello"}, "messages is text, not a list of messages"),
        ({"messages": [1]}, "message 1 is a number"),
        ({"messages": [{"from": "human", "value": "a"}]}, "has no role that is text; its fields"),
        ({"messages": ONE, "tools": [1]}, "tools is a list, not a list of objects"),
        ({"messages": ONE, "chat_template_kwargs": 3}, "chat_template_kwargs is a number"),
        ([], "a list, not an object"),
    ]
    for record, what in bad:
        assert what in refused(tmp_path, [record])
    _, lines = made(
        tmp_path, [{"messages": ONE}, *(each for each, _ in bad)], corrupt_records="skip"
    )
    assert f"{len(bad)} corrupt records passed over" in "\n".join(lines)
    assert "train_data_columns=[FIELD]" in refused(tmp_path, [{"chat": ONE}])
    text, _ = made(tmp_path, [{"chat": ONE}], train_data_columns=("chat",))
    assert len(text) == 1


def test_a_conversation_of_over_4_mib_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversations, "PIECE_BYTES", 100)
    assert "a conversation of " in refused(tmp_path, [{"messages": MANY}])


def test_text_beside_conversations_is_passed_over_or_refused(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_chats(folder / "a.jsonl", [{"messages": ONE}])
    (folder / "notes.txt").write_text("hello")
    tokenizer = chat_tokenizer(tmp_path / "tokenizer")
    _, lines = read(folder, tokenizer)
    assert "passed over: " in lines[1]
    assert "notes.txt is text" in lines[1]
    with pytest.raises(UserError, match=r"notes\.txt is text, and conversations"):
        read(folder / "notes.txt", tokenizer)


def config_of(folder: Path, **keys: Any) -> DataConfig:
    return DataConfig(use_sft=True, dataset_path=("a",), tokenizer_path=str(folder), **keys)


def test_where_the_template_is_found(tmp_path: Path) -> None:
    folder = chat_tokenizer(tmp_path / "one")
    found = find_chat_template(config_of(folder))
    assert (dict(found.texts), found.name) == (
        {"default": CHATML}, str(folder / "tokenizer_config.json")
    )  # fmt: skip
    assert dict(found.variables) == {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "chat_template.jinja").write_text(QWEN)
    assert dict(find_chat_template(config_of(folder)).texts) == {"default": QWEN}
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text(LLAMA)
    assert dict(find_chat_template(config_of(folder)).texts) == {"default": QWEN, "rag": LLAMA}
    assert find_chat_template(config_of(folder, chat_template="rag")).texts["default"] == LLAMA
    by_text = find_chat_template(config_of(folder, chat_template="{{ messages }}"))
    assert dict(by_text.texts) == {"default": "{{ messages }}"}
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"chat_template": MARKED}))
    named = find_chat_template(config_of(folder, chat_template_path=str(other)))
    assert (named.texts["default"], named.name) == (MARKED, f"chat_template_path={other}")
    several = [{"name": "a", "template": CHATML}, {"name": "tool_use", "template": QWEN}]
    folder = chat_tokenizer(tmp_path / "several", None, chat_template=several)
    with pytest.raises(UserError, match="a, tool_use and none by the name default"):
        find_chat_template(config_of(folder))
    with pytest.raises(UserError, match="chat_template=rag is no template"):
        find_chat_template(config_of(folder, chat_template="rag"))
    with pytest.raises(UserError, match="has no chat template"):
        find_chat_template(config_of(chat_tokenizer(tmp_path / "none", None)))
    with pytest.raises(UserError, match="no text, nor a list of names"):
        find_chat_template(config_of(chat_tokenizer(tmp_path / "odd", None, chat_template=[1])))
    with pytest.raises(UserError, match="the tokenizer is bytes"):
        find_chat_template(config_of(Path("bytes")))
    silent = chat_tokenizer(tmp_path / "silent", LLAMA)
    (silent / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "</s>", "chat_template": LLAMA})
    )
    with pytest.raises(UserError, match="writes bos_token, which no file beside"):
        find_chat_template(config_of(silent))


def test_conversations_with_tools_have_the_template_for_them(tmp_path: Path) -> None:
    both = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": QWEN}]
    folder = chat_tokenizer(tmp_path / "tokenizer", None, chat_template=both)
    path = write_chats(tmp_path / "a.jsonl", [{"messages": ONE, "tools": TOOLS}, {"messages": ONE}])
    text, _ = read(path, folder, seq_len=600)
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    written = library.decode(text[0]["inputs"].tolist(), skip_special_tokens=False)
    assert written.count("<tools>") == 1
    assert "température" in written


@pytest.mark.parametrize(
    ("keys", "part"),
    [
        ({"dataset_type": "synthetic", "dataset_path": ()}, "synthetic, which reads no convers"),
        ({"dataset_path": ()}, "without dataset_path"),
        ({"split_special_tokens": True}, "the marks of the chat template as letters"),
        ({"train_data_columns": ("a", "b", "c")}, "is not one field"),
        ({"use_sft": False, "chat_template": "x"}, "chat_template=x has no effect"),
        ({"use_sft": False, "chat_template_path": "x"}, "chat_template_path=x has no effect"),
    ],
)
def test_keys_that_do_not_go_together(keys: dict[str, Any], part: str) -> None:
    given: dict[str, Any] = {"use_sft": True, "dataset_path": ("a",), **keys}
    with pytest.raises(UserError, match=part.replace("(", r"\(")):
        DataConfig(**given)
