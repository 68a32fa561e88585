"""Describe a model's parameters before they exist: shapes, dtypes, placement; arrays last.

A model is described without allocating anything, the rule table places its parameters, and only
then are they created, each device making its own shards. So a model that is larger than the memory
of one device, or of the host, can be initialised.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import PRNGKeyArray

from moe_shard.config.model_config import ModelConfig
from moe_shard.models.adapted import require_adapters
from moe_shard.models.decoder import Decoder
from moe_shard.models.mtp import PredictingDecoder
from moe_shard.sharding.annotate import Sharding
from moe_shard.sharding.init_sharded import place
from moe_shard.sharding.parameter import logical_axes_of

Params = dict[str, Any]
"""Parameters as nested dicts, by module attribute, of arrays or of descriptions of arrays."""


@dataclass(frozen=True)
class ParamSpec:
    """Describe one parameter without allocating it."""

    name: str
    shape: tuple[int, ...]
    dtype: jax.typing.DTypeLike
    logical_axes: tuple[str | None, ...]
    sharding: NamedSharding

    @property
    def is_matrix(self) -> bool:
        """Return whether it has two dims or more besides those of layers and experts.

        Stacking by layer or expert, or a dim without a logical axis, makes no matrix of a vector.
        """
        return len(set(self.logical_axes) - {"layers", "exp", None}) > 1

    def abstract(self) -> jax.ShapeDtypeStruct:
        """Return jax's description of it, for lowering and for restoring a checkpoint."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype, sharding=self.sharding)


@dataclass(frozen=True)
class AbstractModel:
    """Describe a decoder without allocating it.

    Attributes:
        graph: the modules; `nnx.merge(graph, params)` is the model.
        specs: each parameter's `ParamSpec`, nested as in `Params`.
        sharding: the mesh and its rules.
        init: makes the parameters from a key; compile it with the shardings of `specs` as its
            output shardings.
    """

    graph: nnx.GraphDef[Decoder]
    specs: Params
    sharding: Sharding
    init: Callable[[PRNGKeyArray], Params]

    @property
    def num_params(self) -> int:
        """Count the parameters, with all experts."""
        return sum(math.prod(spec.shape) for spec in jax.tree.leaves(self.specs))

    def apply(self, params: Params) -> Decoder:
        """Return the model with these parameters."""
        return nnx.merge(self.graph, params)


def describe(config: ModelConfig, sharding: Sharding) -> AbstractModel:
    """Describe a decoder and place its parameters.

    Args:
        config: the model.
        sharding: the mesh and its rules.

    Raises:
        UserError: a parameter has a dim that its mesh axes do not divide, or a logical axis without
            a rule, or no weight has an adapter that `enable_lora` asks for.
    """
    decoder = PredictingDecoder if config.mtp_kinds else Decoder

    def build(key: PRNGKeyArray) -> Decoder:
        return decoder(config, sharding, rngs=nnx.Rngs(params=key))

    def spec(path: tuple[str, ...], param: nnx.Param[Any]) -> ParamSpec:
        name, shape, dtype = ".".join(path), param.get_value().shape, param.get_value().dtype
        logical_axes = logical_axes_of(param, name)
        assert logical_axes is not None, f"{name}: every parameter here names its dims"
        placed = place(name, param, param.get_value(), sharding)
        return ParamSpec(name, shape, dtype, logical_axes, placed)

    # The key is made within, so that describing a model starts no device.
    graph, params = nnx.split(nnx.eval_shape(lambda: build(jax.random.key(0))))
    specs = nnx.to_pure_dict(nnx.map_state(spec, params))
    require_adapters(config, [each.name for each in jax.tree.leaves(specs)])
    return AbstractModel(
        graph, specs, sharding, lambda key: nnx.to_pure_dict(nnx.state(build(key)))
    )
