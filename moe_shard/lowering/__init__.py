'''Read compiled programs of anyone: HLO text in, collectives in the user's mesh axes out.

`report`, `verdict`, `assert_collectives` and `diff` are the front door. They take an executable,
HLO text or a path; jax is not imported to read a text. A small MoE layer, compiled on 8 devices:

>>> import jax
>>> import jax.numpy as jnp
>>> from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
>>> from moe_shard.lowering import assert_collectives, diff, report, verdict

>>> mesh = jax.make_mesh((2, 4), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
>>> by_sequence = NamedSharding(mesh, P(None, ("data", "expert")))
>>> by_expert = NamedSharding(mesh, P("expert", "data"))

>>> def moe(w, x, by_expert=by_expert):
...     """Route each token of x [B, S, M] to one of 8 experts."""
...     put = jax.lax.with_sharding_constraint
...     scores = jax.nn.softmax(x @ w["router"])
...     mask = jax.nn.one_hot(scores.argmax(-1), 8)
...     inputs = put(jnp.einsum("bsm,bse->ebsm", x, mask), by_sequence)
...     outputs = jnp.einsum("ebsm,emn->ebsn", put(inputs, by_expert), w["experts"])
...     outputs = put(put(outputs, by_expert), by_sequence)
...     return jnp.einsum("ebsn,bse->bsn", outputs, mask * scores)

>>> def array(shape, spec):
...     return jax.ShapeDtypeStruct(shape, "float32", sharding=NamedSharding(mesh, spec))
>>> w = {"router": array((64, 8), P()), "experts": array((8, 64, 64), P("expert"))}
>>> x = array((8, 16, 64), P(("data", "expert")))
>>> compiled = jax.jit(moe).lower(w, x).compile()
>>> verdict(compiled)
'expert-parallel'

With the expert dim left unsharded, the weights of the experts are gathered instead:

>>> gathered = jax.jit(lambda w, x: moe(w, x, by_sequence)).lower(w, x).compile()
>>> verdict(gathered)
'weight-gathered'
'''

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_shard.lowering.api import diff, report, verdict
    from moe_shard.lowering.expect import assert_collectives
    from moe_shard.lowering.reports import LoweringReport

__all__ = ["LoweringReport", "assert_collectives", "diff", "report", "verdict"]

_FILES = {
    "report": "api",
    "verdict": "api",
    "diff": "api",
    "assert_collectives": "expect",
    "LoweringReport": "reports",
}


def __getattr__(name: str) -> Any:
    """Load a name of the front door when it is first used, so that importing the room is cheap."""
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_FILES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """List the front door and what is loaded."""
    return sorted({*globals(), *__all__})
