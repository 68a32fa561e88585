"""Determine what every value of a program derives from, the basis of roles and verdicts.

The program is evaluated once over abstract values, in the order of its text, through fusions,
calls, loops, branches and asynchronous pairs. Each value has a `State`: the ENTRY parameters that
it depends on; whether it is just one of them, in another layout or dtype (`Origin`); its marks; and
the collectives that it came through. `states` defines these, `evaluation` walks the program,
`opcode_rules` gathers the functions that evaluate each opcode.

Dispatch is visible in the arithmetic alone. A router compares scores and gets integers (top-k,
argmax, sort). Data that such integers select (gather, scatter, slices, one-hot products, masks) has
been routed; a product of routed data with a parameter that is split, or batched, by experts is a
product of experts. Names of scopes and parameters are not used.

Loops: the marks and dependences are those of the first iteration, so that a layer does not depend
on its own weights through the layer before. A value counts as a parameter only if it is one in
every iteration.
"""
