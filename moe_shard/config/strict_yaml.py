"""Read YAML strictly (safe tags, no duplicate keys, 1e-5 is a number); write what reads back."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from moe_shard.errors import UserError, first_line
from moe_shard.files import read_small

_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$")
_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$"
    r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
)


class _StrictLoader(yaml.SafeLoader):
    """Refuse duplicate keys and aliases; read 1e-5 as a number and 1:30 as text."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        # An alias can make a value contain itself, or a short file expand to gigabytes.
        if self.check_event(yaml.AliasEvent):
            event = self.get_event()
            raise yaml.composer.ComposerError(
                None, None, f"aliases such as *{event.anchor} are not read", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                if key_node.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key_node.value} stands twice", key_node.start_mark
                    )
                seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


# PyYAML, which follows YAML 1.1, reads 1e-5 as text, 1:30 as ninety and 2024-01-01 as a date.
_REPLACED_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("int", "float", "timestamp")}
_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED_TAGS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))


class _PlainDumper(yaml.SafeDumper):
    """Quote what this reader, or any that follows YAML 1.1, would take for other than text."""


# SafeDumper alone leaves run_name: 3e-4 without quotes, which is a number here.
_PlainDumper.yaml_implicit_resolvers = {
    first: [
        *yaml.SafeDumper.yaml_implicit_resolvers.get(first, []),
        *_StrictLoader.yaml_implicit_resolvers.get(first, []),
    ]
    for first in {
        *yaml.SafeDumper.yaml_implicit_resolvers,
        *_StrictLoader.yaml_implicit_resolvers,
    }
}


def format_yaml(content: Mapping[str, Any]) -> str:
    """Return the text of a mapping, from which `parse_yaml` reads the same values and types."""
    return yaml.dump(content, Dumper=_PlainDumper, sort_keys=False, default_flow_style=None)


def parse_yaml(text: str) -> Any:
    """Parse a YAML text.

    Raises:
        UserError: not YAML, or a key is given twice; one line, without the file's name.
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise UserError(f"{line}{error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise UserError(str(error).splitlines()[0]) from error
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"not a YAML value: {first_line(error)}") from error
    except (AttributeError, LookupError) as error:
        # PyYAML's constructors of a tag, given text of another kind: `!!timestamp x`, `!!bool x`.
        raise UserError(
            "not a YAML value: the text is not of the kind that its tag says"
        ) from error


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping.

    Args:
        path: the file.

    Raises:
        UserError: the file cannot be read, is not text, or is not a mapping of names.
    """
    try:
        text = read_small(path).decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file\nfix: the path of a .yml file") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}\nfix: the path of a .yml file") from None
    try:
        content = parse_yaml(text)
    except UserError as error:
        raise UserError(f"{path}: {error}\nfix: correct the YAML there") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path}: not a mapping of keys to values\nfix: lines such as `steps: 100`")
    return content
