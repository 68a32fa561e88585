"""Split parameters into those that are trained and those that stay as they are.

What stays has no gradient and no state of the optimizer: it is an input of the step like the batch,
and comes out of it as it went in. Parameters that only decide a choice never have a gradient, nor
does what is a constant of its checkpoint.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import jax

from moe_shard.config.keys import shown
from moe_shard.config.lora_config import ADAPTER
from moe_shard.config.schema import brief_list
from moe_shard.errors import UserError
from moe_shard.models.params import Params
from moe_shard.units import human_count

_STILL = {
    r"\.indexer\.": "they only choose the tokens to attend to",
    r"\.layer_scalar$": "they are constants of their checkpoint",
}
"""Pattern of parameters that have no gradient -> why."""

ADAPTERS = rf"{ADAPTER}/"
"""Pattern of the names of adapters."""


def is_adapter(name: str) -> bool:
    """Return whether a parameter is of an adapter.

    >>> is_adapter("layers.attention.query_lora.a"), is_adapter("layers.attention.query")
    (True, False)
    """
    return f"{ADAPTER}." in name


def _why_still(name: str) -> str:
    """Return why a parameter never has a gradient; empty where it has one."""
    return next((why for pattern, why in _STILL.items() if re.search(pattern, name)), "")


class Trainable:
    """Hold which parameters are trained.

    Args:
        patterns: regular expressions, one of which is found in the name of each parameter that is
            trained, its parts joined by "/" as in MaxText; empty: all that can have a gradient.
        specs: the parameters' `ParamSpec`s.

    Raises:
        UserError: a pattern is none, or is found in no name.
    """

    def __init__(self, patterns: Sequence[str], specs: Params) -> None:
        known = [spec.name for spec in jax.tree.leaves(specs)]
        names = [name.replace(".", "/") for name in known if not _why_still(name)]
        found: set[str] = set()
        for pattern in patterns:
            try:
                some = {name for name in names if re.search(pattern, name)}
            except (re.error, RecursionError, OverflowError) as error:
                raise UserError(
                    f"trainable_parameters_mask: {shown(pattern)} is no regular expression: {error}"
                    "\nfix: a part of a parameter's name, such as attention/query"
                ) from error
            if not some:
                raise UserError(
                    f"trainable_parameters_mask: {shown(pattern)} is in the name of no parameter\n"
                    f"fix: one of {brief_list(names, 6)}"
                )
            found |= some
        self._all = not patterns and len(names) == len(known)
        self._patterns = bool(patterns)
        self._names = {name.replace("/", ".") for name in (found if patterns else names)}
        self._specs = specs

    def of(self, tree: Params) -> Params:
        """Return what is trained of parameters, or of anything with their structure."""
        return tree if self._all else _pruned(tree, self._specs, self._names)

    def into(self, trained: Params, whole: Params) -> Params:
        """Return parameters with those replaced that are trained.

        Args:
            trained: these.
            whole: all of them.
        """
        return trained if self._all else _joined(trained, whole)

    def rest(self, tree: Params) -> Params:
        """Return what is not trained."""
        names = {spec.name for spec in jax.tree.leaves(self._specs)} - self._names
        return {} if self._all else _pruned(tree, self._specs, names)

    def note(self) -> str:
        """Say what is trained, on one line; empty if all is."""
        if self._all:
            return ""
        specs = jax.tree.leaves(self._specs)
        sizes = {spec.name: math.prod(spec.shape) for spec in specs}
        if not self._patterns:
            still = sorted(sizes.keys() - self._names)
            why = ", ".join(dict.fromkeys(map(_why_still, still)))
            return (
                f"not trained: {human_count(len(still), 'parameter')}, "
                f"{sum(sizes[name] for name in still):,} numbers: {brief_list(still, 2)}; "
                f"{why}: they have no gradient and stay as they are"
            )
        chosen = sum(sizes[name] for name in self._names)
        return (
            f"trained: {human_count(len(self._names), 'parameter')} of {len(sizes)}, "
            f"{chosen:,} numbers of {sum(sizes.values()):,}: {brief_list(sorted(self._names), 5)}; "
            "the others stay as they are, without gradients or optimizer state"
        )


def _pruned(tree: Any, specs: Any, names: set[str]) -> Params:
    kept: Params = {}
    for key, spec in specs.items():
        if isinstance(spec, dict):
            if below := _pruned(tree[key], spec, names):
                kept[key] = below
        elif spec.name in names:
            kept[key] = tree[key]
    return kept


def _joined(trained: Any, whole: Any) -> Params:
    return {
        key: (_joined(trained[key], value) if isinstance(value, dict) else trained[key])
        if key in trained
        else value
        for key, value in whole.items()
    } | {key: value for key, value in trained.items() if key not in whole}
