"""List where MaxText stores each parameter: the names of its modules, as data.

Its tensors have their dims in the same order as the parameters here, except the dim of layers.
Their names differ, and three of them may hold several parameters of this package.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from moe_shard.autoep.param_shapes import EXPERTS
from moe_shard.config.model_config import ModelConfig

Selection = tuple[slice | int, ...]
"""A part of a tensor: a slice or an index for each of its dims."""

OUTER = {
    "embedding.table": "token_embedder/embedding",
    "embedding.kernel": "decoder/logits_dense/kernel",
    "final_norm.scale": "decoder/decoder_norm/scale",
}
"""Role of a parameter outside the layers -> its tensor."""

_LAYER = ("",)
_ATTENTION = ("self_attention/", "GptOssAttention/")
_MLP = ("mlp/",)
_EXPERTS = (
    "MoeBlock_0/",
    "moe_block/",
    "GptOssMlp/",
    "DeepSeekMoeBlock_0/MoeBlock_0/",
    "Llama4MoEBlock_0/MoeBlock_0/",
)
_SHARED = ("DeepSeekMoeBlock_0/shared_experts/", "Llama4MoEBlock_0/shared_experts/")

INNER: dict[str, tuple[tuple[str, ...], str]] = {
    "attention_norm.scale": (_LAYER, "pre_self_attention_layer_norm/scale"),
    "mlp_norm.scale": (_LAYER, "post_self_attention_layer_norm/scale"),
    **{f"attention.{x}": (_ATTENTION, f"{x}/kernel") for x in ("query", "key", "value", "out")},
    **{f"attention.{x}_bias": (_ATTENTION, f"{x}/bias") for x in ("query", "key", "value", "out")},
    "attention.query_norm.scale": (_ATTENTION, "query_norm/scale"),
    "attention.key_norm.scale": (_ATTENTION, "key_norm/scale"),
    "attention.sink": (_ATTENTION, "sinks"),
    "attention.query_down": (_ATTENTION, "wq_a/kernel"),
    "attention.query_up": (_ATTENTION, "wq_b/kernel"),
    "attention.latent_down": (_ATTENTION, "wkv_a/kernel"),
    "attention.latent_norm.scale": (_ATTENTION, "kv_norm/scale"),
    "attention.latent_up": (_ATTENTION, "wkv_b/kernel"),
    "mlp.router.kernel": (_EXPERTS, "gate/kernel"),
    "mlp.router.bias": (_EXPERTS, "gate/bias"),
    "mlp.router.correction_bias": (_EXPERTS, "gate/bias"),
}
"""Role of a layer's parameter -> possible prefixes of the tensor's name, and the name."""

for _ours, _theirs in {"gate": "wi_0", "up": "wi_1", "down": "wo"}.items():
    INNER[f"{EXPERTS}{_ours}"] = (_EXPERTS, _theirs)
    INNER[f"{EXPERTS}{_ours}_bias"] = (_EXPERTS, f"{_theirs}_bias")
    for _role, _before in {"mlp": _MLP, "mlp.shared": _SHARED}.items():
        INNER[f"{_role}.{_ours}"] = (_before, f"{_theirs}/kernel")
        INNER[f"{_role}.{_ours}_bias"] = (_before, f"{_theirs}/bias")

_LATENT_QUERY_NORM = "q_norm/scale"

STACKS = re.compile(
    r"decoder/(?P<stack>layers|dense_layers|moe_layers)"
    r"(?:_(?P<number>\d+))?/(?:layers_(?P<place>\d+)/)?(?P<rest>.+)"
)
"""A layer's tensor: of one layer by its number, or of a scan over layers, or over turns of a cycle
of layers with several places."""

_WEIGHTS = re.compile(
    r"(?:params/(?P<collection>\w+)/|(?P<aux>nnx_aux)/model/|params/|model_params/|model/|)"
    r"(?P<name>(?:decoder|token_embedder)/.+?)(?:/value)?"
)
_NOT_OF_THE_MODEL = ("opt_state", "optimizer", "step")
_RANDOM = ("rngs", "rng", "dropout")


class Weight(NamedTuple):
    """Describe a tensor of the model.

    Attributes:
        name: its name without the prefix and suffix of its checkpoint.
        variable: whether it is not one of flax's `Param`s, such as a bias that no gradient moves; a
            scan stacks those along dim 0 whatever it does with the others.
    """

    name: str
    variable: bool


def weight(path: str) -> Weight | None:
    """Return the weight at a path of a checkpoint; None: not a weight, like optimizer state.

    MaxText has three formats: a whole training state (`params/params/...`, and variables other than
    parameters in `nnx_aux/model/...` or `params/<kind>/...`), parameters alone at the same paths,
    and parameters alone as in flax NNX (`.../value`).
    """
    parts = path.split("/")
    if parts[0] in _NOT_OF_THE_MODEL or any(part in _RANDOM for part in parts):
        return None
    found = _WEIGHTS.fullmatch(path)
    if found is None:
        return Weight(path, False)
    return Weight(found["name"], found["aux"] is not None)


class Candidate(NamedTuple):
    """Describe a tensor that may hold a parameter.

    Attributes:
        name: the tensor's name, within a layer or the whole model.
        shape: the tensor's shape, without the dim of layers.
        take: the parameter's part of it; empty: all of it.
    """

    name: str
    shape: tuple[int, ...]
    take: Selection = ()


def candidates(role: str, shape: tuple[int, ...], model: ModelConfig) -> Iterator[Candidate]:
    """Yield the tensors that may hold a layer's parameter, the usual ones first.

    Args:
        role: the role of the parameter, such as "attention.query".
        shape: shape of the parameter of one layer.
        model: the model that has the parameter.
    """
    if role not in INNER:
        return
    before, name = INNER[role]
    if role == "attention.query_norm.scale" and model.attention.attention_type == "mla":
        name = _LATENT_QUERY_NORM
    for start in before:
        yield Candidate(start + name, shape)
    for start in before:
        yield from _joined(start, role, shape, model)


def _joined(
    start: str, role: str, shape: tuple[int, ...], model: ModelConfig
) -> Iterator[Candidate]:
    """Yield tensors that hold several parameters: fused_qkv, fused_mlp, prefuse_moe_weights."""
    outer, _, last = role.rpartition(".")
    heads = model.attention.num_query_heads, model.attention.num_kv_heads
    first = {"query": 0, "key": heads[0], "value": sum(heads)}
    name, bias = last.removesuffix("_bias"), last.endswith("_bias")
    if outer == "attention" and name in first:
        dim = len(shape) - 2
        part = slice(first[name], first[name] + shape[dim])
        whole = (*shape[:dim], heads[0] + 2 * heads[1], shape[-1])
        take = (*[slice(None)] * dim, part, slice(None))
        yield Candidate(f"{start}qkv_proj/{'bias' if bias else 'kernel'}", whole, take)
    if name not in ("gate", "up") or outer == "mlp.router":
        return
    half = ("gate", "up").index(name)
    dims = (*[slice(None)] * (len(shape) - 1),)
    if role.startswith(EXPERTS) and not bias:
        size = shape[-1]
        part = slice(half * size, (half + 1) * size)
        yield Candidate(f"{start}wi", (*shape[:-1], 2 * size), (*dims, part))
    elif not role.startswith(EXPERTS):
        whole = (*shape[:-1], 2, shape[-1])
        kind = "bias" if bias else "kernel"
        yield Candidate(f"{start}wi/{kind}", whole, (*dims, half, slice(None)))
