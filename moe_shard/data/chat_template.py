"""Find a tokenizer's chat template, and have conversations rendered by it in a child process."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import TracebackType
from typing import Any

from moe_shard.config.keys import shown
from moe_shard.config.schema import DataConfig
from moe_shard.data.formats import needed
from moe_shard.data.tokenizer import is_bytes, tokenizer_file
from moe_shard.data.tokenizer_files import read_tokenizer, settings_beside
from moe_shard.errors import UserError
from moe_shard.files import expanded

DEFAULT = "default"
SECONDS = 10.0
"""Processor time for a conversation."""
MEMORY_BYTES = 2 << 30
"""Address space of the child that renders."""
_PROGRAM = Path(__file__).with_name("chat_render.py")  # not imported: it needs Jinja
_VERSION = 1
_VARIABLES = (
    *("bos_token", "eos_token", "unk_token", "sep_token"),
    *("pad_token", "cls_token", "mask_token"),
)
_FOLDER = "additional_chat_templates"
_FIX = "fix: chat_template_path=FILE with a template (.jinja), or a tokenizer of a chat model"


@dataclass(frozen=True)
class ChatTemplate:
    """Hold the templates of a tokenizer, of which each conversation is rendered by one.

    Attributes:
        name: where they are from, for messages.
        texts: Jinja text of each; "tool_use", if there, is for conversations with tools.
        variables: special tokens that templates write.
        date: what `strftime_now` writes, as YYYY-MM-DD; empty: a template that asks is refused.
    """

    name: str
    texts: Mapping[str, str]
    variables: Mapping[str, str]
    date: str = ""

    @property
    def digest(self) -> bytes:
        """Return a hash; equal only for templates that render all conversations alike."""
        facts = (_VERSION, dict(self.texts), dict(self.variables), self.date)
        return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).digest()


def find_chat_template(config: DataConfig) -> ChatTemplate:
    """Read the template that the configuration names, or the tokenizer's own.

    Of the tokenizer's directory: `chat_template.jinja` and the files of
    `additional_chat_templates`, or else `chat_template` in tokenizer_config.json, as transformers.

    Args:
        config: the tokenizer, `chat_template_path`, `chat_template` and `chat_template_date`.

    Raises:
        UserError: there is none, one that is named is not there, or a file is no template.
    """
    if is_bytes(config):
        raise UserError(
            "use_sft=true reads conversations by a tokenizer's chat template, and the tokenizer is "
            "bytes\nfix: tokenizer_path=DIR of a chat model"
        )
    path = expanded(config.tokenizer_path)
    file = (tokenizer_file(path) or path / "tokenizer.json") if path.is_dir() else path
    settings = settings_beside(file.with_name("tokenizer_config.json"))
    older = settings_beside(file.with_name("special_tokens_map.json"))
    if config.chat_template_path:
        chosen = expanded(config.chat_template_path)
        texts, name = _of_file(chosen), f"chat_template_path={chosen}"
    else:
        texts, name = _of_tokenizer(file, settings)
    wanted = config.chat_template
    if wanted in texts:
        texts, name = {DEFAULT: texts[wanted]}, f"{shown(wanted)} of {name}"
    elif wanted and "{" in wanted:
        texts, name = {DEFAULT: wanted}, "chat_template"
    elif wanted:
        names = ", ".join(map(shown, texts)) or "no template"
        raise UserError(
            f"chat_template={shown(wanted)} is no template of {name}, which has {names}\n"
            "fix: one of these names, the text of a template, or chat_template_path=FILE"
        )
    if not texts:
        raise UserError(f"use_sft=true: {name} has no chat template\n{_FIX}")
    if DEFAULT not in texts:
        raise UserError(
            f"{name} has the chat templates {', '.join(map(shown, texts))} and none by the name "
            f"default\nfix: chat_template={shown(next(iter(texts)))}"
        )
    variables = {
        key: text for key in _VARIABLES if (text := _token(settings.get(key, older.get(key))))
    }
    for key in ("bos_token", "eos_token"):
        unsaid = key not in settings and key not in older
        if unsaid and any(key in text for text in texts.values()):
            raise UserError(
                f"{name} writes {key}, which no file beside {file.name} names\n"
                f'fix: "{key}" in {file.with_name("tokenizer_config.json")}, or null for none'
            )
    return ChatTemplate(name, texts, variables, config.chat_template_date)


def _token(value: Any) -> str:
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else ""


def _of_tokenizer(file: Path, settings: Mapping[str, Any]) -> tuple[dict[str, str], str]:
    """Return the templates of a tokenizer's directory, and where they are from."""
    texts = {}
    alone = file.with_name("chat_template.jinja")
    if alone.is_file():
        texts[DEFAULT] = _text(alone)
    for each in sorted((file.parent / _FOLDER).glob("*.jinja")):
        texts[each.stem] = _text(each)
    if texts:
        return texts, str(alone if DEFAULT in texts else file.parent / _FOLDER)
    beside = file.with_name("tokenizer_config.json")
    name, value = str(beside), settings.get("chat_template")
    if value is None:
        older = file.with_name("chat_template.json")
        value = settings_beside(older).get("chat_template")
        name = str(older) if value is not None else name
    return _named(value, name), name


