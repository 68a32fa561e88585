"""Define the keys of the text: which files, what is read of them, by which tokenizer."""

from __future__ import annotations

import dataclasses
import datetime
from typing import Annotated, Literal, get_args

from moe_shard.config.keys import Key, check_leaves, shown
from moe_shard.errors import UserError

DatasetType = Literal["text", "synthetic"]
CorruptRecords = Literal["stop", "skip"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Describe where the text comes from.

    Attributes:
        dataset_type: a `DatasetType`; "synthetic" is one batch of random tokens, the same in every
            step, for benchmarks.
        dataset_path: files, directories or globs of text, JSON Lines, Parquet and the like; empty:
            the source text of Python's standard library.
        dataset_weights: weight of each item of `dataset_path`, which then is a dataset of its own
            with that share of the sequences; empty: all are one, in proportion to their size.
        train_data_columns: the one field of a record that holds its text; with `use_sft` the one
            with messages, or those of a prompt and what completes it.
        train_split: split that is read of a directory whose files are named by split.
        dataset_encoding: codec of text that is not UTF-8 and has no byte-order mark; empty: it is
            read as bytes, or each byte that is none of UTF-8's as U+FFFD.
        corrupt_records: a `CorruptRecords`; "stop" ends the command, "skip" counts and names them.
        tokenizer_path: a Hugging Face model directory, a tokenizer.json, a tokenizer.model of
            SentencePiece or ranks of tiktoken; "bytes": each byte is a token, as without it where
            the vocabulary is that small.
        use_sft: read conversations, each whole in a sequence; tokens by a chat template.
        sft_train_on_completion_only: whether only what the assistant says is trained on.
        packing: whether a sequence holds as many conversations as fit, or one.
        chat_template: name of one of the tokenizer's templates, or the text of one.
        chat_template_path: file with a template; empty: the tokenizer's own.
        chat_template_date: day that a template writes where it asks for today's, as YYYY-MM-DD.
        split_special_tokens: read special tokens that the text has, such as "</s>", as its
            letters; transformers' name and default.
        eval_dataset_path: text to evaluate on, each a dataset of its own; NAME=PATH names it.
        eval_holdout_fraction: fraction of the documents of `dataset_path` that are evaluated on and
            not trained on.
        eval_data_columns: as `train_data_columns`, of `eval_dataset_path`.
        eval_split: as `train_split`, of `eval_dataset_path`.
        seed: see `TrainConfig`.
    """

    dataset_type: Annotated[DatasetType, Key(choices=get_args(DatasetType))] = "text"
    dataset_path: Annotated[tuple[str, ...], Key()] = ()
    dataset_weights: Annotated[tuple[float, ...], Key(above=0)] = ()
    train_data_columns: Annotated[tuple[str, ...], Key()] = ("text",)
    train_split: Annotated[str, Key()] = "train"
    dataset_encoding: Annotated[str, Key()] = ""
    corrupt_records: Annotated[CorruptRecords, Key(choices=get_args(CorruptRecords))] = "stop"
    tokenizer_path: Annotated[str, Key()] = ""
    use_sft: Annotated[bool, Key()] = False
    sft_train_on_completion_only: Annotated[bool, Key()] = True
    packing: Annotated[bool, Key()] = True
    chat_template: Annotated[str, Key()] = ""
    chat_template_path: Annotated[str, Key()] = ""
    chat_template_date: Annotated[str, Key()] = ""
    split_special_tokens: Annotated[bool, Key()] = False
    eval_dataset_path: Annotated[tuple[str, ...], Key()] = ()
    eval_data_columns: Annotated[tuple[str, ...], Key()] = ("text",)
    eval_split: Annotated[str, Key()] = "validation"
    eval_holdout_fraction: Annotated[float, Key(least=0, below=1)] = 0.0
    seed: Annotated[int, Key(least=0, below=2**32)] = 0

    def __post_init__(self) -> None:
        check_leaves(self)
        if self.dataset_type == "synthetic" and self.dataset_path:
            raise UserError(
                f"dataset_path={shown(self.dataset_path)} with dataset_type=synthetic, which reads "
                "no text\nfix: dataset_type=text, or no dataset_path"
            )
        self._check_weights()
        self._check_chat()
        for key, columns in (
            ("train_data_columns", self.train_data_columns),
            ("eval_data_columns", self.eval_data_columns),
        ):
            if self.use_sft and len(columns) in (1, 2) and all(columns):
                continue
            if len(columns) != 1 or not columns[0]:
                raise UserError(
                    f"{key}={shown(columns)} is not one field, and a document is one text here\n"
                    f"fix: {key}=[text], or the name of another field"
                )
        if self.dataset_encoding:
            try:
                b"a".decode(self.dataset_encoding)
            except UnicodeError:
                pass  # a codec of text that needs more bytes
            except (LookupError, ValueError):
                raise UserError(
                    f"dataset_encoding={shown(self.dataset_encoding)} is no codec of text\n"
                    "fix: dataset_encoding=latin-1, cp1252 or shift_jis, for example"
                ) from None

    def _check_weights(self) -> None:
        weights = self.dataset_weights
        if not weights:
            return
        if len(weights) != len(self.dataset_path) or len(weights) < 2:
            raise UserError(
                f"dataset_weights={shown(weights)} are {len(weights)} for "
                f"{len(self.dataset_path)} items of dataset_path\n"
                "fix: a weight for each item, of two at least"
            )
        if self.eval_holdout_fraction:
            raise UserError(
                f"eval_holdout_fraction={self.eval_holdout_fraction:g} keeps documents of one "
                "dataset, and dataset_weights makes several\nfix: eval_dataset_path=FILES"
            )

    def _check_chat(self) -> None:
        if self.use_sft and self.dataset_type != "text":
            raise UserError(
                f"use_sft=true with dataset_type={self.dataset_type}, which reads no conversations"
                "\nfix: dataset_type=text, or use_sft=false"
            )
        if self.use_sft and not self.dataset_path:
            raise UserError(
                "use_sft=true without dataset_path: there are no conversations to read\n"
                "fix: dataset_path=FILES, JSON Lines or Parquet"
            )
        if self.use_sft and self.split_special_tokens:
            raise UserError(
                "split_special_tokens=true would read the marks of the chat template as letters\n"
                "fix: split_special_tokens=false with use_sft=true"
            )
        if not self.packing and not self.use_sft:
            raise UserError(
                "packing=false pads conversations, and use_sft=false reads text, which is cut into "
                "sequences without padding\nfix: packing=true, or use_sft=true"
            )
        for key in ("chat_template", "chat_template_path", "chat_template_date"):
            if getattr(self, key) and not self.use_sft:
                raise UserError(
                    f"{key}={shown(getattr(self, key))} has no effect: use_sft=false reads text\n"
                    f"fix: use_sft=true, or no {key}"
                )
        try:
            day = datetime.date.fromisoformat(self.chat_template_date or "2000-01-01")
            usual = day.isoformat() == (self.chat_template_date or "2000-01-01")
        except ValueError:
            usual = False
        if not usual:
            raise UserError(
                f"chat_template_date={shown(self.chat_template_date)} is no day\n"
                f"fix: chat_template_date={datetime.date.today().isoformat()}"
            )
