"""Read tokenizers of SentencePiece and tiktoken, special tokens in text, and refuse what is none.

tests/parity/test_tokenizers.py compares their tokens with transformers'; here the libraries judge.
"""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken

from moe_shard.config.schema import DataConfig
from moe_shard.data.corpus import TokenCorpus
from moe_shard.data.found_text import find_text
from moe_shard.data.sentencepiece_tokenizer import SentencePieceTokenizer
from moe_shard.data.tiktoken_tokenizer import TiktokenTokenizer
from moe_shard.data.tokenizer import ByteTokenizer, find_tokenizer, require_chosen, tokenizer_line
from moe_shard.errors import UserError

LINES = [
    "the cat sat on the mat",
    "die Katze saß auf der Matte",
    "кот сидел",
    "猫坐在垫子上",
    " a  b\n\n",
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path.with_name(f"{tmp_path.name}-cache")))


@pytest.fixture(scope="module")
def model() -> bytes:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 5), model_writer=out, vocab_size=340, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return out.getvalue()


def directory(folder: Path, content: bytes, **settings: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(content)
    written = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(written | settings))
    return folder


def refused(path: Path, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        find_tokenizer(str(path))
    assert len(str(caught.value).splitlines()) <= 3
    assert "\nfix: " in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_a_tokenizer_model_is_read_by_its_library(tmp_path: Path, model: bytes) -> None:
    folder = directory(tmp_path, model, add_bos_token=True)
    found = find_tokenizer(str(folder))
    assert isinstance(found, SentencePieceTokenizer)
    judge = sentencepiece.SentencePieceProcessor(model_proto=model)
    texts = [line for line in LINES if not line.startswith(" ")]
    encoded = found.encode_texts([text.encode() for text in texts])
    assert [ids.tolist() for ids in encoded] == judge.encode(texts)
    assert [found.decode(ids.tolist()) for ids in encoded] == texts
    assert (found.before, found.after, found.ends) == ((1,), (2,), frozenset({2}))
    assert found.encode_prompt("the cat") == [1, *judge.encode("the cat")]
    assert found.encode_prompt("") == [1]
    assert found.vocab_size == judge.get_piece_size()
    assert found.marks == "<s> TEXT </s>"
    assert find_tokenizer(str(folder / "tokenizer.model")).digest == found.digest
    directory(tmp_path, model)
    without = find_tokenizer(str(folder))
    assert (without.before, without.after, without.marks) == ((2,), (), "</s> TEXT")
    (folder / "tokenizer_config.json").unlink()
    assert find_tokenizer(str(folder)).ends == {2}  # what the model itself says


def ranks_of() -> dict[bytes, int]:
    ranks = {bytes([byte]): byte for byte in range(256)}
    return ranks | {token: 256 + n for n, token in enumerate([b"th", b"the", b" c", b" ca", b"at"])}


def test_ranks_are_read_by_tiktoken(tmp_path: Path) -> None:
    ranks = ranks_of()
    lines = [base64.b64encode(token) + b" %d" % rank for token, rank in ranks.items()]
    decoder = {"261": {"content": "<s>"}, "270": {"content": "</s>"}}
    folder = directory(
        tmp_path, b"\n".join(lines) + b"\n", added_tokens_decoder=decoder, add_bos_token=True
    )
    found = find_tokenizer(str(folder), split_special_tokens=False)
    assert isinstance(found, TiktokenTokenizer)
    judge = tiktoken.Encoding(
        "judge", pat_str=r"\S+| \S+|\s+", mergeable_ranks=ranks, special_tokens={}
    )
    [ids] = found.encode_texts([b"the cat the"])
    assert ids.tolist() == judge.encode("the cat the")
    assert found.encode_texts([b"the</s>"])[0].tolist() == [257, 270]
    letters = find_tokenizer(str(folder))
    assert letters.encode_texts([b"the</s>"])[0].tolist() == [257, *b"</s>"]
    assert (found.before, found.after, found.vocab_size) == ((261,), (270,), 271)
    assert found.decode([261, 257, 259, 116, 270, 999]) == "the cat"
    assert found.encode_prompt("the") == [261, 257]
    (folder / "tokenizer.model").rename(folder / "qwen.tiktoken")
    assert find_tokenizer(str(folder)).encode_prompt("the") == [261, 257]
    (folder / "qwen.tiktoken").write_bytes(b"\n".join(lines[1:]))
    refused(folder, "leave out numbers")


def test_special_tokens_in_the_text_are_those_or_letters_and_are_counted(
    tmp_path: Path, model: bytes
) -> None:
    folder = directory(tmp_path / "model", model, add_bos_token=True)
    (tmp_path / "a.jsonl").write_text('{"text": "<s>the cat</s> the"}\n{"text": "a"}\n')
    config = DataConfig(dataset_path=(str(tmp_path / "a.jsonl"),), tokenizer_path=str(folder))
    said: list[str] = []
    documents = find_text(config, config.dataset_path).documents
    judge = sentencepiece.SentencePieceProcessor(model_proto=model)
    lengths = []
    for split in (False, True):
        found = find_tokenizer(str(folder), split_special_tokens=split)
        corpus = TokenCorpus(documents, found, say=said.append)
        lengths.append(corpus.lengths.tolist())
        ids = corpus.read(0, 0, int(corpus.lengths[0])).tolist()
        assert ({1, 2} <= set(ids)) is not split
        if split:
            assert ids == judge.encode("<s>the cat</s> the")
    assert lengths[0] != lengths[1]
    assert "2 special tokens were written in the text" in said[0]
    assert "special tokens" not in said[1]
    line = tokenizer_line(config, find_tokenizer(str(folder)))
    assert "<s> TEXT </s>" in line
    assert "split_special_tokens=false" in line


def test_text_that_is_not_utf8_throughout_is_counted(tmp_path: Path, model: bytes) -> None:
    folder = directory(tmp_path / "model", model)
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    paths[0].write_bytes(b"the cat " * 1000 + b"\xff")  # beyond what is looked at first
    paths[1].write_bytes(b"the cat")
    said: list[str] = []
    TokenCorpus(paths, find_tokenizer(str(folder)), say=said.append)
    assert "1 documents (or pieces of 4 MiB) are not UTF-8" in said[0]


def test_a_directory_without_a_tokenizer_is_never_read_as_bytes(
    tmp_path: Path, model: bytes
) -> None:
    refused(tmp_path, "No such file", "tokenizer.model", "tokenizer_path=bytes")
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("")
    refused(tmp_path, "vocab.json and merges.txt", "save_pretrained")
    for content in (
        b"sentencepiece bytes",
        b"",
        b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02",
        b"YQ== x",
    ):
        directory(tmp_path, content)
        refused(tmp_path, "tokenizer.model", "another tokenizer_path")
    directory(tmp_path, model, eos_token="<none>")
    refused(tmp_path, "eos_token <none> is not in tokenizer.model")


def test_bytes_are_asked_for_or_fit_the_vocabulary() -> None:
    assert isinstance(find_tokenizer("bytes"), ByteTokenizer)
    require_chosen(DataConfig(), 320)
    require_chosen(DataConfig(tokenizer_path="bytes"), 32_000)
    with pytest.raises(UserError, match="no tokenizer: vocab_size=32000") as caught:
        require_chosen(DataConfig(), 32_000)
    assert "tokenizer_path=bytes" in str(caught.value)
    assert "as tokenizer_path is not set" in tokenizer_line(DataConfig(), ByteTokenizer())