def _of_file(file: Path) -> dict[str, str]:
    if file.suffix == ".json":
        value = settings_beside(file).get("chat_template")
        if value is None:
            raise UserError(f"chat_template_path={file} has no chat_template\n{_FIX}")
        return _named(value, str(file))
    return {DEFAULT: _text(file)}


def _named(value: Any, name: str) -> dict[str, str]:
    """Read a template, or a list of templates with names, from JSON."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {DEFAULT: value}
    if isinstance(value, list):
        pairs = [
            (each.get("name"), each.get("template")) if isinstance(each, dict) else (None, None)
            for each in value
        ]
        if all(isinstance(key, str) and isinstance(text, str) for key, text in pairs):
            return {str(key): str(text) for key, text in pairs}
    raise UserError(f"{name}: chat_template is no text, nor a list of names and templates\n{_FIX}")


def _text(file: Path) -> str:
    try:
        return read_tokenizer(file).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is no template: not UTF-8\n{_FIX}") from error
    except UserError as error:
        raise UserError(f"{str(error).splitlines()[0]}\n{_FIX}") from error


_NO_ANSWER = {"error": "it takes more time or memory than any conversation needs"}


def _brief(text: str) -> str:
    return shown((text.splitlines() or [""])[0])


class Rendered:
    """Hold a rendered conversation, or why it has none.

    Attributes:
        text: the conversation; empty if there is an error.
        spans: [start, end) of what is trained on, in characters of `text`.
        problem: what is wrong.
        fix: what can be done about it; empty: mend the conversation.
    """

    def __init__(self, answer: Mapping[str, Any]) -> None:
        self.text: str = answer.get("text", "")
        self.spans: list[list[int]] = answer.get("spans", [])
        self.problem, self.fix = "", ""
        if "no_prefix" in answer:
            self.problem = (
                f"message {answer['no_prefix'] + 1}, the assistant's, is written in another way "
                "at the end of a conversation than within it, so what to train on cannot be told"
            )
            self.fix = (
                "chat_template_path=FILE whose template has {% generation %} around what the "
                "assistant says, or sft_train_on_completion_only=false"
            )
        elif answer.get("no_date"):
            self.problem = "the template writes the date, and a resumed run has to write the same"
            self.fix = f"chat_template_date={date.today().isoformat()}"
        elif "error" in answer:
            self.problem = f"the template refuses it: {_brief(answer['error'])}"


class Renderer:
    """Render conversations in a child process; use it as a context manager.

    Args:
        template: how.
        completions: find what the assistant says; otherwise all of the text is trained on.

    Raises:
        UserError: the template is no template, or Jinja is not installed.

    Attributes:
        marked: names of templates that say themselves what the assistant says.
    """

    def __init__(self, template: ChatTemplate, *, completions: bool) -> None:
        needed("jinja2", "use_sft=true")
        self._name = template.name
        self._setup = {
            "templates": dict(template.texts),
            "variables": dict(template.variables),
            "date": template.date,
            "completions": completions,
            "seconds": SECONDS,
            "memory": MEMORY_BYTES,
        }
        self._start()

    def _start(self) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-P", str(_PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        answer = self._ask(self._setup)
        if answer is None or "error" in answer:
            self.close()
            why = (answer or _NO_ANSWER)["error"]
            raise UserError(f"{self._name}: {_brief(why)}\n{_FIX}")
        self.marked = frozenset(answer["marked"])

    def __enter__(self) -> Renderer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the child."""
        self._child.kill()
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe:
                pipe.close()
        self._child.wait()

    def render(self, conversation: bytes) -> Rendered:
        """Render one conversation.

        Args:
            conversation: JSON, as `conversations.conversation_json` writes it.
        """
        answer = self._ask(json.loads(conversation))
        if answer is None:  # the system has ended the child
            self.close()
            self._start()
            answer = _NO_ANSWER
        return Rendered(answer)

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any] | None:
        assert self._child.stdin
        assert self._child.stdout
        try:
            self._child.stdin.write(json.dumps(request).encode() + b"\n")
            self._child.stdin.flush()
            answer = self._child.stdout.readline()
        except OSError:
            answer = b""
        if not answer:
            return None
        result: dict[str, Any] = json.loads(answer)
        return result
