"""Provide Mixture-of-Experts in JAX whose expert parallelism is AllToAll, with the evidence.

This is the front door: what is exported here is the library. Names are imported when they are first
used, so that `import moe_shard` loads neither jax nor flax.

>>> import moe_shard as ms
>>> mesh = ms.make_mesh(data=2, expert=4)
>>> sharding = ms.Sharding(mesh, ms.RuleTable.default())
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_shard import lowering
    from moe_shard.config.load import load_config
    from moe_shard.config.model_config import GatingConfig
    from moe_shard.config.moe_config import MoEConfig, RouterConfig
    from moe_shard.config.strategies import register_strategy
    from moe_shard.errors import UserError
    from moe_shard.moe.layer import MoELayer, MoEStats
    from moe_shard.sharding.annotate import Sharding
    from moe_shard.sharding.init_sharded import init_sharded
    from moe_shard.sharding.mesh import make_mesh
    from moe_shard.sharding.rules import RuleTable

__version__ = "0.1.0"

__all__ = [
    "GatingConfig",
    "MoEConfig",
    "MoELayer",
    "MoEStats",
    "RouterConfig",
    "RuleTable",
    "Sharding",
    "UserError",
    "init_sharded",
    "load_config",
    "lowering",
    "make_mesh",
    "register_strategy",
]

_HOMES = {
    "GatingConfig": "config.model_config",
    "MoEConfig": "config.moe_config",
    "MoELayer": "moe.layer",
    "MoEStats": "moe.layer",
    "RouterConfig": "config.moe_config",
    "RuleTable": "sharding.rules",
    "Sharding": "sharding.annotate",
    "UserError": "errors",
    "init_sharded": "sharding.init_sharded",
    "load_config": "config.load",
    "make_mesh": "sharding.mesh",
    "register_strategy": "config.strategies",
}
"""Name -> the file that defines it; `lowering` is a package."""


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        found = getattr(importlib.import_module(f"moe_shard.{_HOMES[name]}"), name)
    elif name == "lowering":
        found = importlib.import_module("moe_shard.lowering")
    else:
        raise AttributeError(f"module 'moe_shard' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
