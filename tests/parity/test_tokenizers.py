"""Compare the tokens of every kind of tokenizer with transformers', on a corpus in eight scripts.

The tokenizers are trained here, on that corpus: nothing is downloaded.
"""

from __future__ import annotations

import base64
import importlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from moe_shard.data.tokenizer import find_tokenizer

pytestmark = pytest.mark.parity

CORPUS = [
    "The quick brown fox jumps over the lazy dog. 12345 + 678 = 13023!",
    "Les naïfs ægithales hâtifs pondant à Noël où il gèle; ﬁn ½ ①.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "敏捷的棕色狐狸跳过懒狗。数据很重要。",
    "いろはにほへと ちりぬるを ワガヨタレソ",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा",
    "نص حكيم له سر قاطع وذو شأن عظيم",
    "다람쥐 헌 쳇바퀴에 타고파",
    "def f(x):\n\treturn x  ** 2\n\n\n# done   ",
    "🦊 jumps 𝄞 over\u200d zwj",
]
SPACES = ["", " ", "a", " a", "  a", "a ", "\n", "\na", "a\n\nb", "\ta", "a  b   c"]
WRITTEN = [
    "<s>", "</s>", "a</s>", "</s>a", "</s> a", " </s> a", "a </s> b</s>c", "<s>a<s> b<s>\nc",
    "<unk>a", "x<unk> <s></s>y", "<|im_start|>user\nhello<|im_end|>\n<|im_start|>", "</ s> <s >",
]  # fmt: skip
EXTRA = {"<|im_start|>": 5000, "<|im_end|>": 5001}


def piece_model(folder: Path, kind: str, **settings: Any) -> Path:
    """Train a tokenizer.model as one of the published families has it."""
    trained: dict[str, dict[str, Any]] = {
        "llama": {"model_type": "bpe", "byte_fallback": True, "split_digits": True,
                  "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
                  "allow_whitespace_only_pieces": True},
        "t5": {"model_type": "unigram", "bos_id": -1, "pad_id": 0, "eos_id": 1, "unk_id": 2},
        "gemma": {"model_type": "bpe", "byte_fallback": True, "add_dummy_prefix": False,
                  "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
                  "allow_whitespace_only_pieces": True},
    }  # fmt: skip
    classes = {"llama": "LlamaTokenizer", "t5": "T5Tokenizer", "gemma": "GemmaTokenizer"}
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 4), model_writer=out,
        vocab_size=420 if kind == "t5" else 800, hard_vocab_limit=False, minloglevel=2,
        character_coverage=1.0, **trained[kind],
    )  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(out.getvalue())
    begins = {} if kind == "t5" else {"bos_token": "<s>"}
    written = {"tokenizer_class": classes[kind], "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(written | begins | settings))
    return folder


def byte_level(folder: Path) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(CORPUS * 4, trainer)
    folder.mkdir(parents=True)
    return made


def fast(folder: Path, kind: str) -> Path:
    """Write a tokenizer.json as one of the published families has it."""
    if kind == "wordpiece":
        made = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
        made.normalizer = normalizers.BertNormalizer()
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer: Any = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["<unk>"],
                                                 show_progress=False)  # fmt: skip
        made.train_from_iterator(CORPUS, trainer)
        folder.mkdir(parents=True)
    elif kind == "unigram":
        made = tokenizers.Tokenizer(models.Unigram())
        made.normalizer = normalizers.NFKC()
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        made.decoder = decoders.Metaspace(prepend_scheme="first")
        trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=["<unk>"],
                                          unk_token="<unk>", show_progress=False)  # fmt: skip
        made.train_from_iterator(CORPUS * 4, trainer)
        folder.mkdir(parents=True)
    else:
        made = byte_level(folder)
    made.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    if kind != "gpt":
        number = made.token_to_id("<s>")
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A" if kind != "wordpiece" else "<s> $A </s>", pair="<s> $A $B",
            special_tokens=[("<s>", number), ("</s>", made.token_to_id("</s>"))],
        )  # fmt: skip
    made.save(str(folder / "tokenizer.json"))
    written = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(written))
    return folder


def theirs_of(folder: Path) -> Any:
    """Return what transformers reads from a directory."""
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder)


