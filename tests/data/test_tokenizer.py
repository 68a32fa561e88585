"""Load tokenizers from files: their tokens, how their documents are packed, what is refused.

Most are of whole words, so that a test can count tokens with `str.split`.
"""

from __future__ import annotations

import io
import json
import math
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from tokenizers import decoders, models, pre_tokenizers, trainers

from moe_shard.config import load_config
from moe_shard.config.schema import DataConfig
from moe_shard.data import corpus as corpora
from moe_shard.data.batches import batches
from moe_shard.data.corpus import TokenCorpus, corpus_cache
from moe_shard.data.documents import find_documents
from moe_shard.data.packed_text import PackedText
from moe_shard.data.tokenizer import (
    DOCUMENT,
    ByteTokenizer,
    FileTokenizer,
    find_tokenizer,
    require_vocabulary,
)
from moe_shard.errors import UserError
from moe_shard.training.progress import ProgressLine

WORDS = ["<unk>", "<s>", "</s>", *["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"]]
ID = {word: number for number, word in enumerate(WORDS)}
BOS, EOS = 1, 2
FIELDS = ["inputs", "targets", "positions", "segment_ids"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def words(folder: Path, *, bos: bool = False, eos: Any = EOS, **changes: Any) -> Path:
    """Write a model directory whose tokens are words; `bos` puts a BOS token before each text."""
    special = [
        {
            "id": number,
            "content": WORDS[number],
            "special": True,
            **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
        }
        for number in (BOS, EOS)
    ]
    text: dict[str, Any] = {"Sequence": {"id": "A", "type_id": 0}}
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [begin, text],
        "pair": [text, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [BOS], "tokens": ["<s>"]}},
    }
    content = {
        "version": "1.0",
        "added_tokens": special,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": template if bos else None,
        "model": {"type": "WordLevel", "vocab": ID, "unk_token": "<unk>"},
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": eos}))
    return folder


def text_of(folder: Path, documents: list[str]) -> tuple[Path, ...]:
    folder.mkdir(parents=True, exist_ok=True)
    for number, document in enumerate(documents):
        (folder / f"{number}.txt").write_text(document)
    return find_documents([str(folder)])


def random_documents(count: int = 12, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS[3:], rng.integers(1, 30))) for _ in range(count)]


def by_hand(document: str, *, bos: bool) -> list[int]:
    tokens = [ID.get(word, 0) for word in document.split()]
    return [BOS, *tokens, EOS] if bos else [EOS, *tokens]


def short(error: UserError, *parts: str) -> None:
    lines = str(error).splitlines()
    assert len(lines) <= 3, error
    assert lines[-1].startswith("fix: "), error
    for part in parts:
        assert part in str(error)


# Packing.


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("seq_len", [1, 4, 17])
def test_rows_equal_a_plain_loop(tmp_path: Path, bos: bool, seq_len: int) -> None:
    documents = [*random_documents(), "unknown words", "   \n"]
    paths = text_of(tmp_path / "text", documents)
    tokenizer = FileTokenizer(words(tmp_path / "model", bos=bos))
    text = PackedText(paths, seq_len=seq_len, seed=3, tokenizer=tokenizer)
    stream: list[int] = []
    begins = set()
    for path in text.paths:
        begins.add(len(stream))
        stream += by_hand(Path(path).read_text(), bos=bos)
    assert len(text) == (len(stream) - 1) // seq_len
    for row in range(len(text)):
        start = row * seq_len
        position, segment, expected = -1, 1, {name: list[int]() for name in FIELDS}
        for place in range(start, start + seq_len):
            position += 1
            if place in begins and place > start:
                position, segment = 0, segment + 1
            found = (stream[place], stream[place + 1], position, segment)
            for name, value in zip(FIELDS, found, strict=True):
                expected[name].append(value)
        assert {name: x.tolist() for name, x in text[row].items()} == expected
    assert sorted(text.paths) == sorted(map(str, paths))


