"""Warn about traffic between devices that the table does not list, so that none is omitted."""

from __future__ import annotations

from collections import Counter

from moe_shard.lowering.walk import OPCODES, Executions


def unlisted(walk: Executions) -> list[str]:
    """Write one sentence for each kind of exchange that is not listed among the collectives."""
    found = Counter[str]()
    for computation in walk.order:
        for name, opcode in computation.opcodes.items():
            if opcode == "send":
                to_host = computation.instruction(name).attributes.get("is_host_transfer") == "true"
                found["host" if to_host else "device"] += 1
            elif opcode == "custom-call":
                text = computation.instruction(name).attribute_text
                found["kernel"] += '"has_communication":true' in text.replace(" ", "")
    sentences = []
    held = Counter(
        OPCODES[opcode]
        for computation in walk.order
        if computation.name in walk.passed_over and not walk.counts[computation.name]
        for opcode in computation.opcodes.values()
        if opcode in OPCODES
    )
    if held:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(held.items()))
        sentences.append(
            f"the loops of further rounds contain {kinds}; list them with --further-rounds"
        )
    if sends := found["device"]:
        sentences.append(f"{sends} point-to-point sends are not listed")
    if transfers := found["host"]:
        sentences.append(f"{transfers} transfers to the host are not listed")
    if kernels := found["kernel"]:
        sentences.append(f"{kernels} kernels exchange data between devices, which is not listed")
    return sentences
