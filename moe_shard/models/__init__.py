"""Build the decoder. Families differ by configuration, never by name.

Dims as in `moe_shard.layers` and `moe_shard.moe`, and L for decoder layers.
"""