def take(source: DataConfig, steps: int, first_step: int = 0, vocab_size: int = 13) -> list[Any]:
    sharding = NamedSharding(Mesh(jax.devices(), "x"), PartitionSpec(None, "x", None))
    made = batches(
        source,
        vocab_size=vocab_size,
        seq_len=8,
        rows=8,
        microbatches=1,
        sharding=sharding,
        first_step=first_step,
    )
    try:
        return [np.asarray(next(made)["inputs"]).tolist() for _ in range(steps)]
    finally:
        made.close()


def test_a_resumed_run_goes_on_and_needs_no_tokenizing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text_of(tmp_path / "text", random_documents(40))
    model = words(tmp_path / "model")
    source = DataConfig(
        dataset_type="text",
        dataset_path=(str(tmp_path / "text"),),
        tokenizer_path=str(model),
        seed=1,
    )
    whole = take(source, 6)

    def never(*_: Any) -> None:
        raise AssertionError("tokenized again")

    monkeypatch.setattr(FileTokenizer, "encode_texts", never)
    assert take(source, 2, first_step=4) == whole[4:]
    assert take(DataConfig(**{**vars(source), "seed": 2}), 1) != whole[:1]


def test_the_vocabulary_may_be_larger_than_the_tokenizers_and_not_smaller(tmp_path: Path) -> None:
    text_of(tmp_path / "text", random_documents(40))
    model = str(words(tmp_path / "model") / "tokenizer.json")
    source = DataConfig(
        dataset_type="text", dataset_path=(str(tmp_path / "text"),), tokenizer_path=model, seed=1
    )
    assert take(source, 1, vocab_size=100) == take(source, 1)
    with pytest.raises(UserError) as caught:
        take(source, 1, vocab_size=12)
    short(caught.value, "vocab_size=12", "13 tokens of tokenizer_path=", "vocab_size=13 or more")
    require_vocabulary(ByteTokenizer(), 257)


def test_fingerprints_of_two_tokenizers_differ_where_the_lengths_do_not(tmp_path: Path) -> None:
    paths = text_of(tmp_path / "text", random_documents())
    other = dict(zip(WORDS, [0, 1, 2, *reversed(range(3, 13))], strict=True))
    renamed = {"type": "WordLevel", "vocab": other, "unk_token": "<unk>"}
    texts = [
        PackedText(paths, seq_len=4, seed=0, tokenizer=FileTokenizer(model))
        for model in (words(tmp_path / "one"), words(tmp_path / "two", model=renamed))
    ]
    assert texts[0].starts.tolist() == texts[1].starts.tolist()
    assert texts[0].fingerprint().tolist() != texts[1].fingerprint().tolist()
    assert texts[0][0]["inputs"].tolist() != texts[1][0]["inputs"].tolist()


# The cache.


def test_what_changes_is_tokenized_again(tmp_path: Path) -> None:
    said: list[str] = []
    documents = text_of(tmp_path / "text", ["a b", "c d e"])
    model = words(tmp_path / "model")

    def lengths() -> list[int]:
        found = TokenCorpus(
            find_documents([str(tmp_path / "text")]), FileTokenizer(model), say=said.append
        )
        assert found.num_bytes == sum(path.stat().st_size for path in documents)
        return found.lengths.tolist()

    assert lengths() == [2, 3]
    assert len(said) == 1
    assert "to 5 tokens" in said[0]
    assert lengths() == [2, 3]
    assert len(said) == 1
    documents[0].write_text(
        "e f"
    )  # the same length, and the same time stamp where clocks are coarse
    os.utime(documents[0], ns=(1, 1))
    assert lengths() == [2, 3]
    assert len(said) == 2
    words(tmp_path / "model", bos=True)
    assert lengths() == [2, 3]
    assert len(said) == 3
    for tokens in corpus_cache().glob("*/tokens"):
        tokens.write_bytes(b"cut")
    assert lengths() == [2, 3]
    assert len(said) == 4
    assert not list(corpus_cache().glob(".*"))


