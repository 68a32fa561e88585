"""Check the shapes and dtypes of arrays while the suite runs.

`moe_shard` annotates them (`Float[Array, "B S M"]`). jaxtyping's import hook makes beartype compare
them with the arrays of every call: at trace time inside a program, directly outside of one.
`JAXTYPING_DISABLE=1` turns the comparison off. Processes that tests start are not checked.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import jaxtyping
from beartype import BeartypeConf, beartype
from jax._src import source_info_util
from jaxtyping import AbstractArray

PACKAGE = "moe_shard"
ROOT = Path(__file__).parents[1]
SHAPE = re.compile(r"^from jaxtyping import .*(Bool|Float|Int|Shaped)", re.MULTILINE)
# An int is accepted as a float, as in mypy.
_checked: Callable[[Any], Any] = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check the arguments and the result that hold arrays; all other types are mypy's.

    Args:
        function: jaxtyping's wrapper of a package function, with the same signature, evaluated.
    """
    hints = function.__annotations__
    of_arrays = {name: hint for name, hint in hints.items() if _has_array(hint)}
    if not of_arrays:
        return function
    function.__annotations__ = of_arrays
    checked: Callable[..., Any] = _checked(function)
    return checked


def _has_array(hint: Any) -> bool:
    if isinstance(hint, list):  # the arguments of a Callable
        return any(map(_has_array, hint))
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(map(_has_array, get_args(hint)))


def modules_with_shapes() -> list[str]:
    """List the modules that annotate arrays.

    The hook slows down every call of a module, and modules without arrays, such as the HLO
    parser, make millions of calls.
    """
    files = sorted((ROOT / PACKAGE).rglob("*.py"))
    annotated = [file for file in files if SHAPE.search(file.read_text("utf-8"))]
    parts = [file.relative_to(ROOT).with_suffix("").parts for file in annotated]
    return [".".join(part[:-1] if part[-1] == "__init__" else part) for part in parts]


def install() -> None:
    """Enable the checks in these modules. Call this before any of them is imported."""
    # Programs and their source lines must be those that users see.
    source_info_util.register_exclusion(str(Path(jaxtyping.__file__).parent))
    jaxtyping.install_import_hook(modules_with_shapes(), f"{__name__}.check")
