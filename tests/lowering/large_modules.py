"""A large module made of copies of a small one, each reached from ENTRY, every name its own."""

from __future__ import annotations

import re

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"|%[\w.\-]+')
_PARAMETER = re.compile(r"( parameter\()(\d+)\)")
_ROOT = re.compile(r"^  ROOT %([\w.\-]+) = ", re.M)


def repeated(text: str, size: int) -> str:
    """At least `size` characters: the program run over and over, one copy after the other.

    The computations are renamed in every copy; so are the instructions of ENTRY, which all stand
    in one ENTRY.
    """
    first = text.index("\n%")
    header, program = text[:first], text[first:]
    before, entry = program.split("\nENTRY ")
    parameters = len(_PARAMETER.findall(entry))
    lines = entry[: entry.rindex("\n}")].split("\n")[1:]
    root = _ROOT.search("\n".join(lines))
    assert root is not None
    count = -(-size // len(program))
    pieces, body = [header], []
    for copy in range(count):
        pieces.append(_renamed(before, copy))
        for line in lines:
            numbered = _renumbered(line.replace("  ROOT %", "  %"), copy * parameters)
            body.append(_renamed(numbered, copy))
    roots = ", ".join(f"%{root[1]}.of{copy}" for copy in range(count))
    body.append(f"  ROOT %all = () tuple({roots})")
    return "\n".join([*pieces, "ENTRY %everything () -> () {", *body, "}", ""])


def _renumbered(line: str, first: int) -> str:
    return _PARAMETER.sub(lambda found: f"{found[1]}{int(found[2]) + first})", line)


def _renamed(text: str, copy: int) -> str:
    def rename(found: re.Match[str]) -> str:
        return found[0] if found[0][0] == '"' else f"{found[0]}.of{copy}"

    return _STRING.sub(rename, text)