def test_a_cache_that_cannot_be_kept_or_goes_away_is_a_short_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = text_of(tmp_path / "text", ["a b", "c d e"])
    tokenizer = FileTokenizer(words(tmp_path / "model"))
    text = PackedText(documents, seq_len=2, seed=0, tokenizer=tokenizer)
    [tokens] = corpus_cache().glob("*/tokens")
    tokens.write_bytes(b"")
    with pytest.raises(UserError) as caught:
        text[0]
    short(caught.value, "tokens", "changed")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError) as caught:
        PackedText(documents, seq_len=2, seed=0, tokenizer=tokenizer)
    short(caught.value, "cannot keep tokens", "XDG_CACHE_HOME")


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_a_long_document_is_read_in_pieces_that_are_whole_lines_or_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(corpora, "PIECE_BYTES", size)
    document = "a bb ccc\n" * 9 + "über € 𝄞 d\n" + "no end " * 5
    [path] = text_of(tmp_path / "text", [document])
    pieces = list(corpora._pieces(path))
    assert b"".join(pieces).decode() == document
    for piece in pieces:
        piece.decode()  # raises if a character is split
    assert all(len(piece) <= 2 * size + 3 for piece in pieces)
    if size > 8:
        assert all(piece.endswith(b"\n") for piece in pieces[:-1])


# The tokens.


def test_bytes() -> None:
    found = find_tokenizer("")
    assert (found.vocab_size, found.ends) == (257, frozenset({256}))
    assert found.encode_prompt("hü") == [DOCUMENT, 104, 195, 188]
    assert found.encode_prompt("") == [DOCUMENT]
    assert found.encode_prompt(os.fsdecode(b"\xff")) == [DOCUMENT, 255]
    assert found.decode([256, 104, 195, 188, 300]) == "hü"
    assert found.decode([104, 195]) == "h\N{REPLACEMENT CHARACTER}"


