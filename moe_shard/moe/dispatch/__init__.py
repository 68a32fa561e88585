"""Hold the package's dispatch strategies: one file each, named by its value of `moe_dispatch`.

A file here is imported when its strategy is first asked for, and registers it. What strategies
share is in `moe_shard.moe`, and what dropless ones share in `moe_shard.moe.exchange`.
"""
