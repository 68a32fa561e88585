"""Render conversations by a chat template, as a program of its own.

Templates come from strangers. Jinja's sandbox keeps one from this process's objects, but nothing
in it bounds time or memory, so templates run here: in a child with limits on both, which the system
can stop. It imports Jinja and nothing of this package. It reads one JSON object a line (the first
says how to render, each later one is a conversation) and answers each with one.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

_LONGEST = 1 << 26
_REASONING = ("reasoning_content", "thinking", "reasoning")


class Generation(jinja2.ext.Extension):
    """Note where the text of `{% generation %}` blocks lies in the rendered conversation."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

    def parse(self, parser: Any) -> Any:
        """Make a call to `_noted` of the block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_noted")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _noted(self, caller: Any) -> str:
        text = str(caller())
        written: list[str] | None = getattr(self.environment, "written", None)
        if written is not None:
            start = sum(map(len, written))
            self.environment.spans.append((start, start + len(text)))  # type: ignore[attr-defined]
        return text


class SafeNamespace(jinja2.utils.Namespace):
    """Keep attributes, none of which begins with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # a template may name an attribute "self"
        namespace, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _require_plain(name)
        jinja2.utils.Namespace.__init__(namespace, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _require_plain(name)
        super().__setitem__(name, value)


def _require_plain(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no attribute {name!r}")


class NewDict:
    """Make dicts, and nothing else that the type `dict` can do."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """Make a dict."""
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """Make a dict of keys."""
        return dict.fromkeys(*args)


class Environment(ImmutableSandboxedEnvironment):
    """Offer templates what transformers offers them.

    Args:
        date: what `strftime_now` writes, as YYYY-MM-DD; empty: a template that asks is refused.
    """

    written: list[str] | None
    spans: list[tuple[int, int]]

    def __init__(self, date: str) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
        )
        self.written, self.spans = None, []

        def raise_exception(message: Any) -> None:
            raise jinja2.exceptions.TemplateError(str(message))

        def to_json(
            value: Any,
            ensure_ascii: bool = False,
            indent: Any = None,
            separators: Any = None,
            sort_keys: bool = False,
        ) -> str:
            return json.dumps(
                value,
                ensure_ascii=ensure_ascii,
                indent=indent,
                separators=separators,
                sort_keys=sort_keys,
            )

        def strftime_now(form: str) -> str:
            if not date:
                raise NoDate
            return datetime.fromisoformat(date).strftime(form)

        self.filters["tojson"] = to_json
        self.globals |= {
            "raise_exception": raise_exception,
            "strftime_now": strftime_now,
            "dict": NewDict(),
            "namespace": SafeNamespace,
        }


class NoDate(Exception):
    """Tell of a template that writes the date, which nobody has named."""


class OutOfTime(BaseException):
    """Tell of a template that takes longer than any conversation needs."""


class NotAPrefix(Exception):
    """Tell of a template by which an earlier part of a conversation is no beginning of the whole.

    Args:
        number: of the assistant's message that cannot be found.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Templates:
    """Render conversations by the template that each is for.

    Args:
        setup: `templates` {name: text}, `variables`, `date`, and `completions`: whether
            what the assistant says is to be found.
    """

    def __init__(self, setup: dict[str, Any]) -> None:
        self._environment = Environment(setup["date"])
        self._variables, self._completions = setup["variables"], setup["completions"]
        self._compiled = {
            name: self._environment.from_string(text) for name, text in setup["templates"].items()
        }
        marks = [
            name
            for name, text in setup["templates"].items()
            if any(kind == "name" and value == "generation" and before == "block_begin"
                   for before, kind, value in _tokens(self._environment, text))
        ]  # fmt: skip
        self.marked = frozenset(marks)

    def render(self, request: dict[str, Any]) -> dict[str, Any]:
        """Render a conversation.

        Args:
            request: `messages`; perhaps `tools`, and `variables` for the template.

        Returns:
            `text`, and `spans`: [start, end) of what the assistant says, in characters.
        """
        messages = [_named_alike(_without_nulls(each)) for each in request["messages"]]
        name = self._choose(request.get("tools"))
        text, spans = self._render(name, request, messages, prompt=False)
        if not text:
            return {"error": "the template writes nothing"}
        if not self._completions:
            return {"text": text, "spans": [[0, len(text)]]}
        if name not in self.marked:
            spans = [
                self._span(name, request, messages, number, text)
                for number, message in enumerate(messages)
                if message.get("role") == "assistant"
            ]
        return {"text": text, "spans": spans}

    def _choose(self, tools: Any) -> str:
        if tools is not None and "tool_use" in self._compiled:
            return "tool_use"
        return "default" if "default" in self._compiled else next(iter(self._compiled))

    def _span(
        self, name: str, request: dict[str, Any], messages: list[Any], number: int, whole: str
    ) -> tuple[int, int]:
        """Find a message of the assistant by what the template writes without it and with it."""
        before, _ = self._render(name, request, messages[:number], prompt=True)
        with_it = whole
        if number + 1 < len(messages):
            with_it, _ = self._render(name, request, messages[: number + 1], prompt=False)
        if not (whole.startswith(with_it) and with_it.startswith(before)):
            raise NotAPrefix(number)
        return len(before), len(with_it)

    def _render(
        self, name: str, request: dict[str, Any], messages: list[Any], *, prompt: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        values = {
            **self._variables,
            **(request.get("variables") or {}),
            "messages": messages,
            "tools": request.get("tools"),
            "documents": None,
            "add_generation_prompt": prompt,
        }
        self._environment.written, self._environment.spans = [], []
        size = 0
        for part in self._compiled[name].generate(**values):
            self._environment.written.append(part)
            size += len(part)
            if size > _LONGEST:
                raise MemoryError
        return "".join(self._environment.written), self._environment.spans


def _tokens(environment: Environment, text: str) -> Iterator[tuple[str, str, str]]:
    """Yield each token's kind and text, with the kind of the one before, spaces left out."""
    before = ""
    for _, kind, value in environment.lex(text):
        if kind != "whitespace":
            yield before, kind, value
            before = kind


def _without_nulls(message: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if value is not None}


def _named_alike(message: dict[str, Any]) -> dict[str, Any]:
    """Give the reasoning of a message the names that templates read, as transformers does."""
    reasoning = next((message[key] for key in _REASONING if key in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Bound the processor time of a block; after twice as much the system ends the child."""

    def stop(*_: object) -> None:
        raise OutOfTime

    signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    signal.setitimer(signal.ITIMER_PROF, 2 * seconds)  # nothing catches this one
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)


def _answer(make: Any, seconds: float) -> dict[str, Any]:
    """Call a function within the limits; return what it returns, or what went wrong, in words."""
    try:
        with _limited(seconds):
            result: dict[str, Any] = make()
            return result
    except OutOfTime:
        return {"error": f"the template takes more than {seconds:g} s for it"}
    except MemoryError:
        return {"error": "the template asks for more memory than any conversation needs"}
    except RecursionError:
        return {"error": "the template calls itself without end"}
    except NoDate:
        return {"no_date": True}
    except NotAPrefix as error:
        return {"no_prefix": error.number}
    except jinja2.exceptions.TemplateSyntaxError as error:
        return {"error": f"line {error.lineno} of the template: {error.message}"}
    except Exception as error:
        return {"error": str(error) or type(error).__name__}


def main() -> None:
    """Answer the lines of standard input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever asked ends this one
    made: Templates | None = None
    seconds = 1.0

    def begin(setup: dict[str, Any]) -> dict[str, Any]:
        nonlocal made
        made = Templates(setup)
        return {"marked": sorted(made.marked)}

    for line in sys.stdin:
        request = json.loads(line)
        current = made
        if current is None:
            seconds, memory = request["seconds"], request["memory"]
            with suppress(OSError, ValueError):  # where the system knows no such limit
                resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
            answer = _answer(lambda: begin(request), seconds)  # noqa: B023  # called at once
        else:
            answer = _answer(lambda: current.render(request), seconds)  # noqa: B023
        try:
            written = json.dumps(answer)
        except (MemoryError, ValueError):
            written = '{"error": "the template writes what no text is"}'
        sys.stdout.write(written + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