def byte_level(folder: Path) -> Path:
    """Train a byte-level BPE, as GPT-2's, on a few lines."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["the cat sat on the mat, the rat sat on the cat"] * 3, trainer)
    folder.mkdir(parents=True)
    made.enable_truncation(3)
    made.enable_padding(length=9)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|end|>"}}')
    return folder


def test_a_tokenizer_of_bytes_gives_every_text_back_whole(tmp_path: Path) -> None:
    found = FileTokenizer(byte_level(tmp_path / "model"))
    assert (found.before, found.after, found.ends) == ((0,), (), frozenset({0}))
    text = "the cat sat on the mät 𝄞 <|end|> and the rat"
    [tokens] = found.encode_texts([text.encode()])
    assert 0 not in tokens  # in a document, its text is not the special token
    assert 3 < len(tokens) < len(text.encode())
    assert found.decode(tokens.tolist()) == text
    assert found.encode_prompt("the<|end|>the").count(0) == 1  # in a prompt, it is
    assert found.encode_prompt("") == [0]
    assert (
        found.encode_texts([b"\xff"])[0].tolist() == found.encode_texts(["�".encode()])[0].tolist()
    )
    assert found.decode([0, 10**6, *tokens.tolist()]) == text


def test_prompts_begin_as_the_tokenizer_has_them_begin(tmp_path: Path) -> None:
    assert FileTokenizer(words(tmp_path / "a")).encode_prompt("a b") == [3, 4]
    with_mark = FileTokenizer(words(tmp_path / "b", bos=True))
    assert with_mark.encode_prompt("a b") == [BOS, 3, 4]
    assert with_mark.encode_prompt("") == [BOS]
    assert (with_mark.before, with_mark.after) == ((BOS,), (EOS,))


def test_the_end_is_found_in_the_first_file_that_says_it(tmp_path: Path) -> None:
    model = words(tmp_path / "model", eos=None)
    (model / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    assert FileTokenizer(model).ends == {EOS}
    (model / "config.json").write_text('{"eos_token_id": 5}')
    assert FileTokenizer(model).before == (5,)
    (model / "generation_config.json").write_text('{"eos_token_id": [4, 6]}')
    found = FileTokenizer(model)
    assert (found.before, found.ends) == ((4,), frozenset({4, 6}))


def test_bits_per_byte_count_the_bytes_of_the_text(tmp_path: Path) -> None:
    documents = ["aaa bbb ccc", "d e"]  # 14 bytes; 5 words and 2 marks
    paths = text_of(tmp_path / "text", documents)
    text = PackedText(paths, seq_len=2, seed=0, tokenizer=FileTokenizer(words(tmp_path / "model")))
    assert text.bytes_per_token == pytest.approx(14 / 7)
    assert PackedText(paths, seq_len=2, seed=0).bytes_per_token == pytest.approx(14 / 16)
    out = io.StringIO()
    line = ProgressLine(
        Console(file=out, width=200), first_step=0, steps=1, log_period=1, bytes_per_token=2.0
    )
    record: dict[str, Any] = dict.fromkeys(("loss", "grad_norm", "dropped_token_fraction"), 1.0)
    record |= {"step": 0, "ce_loss": 3 * math.log(2), "tokens_per_sec_per_device": 1, "mfu": None}
    with line:
        line.show(record)
    assert "bits/byte 1.50" in out.getvalue()


# What is refused.

HOSTILE = {
    "empty": b"",
    "not JSON": b"tokens",
    "not an object": b"[]",
    "no model": b"{}",
    "deep": b"[" * 100_000,
    "not UTF-8": b"\xff\xfe\0",
    "a merge of nothing": b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}',
    "no unknown": b'{"model": {"type": "WordLevel", "vocab": {"b": 0}, "unk_token": "q"}}',
    "a mark of nothing": b"""{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
        "post_processor": {"type": "TemplateProcessing", "pair": [], "special_tokens": {},
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}]}}""",
    "SentencePiece": b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_tokenizer_is_a_short_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    (tmp_path / "config.json").write_text('{"eos_token_id": 0}')
    with pytest.raises(UserError) as caught:
        FileTokenizer(tmp_path)
    short(caught.value, "tokenizer.json is no tokenizer", "another tokenizer_path")


def test_a_file_that_is_missing_or_too_large_is_a_short_error(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        find_tokenizer("gpt2")
    short(caught.value, "gpt2: No such file", "a tokenizer.json")
    with pytest.raises(UserError) as caught:
        find_tokenizer(str(tmp_path))
    short(caught.value, "tokenizer.json: No such file")
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    os.truncate(tmp_path / "tokenizer.json", 2**40)
    with pytest.raises(UserError) as caught:
        find_tokenizer(str(tmp_path))
    short(caught.value, "larger than any tokenizer")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError) as caught:
        find_tokenizer(str(tmp_path / "pipe"))
    short(caught.value, "not a regular file")


@pytest.mark.parametrize(
    ("said", "parts"),
    [
        ({}, ["does not say which token ends a document", "generation_config.json"]),
        ({"eos_token_id": []}, ["does not say"]),
        ({"eos_token_id": 13}, ["eos_token_id 13 is no token of tokenizer.json"]),
        ({"eos_token_id": -1}, ["eos_token_id -1 is no token"]),
        ({"eos_token_id": 2**70}, ["is no token"]),
        ({"eos_token_id": True}, ["eos_token_id true is no token"]),
        ({"eos_token_id": [2, "x"]}, ["eos_token_id x is no token"]),
        ({"eos_token": "<end>"}, ["eos_token <end> is not in tokenizer.json"]),
        ({"eos_token": {}}, ["does not say", "not in"]),
        ([], ["config.json is not a JSON object"]),
    ],
)
def test_an_end_that_is_not_there_is_a_short_error(
    tmp_path: Path, said: Any, parts: list[str]
) -> None:
    model = words(tmp_path)
    (model / "config.json").write_text(json.dumps(said))
    with pytest.raises(UserError) as caught:
        FileTokenizer(model)
    short(caught.value)
    assert any(part in str(caught.value) for part in parts), caught.value


def test_settings_that_are_no_json_are_a_short_error(tmp_path: Path) -> None:
    model = words(tmp_path)
    for content in (b"{", b"\xff", b"[" * 100_000):
        (model / "config.json").write_bytes(content)
        with pytest.raises(UserError) as caught:
            FileTokenizer(model)
        short(caught.value, "config.json is not JSON")


def test_the_configuration_takes_a_path_and_asks_for_nothing_yet() -> None:
    assert load_config("mixtral-tiny", ["tokenizer_path=gpt2"]).data.tokenizer_path == "gpt2"
