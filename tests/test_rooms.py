"""Check the rooms of the package: which may import which, and that a name has one owner.

Imports are read with `ast`, those inside functions and under TYPE_CHECKING included, so that no
import is missed because no test runs it.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "moe_shard"
ROOT = Path(__file__).parents[1] / PACKAGE
ROOMS = [
    *("errors", "units", "scopes", "files", "stderr", "quiet", "terminal"),
    *("config", "sharding", "lowering", "layers", "moe", "models", "data", "program"),
    *("autoep", "maxtext", "checkpoints", "runtime", "training", "inference", "watching", "cli"),
]
"""From top to bottom: a file imports from its own room and from rooms above it."""

ENTRIES = {"__init__", "__main__", "train", "generate"}
"""Files of no room: the front door, and what the contract runs with `python -m`."""

ONLY = {"lowering": {"errors", "units", "scopes"}}
"""Rooms that read the world of others, and so may import only this of the package."""

WITHOUT_JAX = {
    *("errors", "units", "scopes", "files", "stderr", "quiet", "terminal"),
    *("config", "lowering", "watching"),
}
"""Rooms whose files do not import jax, numpy or flax when they are loaded."""


class Source:
    """Wrap a file of the package."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path.relative_to(ROOT))
        self.room = Path(self.name).parts[0].removesuffix(".py")
        self.tree = ast.parse(path.read_text())

    def imports(self, tree: ast.AST | None = None) -> Iterator[tuple[int, str]]:
        """Yield every (line, module) that is imported anywhere in the file, or in a part of it."""
        for node in ast.walk(tree or self.tree):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{self.name}:{node.lineno}: a relative import"
                module = node.module or ""
                # `from moe_shard import X` may import a room or a name of the front door.
                names = [alias.name for alias in node.names] if module == PACKAGE else []
                yield from ((node.lineno, f"{module}.{name}") for name in names)
                if not names:
                    yield node.lineno, module

    def rooms(self) -> Iterator[tuple[int, str]]:
        """Yield every (line, room) that is imported."""
        for line, module in self.imports():
            package, _, rest = module.partition(".")
            if package == PACKAGE:
                yield line, rest.partition(".")[0]

    def at_load(self) -> Iterator[tuple[int, str]]:
        """Yield every (line, module) that is imported when the file is loaded."""
        for statement in self.tree.body:
            if isinstance(statement, (ast.Import, ast.ImportFrom, ast.Try)):
                yield from self.imports(statement)

    def public_names(self) -> set[str]:
        """Return the module's functions, classes and constants without a leading underscore."""
        found = set()
        for node in self.tree.body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                found.add(node.name)
            targets = node.targets if isinstance(node, ast.Assign) else []
            if isinstance(node, (ast.AnnAssign, ast.AugAssign)):
                targets = [node.target]
            for target in targets:
                found |= {each.id for each in ast.walk(target) if isinstance(each, ast.Name)}
        return {name for name in found if not name.startswith("_")}


SOURCES = [Source(path) for path in sorted(ROOT.rglob("*.py"))]


def forbidden(source: Source) -> list[str]:
    """List a file's imports that go down the list of rooms, or that its room may not use."""
    if source.room in ENTRIES:
        return []
    found = []
    for line, room in source.rooms():
        allowed = ONLY.get(source.room)
        if room == "__version__" or room == source.room:
            continue
        if room not in ROOMS:
            found.append(f"{source.name}:{line} imports {room}, which is no room")
        elif ROOMS.index(room) > ROOMS.index(source.room):
            found.append(f"{source.name}:{line} imports {room}, a room below {source.room}")
        elif allowed is not None and room not in allowed:
            found.append(f"{source.name}:{line} imports {room}; {source.room} may not")
    return found


def test_every_file_is_in_a_room() -> None:
    assert len(SOURCES) > 150
    assert {source.room for source in SOURCES} - ENTRIES == set(ROOMS)


def test_no_file_imports_from_a_room_below() -> None:
    assert [each for source in SOURCES for each in forbidden(source)] == []


@pytest.mark.parametrize(
    ("room", "line", "words"),
    [
        ("config", "from moe_shard.sharding.mesh import make_mesh", "a room below config"),
        ("config", "def f() -> None:\n    import moe_shard.cli.train", "a room below config"),
        ("config", "if TYPE_CHECKING:\n    from moe_shard import moe", "a room below config"),
        ("lowering", "from moe_shard.config.load import load_config", "lowering may not"),
        ("cli", "from moe_shard.attic import x", "no room"),
    ],
)
def test_a_forbidden_import_is_found(room: str, line: str, words: str) -> None:
    source = Source(ROOT / "units.py")
    source.room, source.tree = room, ast.parse(line)
    (found,) = forbidden(source)
    assert words in found


def test_rooms_for_a_shell_load_no_jax() -> None:
    heavy = {"jax", "jaxlib", "flax", "numpy", "orbax", "optax"}
    found = [
        f"{source.name}:{line} imports {module}"
        for source in SOURCES
        if source.room in WITHOUT_JAX and "startup" not in source.name
        for line, module in source.at_load()
        if module.partition(".")[0] in heavy
    ]
    assert found == []


def test_no_two_files_have_one_name() -> None:
    """Except cli/, whose files are named after commands, __init__, and the contract's entries."""
    files = defaultdict(list)
    for source in SOURCES:
        if source.path.stem not in ENTRIES and source.room != "cli":
            files[source.path.stem].append(source.name)
    assert {stem for stem, names in files.items() if len(names) > 1} == set()


SHARED = {"main", "attend", "unsupported"}
"""Names that several files have by design: every command has a `main`, every implementation of
attention an `attend` and an `unsupported`."""

COLLISIONS: set[str] = set()
"""Names that two files still have. The list only ever gets shorter."""


def test_no_two_files_have_a_public_name_in_common() -> None:
    owners = defaultdict(set)
    for source in SOURCES:
        for name in source.public_names() - SHARED:
            owners[name].add(source.name)
    assert {name for name, files in owners.items() if len(files) > 1} - COLLISIONS == set()
