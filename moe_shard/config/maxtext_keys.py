"""Read what becomes of MaxText's configuration keys from `configs/maxtext_keys.yml`."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from moe_shard.config.keys import shown
from moe_shard.errors import UserError

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the strict loader is slow

UNSET: tuple[Any, ...] = (None, "", "None", "none", [])
"""Values that mean "not set" in MaxText's files, whatever a key's default."""


@dataclass(frozen=True)
class Refusal:
    """Describe a key of which only one value is supported.

    Attributes:
        kind: "model": a model with another value is read and explained, but not trained; "run": the
            command ends.
        what: what any other value requests.
        default: the supported value.
        fix: what to write instead; empty: leave the key out.
    """

    kind: Literal["model", "run"]
    what: str
    default: Any
    fix: str = ""

    def admits(self, value: Any) -> bool:
        """Return whether a value requests nothing beyond what is supported."""
        if value in UNSET:
            return True
        # True == 1 in Python, and `mtp_num_layers: true` is not `mtp_num_layers: 1`.
        return bool(value == self.default) and isinstance(value, bool) == isinstance(
            self.default, bool
        )


@dataclass(frozen=True)
class MaxTextKeys:
    """Hold every key of MaxText, by what becomes of it here.

    Attributes:
        defaults: key -> its default in MaxText's base.yml, for all keys.
        same: keys of ours with the same name and meaning.
        translated: key -> the keys here that it is translated to.
        implied: key -> the key without which it has no effect.
        harmless: key -> its subject; these affect neither the model nor what it learns.
        data: keys about how text is read.
        refused: key -> the one supported value, and why others are refused.
        mesh_axes: axes of MaxText's meshes that ours does not have.
        logical_axes: logical axes of MaxText's rule tables that ours does not have.
    """

    defaults: Mapping[str, Any]
    same: frozenset[str]
    translated: Mapping[str, str]
    implied: Mapping[str, str]
    harmless: Mapping[str, str]
    data: frozenset[str]
    refused: Mapping[str, Refusal]
    mesh_axes: tuple[str, ...]
    logical_axes: frozenset[str]

    def __contains__(self, key: object) -> bool:
        return key in self.defaults


@functools.cache
def read_maxtext_keys(path: Path) -> MaxTextKeys:
    """Read the file; the result is cached."""
    content = yaml.load(path.read_text(encoding="utf-8"), Loader=_LOADER)
    translated, refused = content["translated"], dict(_refusals(content["refused"]))
    by_text = {kind: dict(_ungrouped(content[kind])) for kind in ("implied", "harmless")}
    defaults = {
        **content["same"],
        **{key: entry["default"] for key, entry in translated.items()},
        **{key: value for kind in ("implied", "harmless") for key, value in _flat(content[kind])},
        **content["data"],
        **{key: refusal.default for key, refusal in refused.items()},
    }
    return MaxTextKeys(
        defaults=defaults,
        same=frozenset(content["same"]),
        translated={key: entry["to"] for key, entry in translated.items()},
        implied=by_text["implied"],
        harmless=by_text["harmless"],
        data=frozenset(content["data"]),
        refused=refused,
        mesh_axes=tuple(content["mesh_axes"]),
        logical_axes=frozenset(content["logical_axes"]),
    )


def without_blocks(written: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return keys with those of MaxText's block `lora:` among them.

    Args:
        written: the keys of a file, or of the command line.
        source: its name.

    Raises:
        UserError: `lora` is no block, or has a key that stands beside it with another value.
    """
    block = written.get("lora")
    beside = {key: value for key, value in written.items() if key != "lora"}
    if block in UNSET:
        return beside
    if not isinstance(block, Mapping):
        raise UserError(
            f"{source}: lora={shown(block)} is no block of keys\n"
            "fix: lora: {enable_lora: true, lora_rank: 16, lora_alpha: 32}"
        )
    for key in block.keys() & beside.keys():
        if block[key] != beside[key]:
            raise UserError(
                f"{source}: {key} is {shown(block[key])} in the block lora and "
                f"{shown(beside[key])} beside it\nfix: one of the two"
            )
    return {**block, **beside}


def _flat(groups: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    for keys in groups.values():
        yield from keys.items()


def _ungrouped(groups: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    for text, keys in groups.items():
        yield from ((key, text) for key in keys)


def _refusals(kinds: Mapping[Any, Any]) -> Iterator[tuple[str, Refusal]]:
    for kind, groups in kinds.items():
        for group in groups:
            for key, default in group["keys"].items():
                yield key, Refusal(kind, group["what"], default, group.get("fix", ""))
