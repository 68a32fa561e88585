"""Count the floating-point operations of a training step from the model's parameters.

The count is PaLM's (arXiv 2204.02311, appendix B): 6 operations per token for each parameter of a
product (2 forward, 4 backward), and for attention 6 * N * S for each element of a key and of a
value, in every layer that has it, without a discount for causal, sliding or chunked masks. What
another token mixer computes besides its products is counted beside it, in `layers/`. Only the
experts that a token is routed to and the shared ones count. Recomputation and empty capacity slots
do not, so that utilisation falls when work is wasted.

Where some parameters alone are trained, the gradients that no update needs are not counted: that of
a parameter that stays (2 of its 6 operations), and those of activations before the first parameter
that is trained (2 more, and the backward pass of attention). Layers that run as one scan count as
one there, as a gradient passes all of them. Adapters count as parameters that are trained.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import jax

from moe_shard.config.lora_config import ADAPTER
from moe_shard.config.model_config import ModelConfig
from moe_shard.models.cycles import PREDICTION, all_stacks, cycles_of
from moe_shard.models.mixers import MIXERS
from moe_shard.models.params import Params, ParamSpec

_VECTORS = re.compile(r"(_conv|\.taps|\.shared_gate)$")
"""Parameters that a token is multiplied with though they are no matrices: taps, and one gate."""
_NO_PRODUCT = re.compile(r"\.indexer\.")
"""Matrices that are left out: see `layers.attention_costs`."""


class TrainedProduct(NamedTuple):
    """Describe a product of tokens with a parameter, as training does it.

    Attributes:
        spec: the parameter.
        params: of its numbers, how many one token is multiplied with.
        of_input: whether the gradient of what it is multiplied with is computed.
        of_param: whether its own is.
    """

    spec: ParamSpec
    params: int
    of_input: bool
    of_param: bool

    @property
    def passes(self) -> int:
        """Count how often it is done: once forward, and for each gradient."""
        return 1 + self.of_input + self.of_param


def trained_products(
    config: ModelConfig, specs: Params, trained: Params
) -> Iterator[TrainedProduct]:
    """Yield the products of a model with its parameters, adapters too.

    Args:
        config: the model.
        specs: its parameters' `ParamSpec`s.
        trained: those of the parameters that are trained.
    """
    names = {spec.name for spec in jax.tree.leaves(trained)}
    reached = _reached(config, names)
    for spec in jax.tree.leaves(specs):
        for place, params in _uses(config, spec):
            yield TrainedProduct(spec, params, place in reached, spec.name in names)


def step_flops_per_token(
    config: ModelConfig, specs: Params, trained: Params, *, seq_len: int
) -> int:
    """Count the operations of training some of a model's parameters on one token.

    Args:
        config: the model.
        specs: its parameters' `ParamSpec`s.
        trained: those of the parameters that are trained.
        seq_len: S, tokens in a sequence.
    """
    reached = _reached(config, {spec.name for spec in jax.tree.leaves(trained)})
    total = sum(2 * each.params * each.passes for each in trained_products(config, specs, trained))
    for stack, kind, layers in all_stacks(config):
        if kind.mixer != "none":
            forward, backward = MIXERS[kind.mixer].flops(config, kind, seq_len)
            total += len(layers) * (forward + backward * (stack in reached))
    return total


_HEAD = "head"


def _reached(config: ModelConfig, names: set[str]) -> set[str]:
    """Return the stacks through which a gradient passes, and the head if it passes that."""
    owners = {name.partition(".")[0] for name in names}
    found = set()
    begun = "embedding.table" in names
    for cycle in cycles_of(config.layer_kinds):
        begun |= not owners.isdisjoint(cycle.names)
        found |= set(cycle.names) if begun else set()
    normed = begun or "final_norm" in owners
    if normed:
        found.add(_HEAD)
    if PREDICTION in owners or (normed if config.mtp.mtp_after_final_norm else begun):
        found.add(PREDICTION)
    return found


def _uses(config: ModelConfig, spec: ParamSpec) -> Iterator[tuple[str, int]]:
    """Yield where a token is multiplied with a parameter, and with how many of its numbers."""
    size = math.prod(spec.shape)
    head = "embedding.table" if config.logits_via_embedding else "embedding.kernel"
    if spec.name == head:
        yield from ((_HEAD, size), (PREDICTION, size * config.mtp.mtp_num_layers))
    elif spec.name.startswith("embedding.") or _NO_PRODUCT.search(spec.name):
        return
    elif spec.is_matrix or _VECTORS.search(spec.name) or f"{ADAPTER}." in spec.name:
        if config.moe is not None and "exp" in spec.logical_axes:
            size = size * config.moe.num_experts_per_tok // config.moe.num_experts
        yield spec.name.partition(".")[0], size