def ranks(folder: Path) -> tuple[Path, Any]:
    """Write a tiktoken file, and return what transformers makes of it."""
    import transformers

    made = byte_level(folder)
    # As an attribute of transformers the name is also a function's, whichever came last.
    slow = importlib.import_module("transformers.convert_slow_tokenizer")
    converter = slow.bytes_to_unicode()
    back = {char: byte for byte, char in converter.items()}
    vocab = made.get_vocab()
    lines = []
    for name, rank in sorted(vocab.items(), key=lambda each: each[1]):
        token = bytes(back[char] for char in name)
        lines.append(base64.b64encode(token) + b" " + str(rank).encode())
    (folder / "tokenizer.model").write_bytes(b"\n".join(lines) + b"\n")
    names = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    added = {
        str(len(vocab) + n): {"content": name, "special": True} for n, name in enumerate(names)
    }
    written = {"added_tokens_decoder": added, "bos_token": "<s>", "eos_token": "</s>",
               "add_bos_token": True}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(written))
    converted = slow.TikTokenConverter(
        vocab_file=str(folder / "tokenizer.model"), extra_special_tokens=names
    ).converted()
    return folder, transformers.PreTrainedTokenizerFast(tokenizer_object=converted)


def assert_equal(folder: Path, theirs: Any, *, begins: bool = True) -> None:
    ours = find_tokenizer(str(folder), split_special_tokens=False)
    letters = find_tokenizer(str(folder), split_special_tokens=True)
    lines = [*CORPUS, *SPACES, *WRITTEN, "\n".join(CORPUS), " ".join(CORPUS[::-1])]
    expected = [theirs(text, add_special_tokens=False).input_ids for text in lines]
    found = ours.encode_texts([text.encode() for text in lines])
    for text, ids, wanted in zip(lines, found, expected, strict=True):
        assert ids.tolist() == wanted, (text, theirs.convert_ids_to_tokens(wanted), ids)
    for text in lines:
        if text and begins:
            assert ours.encode_prompt(text) == theirs(text).input_ids, text
    plain = [*CORPUS, *SPACES]
    for text, ids in zip(plain, letters.encode_texts([t.encode() for t in plain]), strict=True):
        assert ids.tolist() == theirs(text, add_special_tokens=False).input_ids, text
    for text, ids in zip(WRITTEN, letters.encode_texts([t.encode() for t in WRITTEN]), strict=True):
        assert not set(ids.tolist()) & {theirs.bos_token_id, theirs.eos_token_id} - {None}, text
    eos = theirs.eos_token_id if theirs.eos_token_id is not None else theirs.vocab["</s>"]
    assert eos in ours.ends
    for text, ids in zip(CORPUS, found, strict=False):
        decoded = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert ours.decode(ids.tolist()) == decoded, text


@pytest.mark.parametrize("kind", ["gpt", "llama3", "wordpiece", "unigram"])
def test_tokenizer_json(tmp_path: Path, kind: str) -> None:
    folder = fast(tmp_path / kind, kind)
    assert_equal(folder, theirs_of(folder))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {"add_bos_token": True}),
        ("llama", {}),
        ("llama", {"legacy": True, "add_bos_token": True}),
        ("llama", {"legacy": False, "add_bos_token": False}),
        ("llama", {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
                   "added_tokens_decoder": {str(number): {"content": name, "special": True}
                                            for name, number in EXTRA.items()}}),
        ("gemma", {"add_bos_token": True}),
        ("t5", {}),
    ],
)  # fmt: skip
def test_sentencepiece(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    folder = piece_model(tmp_path / kind, kind, **settings)
    theirs = theirs_of(folder)
    if "added_tokens_decoder" in settings:  # theirs gives new tokens the next free ids
        numbers = {name: theirs.convert_tokens_to_ids(name) for name in EXTRA}
        settings["added_tokens_decoder"] = {
            str(number): {"content": name, "special": True} for name, number in numbers.items()
        }
        folder = piece_model(tmp_path / "again", kind, **settings)
    assert_equal(folder, theirs, begins=kind != "t5")  # T5's prompts end with </s>


def test_tiktoken(tmp_path: Path) -> None:
    folder, theirs = ranks(tmp_path / "ranks")
    theirs.eos_token = "</s>"
    assert_equal(folder, theirs, begins=False)
    ours = find_tokenizer(str(folder))
    first = ours.encode_prompt("a")
    assert first == [theirs.convert_tokens_to_ids("<s>"), *theirs("a").input_ids]
    assert ours.before == (first[0],)
