"""Check that every test can be collected where only the default suite's packages are installed."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent
EXTRAS = tomllib.loads((TESTS.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"][
    "optional-dependencies"
]
LATER = {re.split(r"\W", each, maxsplit=1)[0] for each in EXTRAS["parity"]} | {"maxtext"}
"""What `make test` does not install: such a package is imported by a fixture or within a test."""


def imported_at_once(source: str) -> Iterator[str]:
    """Yield the modules that a module imports when it is loaded, and those that it imports from."""
    statements: list[ast.AST] = [*ast.parse(source).body]
    for node in statements:  # grows while it is read
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (str(node.module), *(f"{node.module}.{each.name}" for each in node.names))
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                continue
            statements.extend(ast.iter_child_nodes(node))


def loads(path: Path, seen: set[Path]) -> Iterator[str]:
    """Yield the packages that a file of the tests imports, itself and through other such files."""
    seen.add(path)
    for name in imported_at_once(path.read_text(encoding="utf-8")):
        root, *rest = name.split(".")
        other = TESTS.joinpath(*rest).with_suffix(".py")
        if root != "tests":
            yield root
        elif rest and other.is_file() and other not in seen:
            yield from loads(other, seen)


def test_no_test_needs_a_package_of_another_target_to_be_collected() -> None:
    collected = [*TESTS.rglob("test_*.py"), *TESTS.rglob("conftest.py")]
    found = {
        f"{path.relative_to(TESTS)}: {package}"
        for path in collected
        for package in {*loads(path, set())} & LATER
    }
    assert found == set()


def test_such_a_package_is_found_through_another_module() -> None:
    assert "torch" in LATER
    known = TESTS / "parity" / "reference.py"
    assert "torch" in {*loads(known, set())}
    source = (
        "if True:\n    import torch\nclass A:\n    from peft import B\ndef f():\n    import jax"
    )
    assert {*imported_at_once(source)} == {"torch", "peft", "peft.B"}
