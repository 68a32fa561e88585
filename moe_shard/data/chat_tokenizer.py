"""Turn conversations into tokens, of which some are trained on and the others are context."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType

import numpy as np
from jaxtyping import Bool, Int32

from moe_shard.config.keys import shown
from moe_shard.config.schema import DataConfig
from moe_shard.data.chat_template import Renderer, find_chat_template
from moe_shard.data.tokenizer import Tokenizer
from moe_shard.errors import UserError


def as_context(
    ids: Int32[np.ndarray, "T"], trained: Bool[np.ndarray, "T"]
) -> Int32[np.ndarray, "T"]:
    """Write tokens so that one number says both: ~id for a token of the context."""
    return np.where(trained, ids, ~ids)


def is_trained(tokens: Int32[np.ndarray, "*n"]) -> Bool[np.ndarray, "*n"]:
    """Return which tokens are trained on, of tokens as `as_context` writes them."""
    return tokens >= 0


def plain_ids(tokens: Int32[np.ndarray, "*n"]) -> Int32[np.ndarray, "*n"]:
    """Return the ids of tokens as `as_context` writes them."""
    return np.where(tokens < 0, ~tokens, tokens)


class ChatTokenizer:
    """Render conversations by a chat template and encode what it writes, as transformers does.

    Trained on are the tokens that have a character of what the assistant says. That is what the
    template has in `{% generation %}` blocks. Where it has none: what it writes with a message of
    the assistant, beyond what it writes to ask for one; so its end mark too. A template by which
    the one is no beginning of the other is refused.

    Use it as a context manager: conversations are rendered in a child process.

    Args:
        config: template, and what is trained on.
        tokenizer: the model's.

    Raises:
        UserError: there is no template, or it is none.

    Attributes:
        refused: conversations of no tokens so far, as `corrupt_records` is "skip".
        first_refused: the first of these and why, in words.
    """

    special: frozenset[int] = frozenset()  # those of a template are no find in a text

    def __init__(self, config: DataConfig, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._completions = config.sft_train_on_completion_only
        self._skip = config.corrupt_records == "skip"
        template = find_chat_template(config)
        self._template = template
        self._opened = ExitStack()
        self._renderer = self._opened.enter_context(
            Renderer(template, completions=self._completions)
        )
        facts = repr((self._completions, self._skip)).encode()
        self.digest = hashlib.blake2b(
            tokenizer.digest + template.digest + facts, digest_size=16
        ).digest()
        self.refused, self.first_refused = 0, ""

    def __enter__(self) -> ChatTokenizer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._opened.close()

    @property
    def line(self) -> str:
        """Say by which template conversations are read, and what is trained on."""
        if not self._completions:
            trained = "all of it (sft_train_on_completion_only=false)"
        elif set(self._template.texts) <= self._renderer.marked:
            trained = "what the template's {% generation %} blocks hold"
        else:
            trained = "what the assistant says, with its end mark"
        dated = f", dated {self._template.date}" if self._template.date else ""
        return (
            f"chat: by the template of {shown(self._template.name)}{dated}, without other marks; "
            f"trained on: {trained}"
        )

    def encode_texts(self, texts: Sequence[bytes]) -> list[Int32[np.ndarray, "T"]]:
        """Encode conversations, each as `ConversationColumns` writes it; see `as_context`.

        Raises:
            UserError: the template refuses one, and `corrupt_records` is "stop".
        """
        rendered = [self._renderer.render(text) for text in texts]
        for text, each in zip(texts, rendered, strict=True):
            if each.problem:
                where = json.loads(text)["where"]
                if not self._skip or each.fix:
                    fix = each.fix or "mend it, or corrupt_records=skip to pass over such ones"
                    raise UserError(f"{where}: {each.problem}\nfix: {fix}")
                self.refused += 1
                self.first_refused = self.first_refused or f"{where}: {each.problem}"
        # A template can write halves of surrogate pairs, which are no text.
        written = [each.text.encode("utf-8", "replace").decode() for each in rendered]
        encoded = self._tokenizer.encode_placed(written)
        return [
            as_context(tokens.ids, tokens.overlapping(each.spans))
            for tokens, each in zip(encoded, rendered, strict=True)
        ]
