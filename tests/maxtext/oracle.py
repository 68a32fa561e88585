"""Count the collectives of a step with XLA's own parser, without a line of this package.

The count is of what runs in one step: a loop over layers runs its body as often as there are
layers, and a transfer that a TPU compiler writes several times in the text counts once.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from tests.xla_parser import hlo

KINDS = {
    "AllGather": "all-gather",
    "AllGatherStart": "all-gather",
    "AllReduce": "all-reduce",
    "AllReduceStart": "all-reduce",
    "AllToAll": "all-to-all",
    "CollectiveBroadcast": "collective-broadcast",
    "CollectivePermute": "collective-permute",
    "CollectivePermuteStart": "collective-permute",
    "RaggedAllToAll": "ragged-all-to-all",
    "ReduceScatter": "reduce-scatter",
}
"""Name of an opcode as XLA enumerates them -> kind of collective."""

_CALLED = re.compile(
    r"(?:calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.-]+)"
    r"|(?:branch_computations|called_computations)=\{([^}]*)\}"
)


class Step:
    """Wrap one module from XLA's parser."""

    def __init__(self, text: str) -> None:
        module = hlo.hlo_module_from_text(text)
        self.computations = {each.name: each.instructions() for each in module.computations()}
        entry = re.search(r"^ENTRY %?([\w.-]+)", text, re.MULTILINE)
        assert entry is not None
        self.entry = entry[1]

    def counts(self, layers: int) -> dict[str, int]:
        """Count how often a step runs each kind, if every loop with a collective is over layers."""
        outside, loops = self._inside(self.entry)
        total = Counter(outside)
        for body in loops:
            inside, nested = self._inside(body)
            assert not nested, f"a loop with collectives within the loop {body}"
            for kind, count in Counter(inside).items():
                total[kind] += layers * count
        return dict(total)

    def loops(self) -> list[dict[str, int]]:
        """Count what one pass over a loop's body runs, for each loop that ENTRY runs."""
        return [dict(Counter(self._inside(body)[0])) for body in self._inside(self.entry)[1]]

    def _inside(self, name: str) -> tuple[list[str], list[str]]:
        """Return the kinds that one execution runs outside of loops, and loop bodies with some."""
        once: dict[object, str] = {}
        bodies: list[str] = []
        self._collect(name, once, bodies, fused=False)
        return list(once.values()), bodies

    def _collect(self, name: str, once: dict[object, str], bodies: list[str], fused: bool) -> None:
        for each in self.computations[name]:
            opcode = _opcode(each)
            if opcode in ("AsyncUpdate", "AsyncDone"):
                continue
            if opcode == "AsyncStart":
                each, opcode = each.async_wrapped_root(), _opcode(each.async_wrapped_root())
            text = each.to_string()
            if opcode in KINDS:
                kind = KINDS[opcode]
                if kind == "all-reduce" and fused and _is_sliced(each):
                    kind = "reduce-scatter"
                channel = re.search(r"channel_id=(\d+)", text)
                # shard_map gives all of its collectives channel 1; the compiler's own have one each
                # and appear again, with it, in every piece of work overlapped with the transfer.
                own = channel[1] if channel is not None and channel[1] != "1" else None
                once[(name, each.name) if own is None else (opcode, own)] = kind
                continue
            called = [
                other.strip().lstrip("%")
                for one, several in _CALLED.findall(text)
                for other in ([one] if one else several.split(","))
            ]
            for other in called:
                if opcode != "While":
                    self._collect(other, once, bodies, fused or opcode == "Fusion")
                elif f"body=%{other}" in text and (any(self._inside(other))):
                    bodies.append(other)


def _opcode(instruction: Any) -> str:
    return str(instruction.opcode).rpartition(".k")[2]


def _is_sliced(instruction: Any) -> bool:
    """Tell whether each device keeps only its part, as TPUs write a reduce-scatter."""
    users = instruction.users()
    parts = [part for user in users if _opcode(user) == "GetTupleElement" for part in user.users()]
    return any(_opcode(user) == "DynamicSlice" for user in [*users, *parts])
