"""The parts of a dropless exchange: sort, lay out, pad, and what happens beyond the bound.

Dims, besides those of `moe_shard.moe`:

    T  tokens of a device     N  its token copies, T * K (one for each choice)
    D  devices of an expert group (the expert axes' size), as senders or as receivers
    L  experts of one device, E / D
    Q  segments: runs of token copies that stay together
    R  token copies that a buffer of the experts' device holds; DP in D padded pieces

A device sorts its token copies by expert, and experts are numbered in the order of the devices that
own them, so what goes from one device to one expert is one segment. A receiver wants its copies by
expert, and under one expert by sender; groups may be aligned, so that a kernel meets one expert a
block.
"""
