"""List what is in fixtures/, counted by eye and grep, not by the parser."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "fixtures"

MIB = 1 << 20
WEIGHT = 4096 * 14336 * 2  # bf16 bytes of one expert's projection
WINDOW = 4096 * 8192 * 2

# name: (mesh, verdict, backend, rows); a row is kind, axes, scope, pass, count, bytes each.
Row = tuple[str, str, str, str, int, int]
HAND_COUNTED: dict[str, tuple[dict[str, int], str, str, list[Row]]] = {
    "cpu_moe": (
        {"data": 1, "fsdp": 1, "expert": 8},
        "expert-parallel",
        "cpu",
        [
            # 8 slices of f32[1,1,1,4,32]; the all-reduce joins f32[] and f32[8,32].
            ("all-to-all", "expert", "dispatch", "forward", 1, 4096),
            ("all-to-all", "expert", "combine", "forward", 1, 4096),
            ("all-to-all", "expert", "combine", "backward", 1, 4096),
            ("all-to-all", "expert", "dispatch", "backward", 1, 4096),
            ("all-reduce", "expert", "router", "backward", 1, 1028),
        ],
    ),
    "cpu_gathered": (
        {"data": 1, "fsdp": 1, "expert": 8},
        "weight-gathered",
        "cpu",
        [
            ("all-gather", "expert", "experts", "forward", 2, 8 * 32 * 64 * 4),
            # Two weight gradients, the router's, and the loss, merged into one.
            ("all-reduce", "expert", "experts", "backward", 1, 2 * 65536 + 1024 + 4),
        ],
    ),
    "cpu_scan": (
        {"fsdp": 2, "expert": 4},
        "no-expert-parallelism",  # rows are exchanged, and no product of experts takes them
        "cpu",
        [
            ("all-to-all", "expert", "combine", "forward", 2 * 3 * 5, 512),
            ("all-to-all", "expert", "other", "forward", 2 * 5, 512),
            ("all-gather", "expert", "mlp", "forward", 5, 2048),
            ("all-gather", "fsdp", "other", "forward", 5, 4096),
        ],
    ),
    "cpu_three_axes": (
        {"data": 2, "fsdp": 2, "expert": 2},
        "no-expert-parallelism",
        "cpu",
        [
            ("all-gather", "fsdp,expert", "attention", "forward", 1, 8192),
            ("all-reduce", "data", "mlp", "backward", 1, 8192 + 4),
        ],
    ),
    # Too small to bear a mark of the compiler.
    "cpu_none": ({"data": 8}, "no-expert-parallelism", "unknown", []),
    "tpu_moe": (
        {"fsdp": 2, "expert": 4},
        "unknown",  # cut: what its fusions compute is not in the text
        "tpu",
        [
            ("all-to-all", "expert", "dispatch", "forward", 6, 128 * MIB),
            ("all-to-all", "expert", "combine", "forward", 6, 128 * MIB),
            ("all-to-all", "expert", "combine", "backward", 6, 128 * MIB),
            ("all-to-all", "expert", "dispatch", "backward", 6, 128 * MIB),
            ("all-gather", "fsdp", "experts", "forward", 2 * 6, WEIGHT),
            ("all-gather", "fsdp", "experts", "backward", 2 * 6, WEIGHT),
            # One gradient is reduced by an all-reduce-scatter fusion, one by a plain all-reduce.
            ("reduce-scatter", "fsdp", "experts", "backward", 6, WEIGHT // 2),
            ("all-reduce", "fsdp", "experts", "backward", 6, WEIGHT),
            ("all-reduce", "fsdp,expert", "router", "backward", 6, 4096 * 4 * 2),
            ("all-reduce", "fsdp,expert", "other", "forward", 1, 4),
        ],
    ),
    "gpu_moe": (
        {"fsdp": 2, "expert": 4},
        "unknown",  # cut: what its fusions compute is not in the text
        "gpu",
        [
            ("all-to-all", "expert", "dispatch", "forward", 6, 128 * MIB),
            ("all-to-all", "expert", "combine", "forward", 6, 128 * MIB),
            ("all-to-all", "expert", "combine", "backward", 6, 128 * MIB),
            ("all-to-all", "expert", "dispatch", "backward", 6, 128 * MIB),
            ("all-gather", "fsdp", "experts", "forward", 2 * 6, WEIGHT),
            ("all-gather", "fsdp", "experts", "backward", 2 * 6, WEIGHT),
            ("reduce-scatter", "fsdp", "experts", "backward", 2 * 6, WEIGHT // 2),
            ("all-reduce", "fsdp,expert", "router", "backward", 6, 4096 * 4 * 2),
            ("all-reduce", "fsdp,expert", "other", "forward", 1, 4),
        ],
    ),
    "tpu_ring": (
        {"fsdp": 8},
        "no-expert-parallelism",
        "tpu",
        [
            # Both ways round the ring, four shards a round: two rounds of four permutes, and one
            # before the loop; of the weight forward, one after it of its gradient.
            ("collective-permute", "fsdp", "experts", "forward", 1 + 2 * 4, 1024 * 8192 * 2),
            ("collective-permute", "fsdp", "experts", "backward", 2 * 4 + 1, 1024 * 8192 * 2),
            ("all-reduce", "fsdp", "other", "forward", 1, 4),
        ],
    ),
    "tpu_kernel": (
        {"expert": 8},
        "unknown",  # what the kernel makes of the weights is not in the text
        "tpu",
        [
            ("all-to-all", "expert", "dispatch", "forward", 1, 8 * 128 * 256 * 2),
            ("all-to-all", "expert", "combine", "forward", 1, 8 * 128 * 512 * 2),
        ],
    ),
    "tpu_gathered": (
        {"expert": 8},
        "unknown",  # cut: what its fusions compute is not in the text
        "tpu",
        [
            # Three windowed loops of 2 trips (0, 2 < 4), four permutes in each, in 8 layers; and
            # one permute before each loop.
            ("collective-permute", "expert", "experts", "forward", 8 * 2 * 2 * 4 + 8 * 2, WINDOW),
            ("collective-permute", "expert", "experts", "backward", 8 * 2 * 4 + 8, WINDOW),
            # One all-gather, written four times by async collective fusion.
            ("all-gather", "expert", "experts", "backward", 8, 8 * WINDOW),
            ("reduce-scatter", "expert", "experts", "backward", 8 * 2, 262656 * 8 * 128 * 2 // 8),
            ("collective-permute", "expert", "experts", "backward", 8 * 2, 448 * 8 * 128 * 2),
            ("all-reduce", "expert", "other", "forward", 1, 4),
        ],
    ),
}
HAND_COUNTED["cpu_moe_jax012"] = HAND_COUNTED["cpu_moe"]


def read(name: str) -> str:
    return (FOLDER / f"{name}.txt").read_text(encoding="utf-8")
