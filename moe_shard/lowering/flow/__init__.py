"""Determine what every value of a program derives from, the basis of roles and verdicts.

The program is evaluated once over abstract values, in the order of its text, through fusions,
calls, loops, branches and asynchronous pairs. Of each value is kept (`State`): the ENTRY
parameters that it depends on; whether it is one of them, laid out anew or converted, and nothing
else (`Origin`); its marks; and the collectives that it came through. `states` holds these,
`evaluation` walks the program, `rules` gathers what each opcode makes of its operands.

Where tokens are sent to experts shows in the arithmetic alone. A router compares scores and gets
integers (top-k, argmax, sort). Data that such integers select (gather, scatter, slices, one-hot
products, masks) has been routed; a product of routed data with a parameter that is split, or
batched, by experts is a product of experts. Neither the names of scopes nor those of parameters
are asked.

Loops: the marks and dependences are those of the first iteration, so that a layer does not depend
on its own weights by way of the layer before; that a value is nothing but a parameter has to hold
in every iteration.
"""
