"""Take a conversation from a record: its messages, or a prompt and what completes it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from moe_shard.config.keys import shown
from moe_shard.data.corpus import PIECE_BYTES
from moe_shard.data.fields import DocumentPiece, NoText, Problem, Read, json_kind, utf8

USUAL = (("messages",), ("prompt", "completion"), ("question", "answer"))
"""Fields that are looked for, in this order, where none are named."""
_TOOLS, _VARIABLES = "tools", "chat_template_kwargs"


class ConversationColumns:
    """Take a conversation from a record, as one line of JSON with `messages`.

    A field holds a list of messages, each with a role, or the text of such a list. Of two fields,
    the first is the prompt and the second what completes it: lists of messages, or texts, which
    become those of the user and the assistant. A record's `tools` and `chat_template_kwargs` (as
    TRL has it) go along.

    Args:
        columns: the fields; `text`, the default of text, stands for the usual ones.
        file: the file that is read, for messages about its conversations.
    """

    def __init__(self, columns: Sequence[str], file: str = "") -> None:
        self._file = file
        self._choices = USUAL if tuple(columns) == ("text",) else (tuple(columns),)
        self.key = repr(("conversations", self._choices))
        self.words = ", or ".join(" and ".join(map(shown, names)) for names in self._choices)

    def chosen(self, types: Mapping[str, str]) -> tuple[str, ...] | Problem:
        """Return the columns of a table that are read, or what is wrong with it."""
        names = self._found(types)
        if names is None:
            what = f"no column {self.words}"
            return Problem("its schema", what, tuple(types)[:20], rest=True)
        return (*names, *(name for name in (_TOOLS, _VARIABLES) if name in types))

    def _found(self, record: Mapping[str, Any]) -> tuple[str, ...] | None:
        return next((each for each in self._choices if all(name in record for name in each)), None)

    def read_whole(self, content: bytes, where: str) -> Read:
        """Take the conversation from a record that is JSON."""
        try:
            record = json.loads(content)
        except (ValueError, RecursionError):
            return Problem(where, "neither JSON nor a tf.train.Example")
        return self.read(record, where)

    def read(self, record: Any, where: str) -> Read:
        """Take the conversation from a record."""
        if not isinstance(record, dict):
            return Problem(where, f"{json_kind(record)}, not an object with fields")
        fields = tuple(record)[:20]
        names = self._found(record)
        if names is None:
            return Problem(where, f"no field {self.words}", fields)
        messages: list[Any] = []
        for name, role in zip(names, ("user", "assistant"), strict=False):
            part = _messages(record[name])
            if isinstance(part, str) and part and len(names) == 2:
                part = [{"role": role, "content": part}]
            if part is None or part in ("", []):
                return NoText(where)
            if not isinstance(part, list):
                what = f"{shown(name)} is {json_kind(part)}, not a list of messages"
                return Problem(where, what, fields)
            messages += part
        problem = _problem(messages)
        tools, variables = _from_json(record.get(_TOOLS)), _from_json(record.get(_VARIABLES))
        if tools is not None and not (isinstance(tools, list) and all(map(_is_object, tools))):
            problem = problem or f"{_TOOLS} is {json_kind(tools)}, not a list of objects"
        if variables is not None and not _is_object(variables):
            problem = problem or f"{_VARIABLES} is {json_kind(variables)}, not an object"
        if problem:
            return Problem(where, problem)
        place = f"{self._file}, {where}" if self._file else where
        request = {"where": place, "messages": messages, "tools": tools, "variables": variables}
        content = utf8(json.dumps(request, ensure_ascii=False, default=_as_text))
        if len(content) > PIECE_BYTES:
            return Problem(where, f"a conversation of {len(content):,} bytes; the most is 4 MiB")
        return DocumentPiece(content)


def _messages(value: Any) -> Any:
    """Read messages that are written as JSON in a text, as tables have them; leave other text."""
    read = _from_json(value)
    if isinstance(read, list) and read and all(map(_is_object, read)):
        return read
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _from_json(value: Any) -> Any:
    """Read a text as JSON; leave what is none."""
    if isinstance(value, str | bytes):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value or None
    return value


def _problem(messages: Sequence[Any]) -> str:
    """Say what is wrong with messages; empty: nothing."""
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            return f"message {number} is {json_kind(message)}, not an object with a role"
        if not isinstance(message.get("role"), str):
            names = ", ".join(map(shown, message)) or "none"
            return f"message {number} has no role that is text; its fields: {names}"
    return ""


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _as_text(value: Any) -> str:
    """Write what tables hold and JSON does not: bytes, dates."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
