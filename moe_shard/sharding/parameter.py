"""Make parameters that carry the logical axis of each dim, in the metadata that Flax reads.

Flax calls a variable's dims `out_sharding`: `nnx.get_partition_spec` reads it, `nnx.vmap` adds the
name of a stacked dim to it, an optimizer copies it to its moments, and `nnx.bridge` turns it into
the `names` of a Linen box. Flax would also read the names as mesh axes and place the value as soon
as it is made (`eager_sharding`). That is off here: names are mapped to mesh axes by a rule table,
which Flax does not see.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flax import linen, nnx
from flax.core import meta
from flax.nnx import bridge
from jax.sharding import PartitionSpec
from jaxtyping import Array

from moe_shard.errors import UserError
from moe_shard.sharding.rules import LogicalAxes


def parameter(value: Array, axes: LogicalAxes) -> nnx.Param[Array]:
    """Make a parameter of `value` whose dims have these logical axes; None: never sharded."""
    return nnx.Param(
        value,
        out_sharding=tuple(axes),
        eager_sharding=False,
        # The box in which a Linen model finds it; its names are logical axes too, with no rules
        # of its own: without this one, `nn.get_partition_spec` fails on newer versions of Flax.
        linen_meta_type=linen.LogicallyPartitioned,
        sharding_rules=(),
    )


def logical_axes_of(variable: Any, name: str) -> tuple[str | None, ...] | None:
    """Return the logical axes that a variable declares; None if it declares none.

    Args:
        variable: an `nnx.Variable` or a Linen box of any module, users' own included, whose dims
            are named by Flax's means; anything else has no names.
        name: its name in messages.

    Raises:
        UserError: it has rules or a placement of its own, besides the table's.
    """
    if isinstance(variable, nnx.Variable):
        metadata = variable.get_metadata()
    elif isinstance(variable, bridge.NNXMeta):
        metadata = variable.metadata
    elif isinstance(variable, meta.Partitioned):
        rules = getattr(variable, "rules", None)
        metadata = {"out_sharding": variable.names, "sharding_rules": rules}
    else:
        return None
    if metadata.get("sharding_rules"):
        raise UserError(
            f"{name}: it has rules of its own (sharding_rules), and there is a RuleTable\n"
            "fix: move its rules to the table"
        )
    axes = metadata.get("out_sharding")
    if axes is None:
        return None
    is_names = isinstance(axes, Sequence | PartitionSpec) and not isinstance(axes, str)
    if not is_names or not all(axis is None or isinstance(axis, str) for axis in axes):
        raise UserError(
            f"{name}: its dims are named {axes!r}\n"
            "fix: one logical axis, or None, per dim; the RuleTable says over which mesh axes"
        )
    return tuple(axes)
