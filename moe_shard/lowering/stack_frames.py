"""Find the source line an instruction was traced from, by the tables at the top of a module.

A sharding constraint is often added through a function that does nothing else (Flax's
`with_logical_constraint`, or a project's own), whose line is the same for every array of a program.
The useful line is that of the innermost function that does more.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from moe_shard.lowering.instructions import HloParseError, Instruction, integer_of

TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")

_CONSTRAINT = "/sharding_constraint"
# Differentiation gives a gradient the frame of its forward op: no function in the source does it.
_BACKWARD = "transpose("
_FRAME = re.compile(r'op_name="([^"]*)"[^{}]*?\bstack_frame_id=(\d+)')
_OLDER = re.compile(r'\bsource_file="([^"]*)"(?:.*?\bsource_line=(\d+))?')


class StackFrames:
    """Read the frames of one module.

    Args:
        tables: {name of a table: its rows}.
        lines: the text of the instructions, read when the first constraint is looked up.
    """

    def __init__(self, tables: Mapping[str, Sequence[str]], lines: Iterable[str]) -> None:
        self._tables = tables
        self._lines = lines
        self._busy: set[tuple[int, int]] | None = None

    def source(self, instruction: Instruction) -> str | None:
        """Return the `file:line` that an instruction was traced from, where known.

        Raises:
            HloParseError: when its frame is not in the tables.
        """
        if older := _OLDER.search(instruction.attribute_text):
            return f"{older[1]}:{older[2]}" if older[2] else older[1]
        frame = instruction.integer("stack_frame_id")
        if not frame or not self._tables.get("StackFrames"):
            return None
        try:
            return self._place(self._asked_for(frame, instruction.op_name))
        except LookupError as error:
            raise HloParseError(
                f"HLO line {instruction.line_number}: %{instruction.name} points to {error.args[0]}"
                ": the text is damaged"
            ) from error

    def _asked_for(self, frame: int, op_name: str) -> int:
        """Return the frame; for a constraint, the innermost whose function does more."""
        if not op_name.endswith(_CONSTRAINT):
            return frame
        if self._busy is None:
            frames = dict.fromkeys(
                int(number)
                for line in self._lines
                for name, number in _FRAME.findall(line)
                if not name.endswith(_CONSTRAINT) and _BACKWARD not in name
            )
            self._busy = {self._function(each) for start in frames for each in self._chain(start)}
        busy = self._busy
        return next((each for each in self._chain(frame) if self._function(each) in busy), frame)

    def _chain(self, frame: int) -> Iterable[int]:
        """Yield a frame and its callers, innermost first."""
        for _ in self._tables["StackFrames"]:
            yield frame
            # A parent's number is written one too high: the outermost frame has 1, for none.
            frame = _field(self._row("StackFrames", frame), "parent_frame_id") - 1
            if frame < 1:
                return
        raise LookupError(f"row {frame} of StackFrames, which contains itself")

    def _function(self, frame: int) -> tuple[int, int]:
        """Return the numbers of the file and the name of a frame's function."""
        location = self._location(frame)
        return _field(location, "file_name_id"), _field(location, "function_name_id")

    def _place(self, frame: int) -> str:
        location = self._location(frame)
        file = self._row("FileNames", _field(location, "file_name_id"))
        return f"{file[1:-1]}:{_field(location, 'line')}"

    def _location(self, frame: int) -> str:
        row = self._row("StackFrames", frame)
        return self._row("FileLocations", _field(row, "file_location_id"))

    def _row(self, table: str, number: int) -> str:
        rows = self._tables.get(table, [])
        if not 1 <= number <= len(rows):
            raise LookupError(f"row {number} of {table}, which has {len(rows)}")
        return rows[number - 1]


def _field(row: str, key: str) -> int:
    return integer_of(row, key) or 0
