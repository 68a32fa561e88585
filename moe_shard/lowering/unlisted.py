"""What passes between devices and is no row of the table: said in a sentence, never left out."""

from __future__ import annotations

from collections import Counter

from moe_shard.lowering.walk import Executions


def unlisted(walk: Executions) -> list[str]:
    """One sentence for each kind of exchange that is not listed among the collectives."""
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
    if sends := found["device"]:
        sentences.append(f"{sends} point-to-point sends are not listed")
    if transfers := found["host"]:
        sentences.append(f"{transfers} transfers to the host are not listed")
    if kernels := found["kernel"]:
        sentences.append(f"{kernels} kernels exchange data themselves, which is not listed")
    return sentences
