"""Exchange token copies without a capacity: sort, lay out, pad, and handle what exceeds a round.

Dims, besides those of `moe_shard.moe`:

    T  tokens of a device     N  its token copies, T * K (one for each choice)
    D  devices of an expert group (the expert axes' size), as senders or as receivers
    L  experts of one device, E / D
    Q  segments: runs of token copies that stay together
    R  token copies that the buffer of the experts' device holds; D * P for D padded pieces

A device sorts its token copies by expert, and experts are numbered in the order of the devices that
own them, so what goes from one device to one expert is one segment. A receiver orders its copies by
expert, and for one expert by sender; groups may be aligned, so that each block of a kernel has one
expert.
"""
