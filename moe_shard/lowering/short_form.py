"""Convert HLO text without percent signs, as `Lowered.as_text("hlo")` prints it, to the usual form.

XLA prints names as `%name` or, in its short form, as `name`. In the short form a name is recognized
by its position: after `ENTRY` or at the start of a line, before the `=` of an instruction, as the
last word of an operand, and as the value of the attributes that call something.
"""

from __future__ import annotations

import re

_HAS_PERCENT = re.compile(r"^(?:ENTRY )?%[\w.\-]+ .*\{|^\s+(?:ROOT )?%[\w.\-]+ = ", re.M)
_COMPUTATION = re.compile(r"(ENTRY )?([A-Za-z_][\w.\-]*)( (?:\(.*\) -> .* )?\{(?: ?//.*)?)$")
_INSTRUCTION = re.compile(
    r"(\s+(?:ROOT )?)([\w.\-]+)( = (?:\S+|\(.*?\)) ([a-z][a-z0-9\-]*)\()([^()]*)"
)
_LAST_WORD = re.compile(r"([\w.\-]+(?:#\d+)*)(?=\s*(?:,|$))")
_CALLED = re.compile(
    r'"(?:[^"\\]|\\.)*"'
    r"|\b(to_apply|body|condition|calls|true_computation|false_computation"
    r"|branch_computations|called_computations|control-predecessors)=(\{[^{}]*\}|[\w.\-]+)"
)
_WORD = re.compile(r"[A-Za-z_][\w.\-]*")
_LITERALS = frozenset({"constant", "parameter", "iota"})


def with_percent_signs(text: str) -> str:
    """Return the text with `%` before every name; the same object where it has them already."""
    if not text.startswith("HloModule") or _HAS_PERCENT.search(text):
        return text
    return "\n".join(_line(line.rstrip()) for line in text.split("\n"))


def _line(line: str) -> str:
    if match := _COMPUTATION.match(line):
        return f"{match[1] or ''}%{match[2]}{match[3]}"
    match = _INSTRUCTION.match(line)
    if match is None:
        return line
    indent, name, middle, opcode, operands = match.groups()
    if opcode not in _LITERALS:
        operands = _LAST_WORD.sub(r"%\1", operands)
    return f"{indent}%{name}{middle}{operands}" + _CALLED.sub(_call, line[match.end() :])


def _call(match: re.Match[str]) -> str:
    if not match[1]:
        return match[0]
    return f"{match[1]}={_WORD.sub(lambda word: '%' + word[0], match[2])}"
