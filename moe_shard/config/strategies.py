"""Register dispatch strategies: all that the rest of the package asks of one is in its entry.

A strategy is one file whose class registers its entry:

    import moe_shard

    @moe_shard.register_strategy("mine", has_slots=True)
    class Mine:
        def __init__(self, config, placement): ...
        def __call__(self, x, routing, experts): ...   # see moe_shard.moe.strategy.Strategy
        def record(self, tokens, dtype): ...

The value of `moe_dispatch` is then "mine", and checks, notes, bounds, reports and the contract
tests read its properties from the entry. The package's own strategies are the files in
`moe_shard/moe/dispatch/`, named as they are and imported when first used. One from outside is
found where its module has been imported; for the commands of this package that is done for

- modules named by the environment variable `MOE_SHARD_STRATEGIES` (`my_strategies`, or several
  with commas between), from the Python path: `PYTHONPATH=. MOE_SHARD_STRATEGIES=my_strategies`;
- entry points of installed packages in the group `moe_shard.strategies`, whose name is the
  strategy's and whose value is its module.

There is deliberately no configuration key for it: a model's file, which may come from anywhere,
chooses among strategies but never what code is imported.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from moe_shard.errors import UserError, first_line

if TYPE_CHECKING:
    from moe_shard.config.moe_config import MoEConfig

Factory = Callable[..., Any]
"""(config, placement) -> a `moe_shard.moe.strategy.Strategy`; a class or a function."""
F = TypeVar("F", bound=Factory)

VARIABLE = "MOE_SHARD_STRATEGIES"
GROUP = "moe_shard.strategies"
CAPACITY_KEYS = ("capacity_factor", "capacity_rule", "min_capacity", "drop_policy")
"""The keys of every strategy that has slots."""
_PACKAGE = "moe_shard.moe.dispatch"
_FOLDER = Path(__file__).parent.parent / "moe" / "dispatch"


@dataclass(frozen=True)
class StrategyEntry:
    """Describe what the rest of the package needs to know of a strategy.

    Attributes:
        name: the value of `moe_dispatch`.
        make: makes the strategy of a layer, from its configuration and the placement of its arrays.
        has_slots: whether an expert has capacity slots for each sequence and drops what is beyond;
            such a strategy reads `CAPACITY_KEYS`.
        always_moves_tokens: whether tokens are exchanged over the expert axes whatever
            `moe_dispatch_no_expert_sharding` is, each sent by the one device that holds it.
        keys: further YAML keys that this strategy reads and others need not.
        copies: from the configuration and the length of a sequence, the token copies brought to all
            experts together; None: one for each slot, or for each choice where there are no slots.
    """

    name: str
    make: Factory
    has_slots: bool
    always_moves_tokens: bool = False
    keys: tuple[str, ...] = ()
    copies: Callable[[MoEConfig, int], int] | None = None

    @property
    def own_keys(self) -> frozenset[str]:
        """Return every YAML key that this strategy reads and others need not."""
        return frozenset(self.keys) | frozenset(CAPACITY_KEYS if self.has_slots else ())


_entries: dict[str, StrategyEntry] = {}


def register_strategy(
    name: str,
    *,
    has_slots: bool,
    always_moves_tokens: bool = False,
    keys: tuple[str, ...] = (),
    copies: Callable[[MoEConfig, int], int] | None = None,
) -> Callable[[F], F]:
    """Register a dispatch strategy under a name, for `moe_dispatch`; a decorator.

    Args:
        name: lower-case letters, digits and underscores.
        has_slots: see `StrategyEntry`.
        always_moves_tokens: see `StrategyEntry`.
        keys: see `StrategyEntry`.
        copies: see `StrategyEntry`.

    Raises:
        UserError: the name belongs to another strategy, or is not a valid name.

    Example:
        >>> import moe_shard as ms
        >>> from moe_shard.config.strategies import find_strategy, unregister_strategy
        >>> @ms.register_strategy("mine", has_slots=False, keys=("grouped_product",))
        ... def make(config, placement): ...
        >>> find_strategy("mine").has_slots
        False
        >>> unregister_strategy("mine")
    """
    if not name.isidentifier() or name != name.lower():
        raise UserError(
            f"a strategy cannot be called {name!r}\nfix: lower-case letters, digits and underscores"
        )

    def register(make: F) -> F:
        known = _entries.get(name)
        # A module that is imported again, as in a notebook, replaces its own entry.
        same = known is not None and known.make.__module__ == make.__module__
        built_in = f"{_PACKAGE}.{name}"
        if (known is not None and not same) or (
            name in _built_in() and make.__module__ != built_in
        ):
            raise UserError(
                f"the strategy {name} of {make.__module__} has the name of another, of "
                f"{known.make.__module__ if known else built_in}\nfix: a name of its own"
            )
        _entries[name] = StrategyEntry(name, make, has_slots, always_moves_tokens, keys, copies)
        return make

    return register


def unregister_strategy(name: str) -> None:
    """Remove a strategy that was registered from outside; for tests and notebooks."""
    del _entries[name]


def strategy_names() -> tuple[str, ...]:
    """List every value that `moe_dispatch` can have: the package's own first, then others."""
    _import_named()
    own = _built_in()
    others = {*_entries, *(each.name for each in entry_points(group=GROUP))} - {*own}
    return (*own, *sorted(others))


