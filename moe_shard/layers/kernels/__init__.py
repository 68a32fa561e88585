"""Compute attention: one function, several implementations, and the choice between them.

An implementation is a file with two functions. `unsupported(case)` says why it cannot compute an
`AttentionCase`, or returns None. `attend` computes it, on whole arrays of one device:

    attend(query [B S N D], key [B T J D], value [B T J Dv], queries: Tokens, keys: Tokens,
           *, rule: AttentionRule, sink [N] or None) -> [B S N Dv]

It is differentiable in query, key, value and sink. `choose` picks one; `on_mesh` runs it on a mesh.
Dims, beside those of `moe_shard.layers`:

    T  keys and values: S, or a cache's places     Dv elements of a value
    G  query heads of each key head, N / J
"""
