"""Read the stage of the model (scope) and the pass of the step from an `op_name`.

An op_name is the path of `jax.named_scope`s and transforms, such as
`jit(step)/transpose(jvp(decoder))/while/body/moe/dispatch/sharding_constraint`. XLA joins the names
of ops that it merges: `a;b`, or `prefix/(a:b)` where they share a prefix.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from moe_shard.scopes import MOE_SCOPES, SCOPES

__all__ = ["MOE_SCOPES", "SCOPES", "classify", "merged_names"]

FOREIGN: Mapping[str, str] = {
    # Flax's modules, which name a scope after their class.
    "MultiHeadDotProductAttention_0": "attention",
    "MultiHeadAttention_0": "attention",
    "SelfAttention_0": "attention",
    "Embed_0": "embedding",
    # MaxText's.
    "self_attention": "attention",
    "attention_op": "attention",
    "token_embedder": "embedding",
    "logits_dense": "logits",
    "gate": "router",
    "wi_0": "experts",
    "wi_1": "experts",
    "gmm": "experts",
}
"""Scopes of other packages -> the stage here."""

# `jit(loss)` names a function, not a scope.
_FUNCTION = re.compile(r"\bp?jit\([^()]*\)")
_WORD = re.compile(r"[A-Za-z_][\w\-]*")
# A merged op has the first of these stages that it contains, so that no weight is hidden.
_PRECEDENCE = ("experts", "dispatch", "combine")


def classify(op_name: str, stages: Mapping[str, str] | None = None) -> tuple[str, str]:
    """Return the scope and the pass of an op_name.

    Args:
        op_name: the path.
        stages: {a word in the path: the stage it stands for}, besides `SCOPES` and `FOREIGN`.

    Returns:
        The innermost of `SCOPES` in the path, or "other"; and "forward", "backward", "optimizer",
        or "unknown" when the name is not a path in a traced program.
    """
    known = {**FOREIGN, **(stages or {})}
    parts = [(_scope(part, known), part) for part in merged_names(op_name)]
    named = [each for each in parts if each[0] != "other"]
    for scope in _PRECEDENCE:
        if found := [each for each in named if each[0] == scope]:
            named = found
            break
    scope = named[0][0] if named else "other"
    passes = [_pass(scope, part) for each, part in parts if each == scope]
    # A loss merged with a gradient is small compared to it.
    return scope, "backward" if "backward" in passes else (passes or ["unknown"])[0]


def _scope(part: str, known: Mapping[str, str]) -> str:
    words = _WORD.findall(_FUNCTION.sub("", part))
    named = (known.get(word, word) for word in reversed(words))
    return next((word for word in named if word in SCOPES), "other")


def _pass(scope: str, part: str) -> str:
    if scope == "optimizer":
        return "optimizer"
    if "transpose(" in part or "rematted_computation" in part:
        return "backward"
    # The name of a parameter, `params['experts']`, does not show when it is used.
    return "forward" if "/" in part or "(" in part else "unknown"


def merged_names(op_name: str) -> list[str]:
    """Split the op_name of merged ops into its parts; a plain name is the only part."""
    return [name for part in op_name.split(";") if part for name in _expand(part)]


def _expand(part: str) -> Iterator[str]:
    for start, character in enumerate(part):
        if character == "(" and (start == 0 or part[start - 1] == "/"):
            inside, end = _alternatives(part, start)
            if len(inside) > 1:
                for each in inside:
                    yield from _expand(part[:start] + each + part[end:])
                return
    yield part


def _alternatives(part: str, start: int) -> tuple[list[str], int]:
    """Return the pieces between the colons of the bracket that opens at `start`, and its end."""
    depth, pieces, begin = 0, [], start + 1
    for position in range(start, len(part)):
        character = part[position]
        depth += (character == "(") - (character == ")")
        if depth == 0 or (depth == 1 and character == ":"):
            pieces.append(part[begin:position])
            begin = position + 1
        if depth == 0:
            return pieces, position + 1
    return [], start