def imported_strategies() -> tuple[StrategyEntry, ...]:
    """List the entries of the package's own strategies, and of others imported so far."""
    return tuple(
        find_strategy(name) for name in (*_built_in(), *sorted({*_entries} - {*_built_in()}))
    )


def check_strategy_name(name: str) -> None:
    """Check a value of `moe_dispatch`; the package's own strategies are not imported for it.

    Raises:
        UserError: no strategy has this name, or a module that should register one fails.
    """
    if name in _built_in() or name in _entries or name in strategy_names():
        return
    raise UserError(
        f"moe_dispatch={name} is not a known moe_dispatch\n"
        f"fix: moe_dispatch one of {', '.join(strategy_names())}; "
        f"for one of your own, {VARIABLE}=its_module"
    )


def find_strategy(name: str) -> StrategyEntry:
    """Return the entry of a strategy, importing its module where that has not been done.

    Raises:
        UserError: as `check_strategy_name`.
    """
    check_strategy_name(name)
    if name not in _entries:
        modules = {each.name: each.module for each in entry_points(group=GROUP)}
        _import(f"{_PACKAGE}.{name}" if name in _built_in() else modules[name], f"entry {GROUP}")
    if name not in _entries:
        raise UserError(f"the module of the strategy {name} does not register it")
    return _entries[name]


@functools.cache
def _built_in() -> tuple[str, ...]:
    """List the files of the package's own strategies; they are not imported."""
    stems = (path.stem for path in _FOLDER.glob("*.py"))
    return tuple(sorted(stem for stem in stems if not stem.startswith("_")))


def _import_named() -> None:
    """Import the modules that the environment names."""
    for module in filter(None, os.environ.get(VARIABLE, "").split(",")):
        _import(module.strip(), VARIABLE)


def _import(module: str, source: str) -> None:
    try:
        importlib.import_module(module)
    except UserError:
        raise
    except Exception as error:  # a module of someone else may raise anything
        raise UserError(
            f"{source}: importing {module} failed: {type(error).__name__}: "
            f"{first_line(error, 200)}\nfix: {_fix(module, error)}"
        ) from error


def _fix(module: str, error: Exception) -> str:
    if module.endswith(".py") or "/" in module:
        return f"a module's name, not a file's: {Path(module).stem}, with PYTHONPATH=its folder"
    if isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]:
        return "a module on the Python path (PYTHONPATH=its folder)"
    return f"what fails in {module} itself"
