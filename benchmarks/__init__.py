"""The scripts behind the tables of docs/results.md.

Each prints Markdown with the hardware, the versions, the date and the command, and writes only what
it is asked to. They are run from a checkout, `python -m benchmarks.layer`, and are no part of the
package: nothing in `moe_shard` imports them.
"""
