"""Count by hand, from shapes, what one layer sends along each mesh axis, forward and backward.

A weight that is sharded along the wrong dim gives the right numbers and does not change the
exchange: the partitioner reshards the weight in every step. Only the bytes of the axis show it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import pytest

from moe_shard.lowering.collectives import extract_collectives
from tests.moe.build import build_layer, mesh_of
from tests.moe.inputs import Dims
from tests.moe.oracle import Settings
from tests.moe.test_factorisations import label

BATCH, TOKENS, MODEL, HIDDEN, EXPERTS, K = 8, 32, 64, 96, 8, 2
DIMS: Dims = {
    "rows": BATCH, "tokens": TOKENS, "model": MODEL, "hidden": HIDDEN, "experts": EXPERTS
}  # fmt: skip
# Capacity 1 without blocks: here ragged's buffers have no unused row.
ROUTES: dict[str, dict[str, Any]] = {
    "gather": {},
    "ragged": {"ragged_buffer_factor": 1.0, "grouped_product": "ragged_dot"},
}
FLOAT = COUNT = 4  # bytes of a float32, of an int32
# The sums of the losses and of the total cross an axis as single numbers, merged with others.
SCALARS = 8 * FLOAT

MESHES = [{"tensor": 2, "expert": 4}, {"fsdp": 2, "tensor": 2, "expert": 2}]


class Local(NamedTuple):
    """Compute the bytes of what one device holds, on a mesh of these axis sizes."""

    fsdp: int
    tensor: int
    expert: int

    @property
    def tokens(self) -> int:
        """Return a device's tokens: each device along fsdp and expert has its own sequences."""
        return BATCH // (self.fsdp * self.expert) * TOKENS

    def copies(self, strategy: str) -> int:
        """Return the token copies in an exchange's buffers, with no drops or capacity 1."""
        # A sequence has a slot of each expert for each of its tokens; ragged has no empty ones.
        return self.tokens * (EXPERTS if strategy == "gather" else K)

    @property
    def part(self) -> int:
        """Return the bytes of a token copy with a device's part of the embedding dim."""
        return MODEL // self.tensor * FLOAT

    @property
    def weight(self) -> int:
        """Return the bytes of gate, up or down in use: some experts, a part of the hidden dim."""
        return EXPERTS // self.expert * MODEL * (HIDDEN // self.tensor) * FLOAT

    def of_router(self) -> Counter[tuple[str, str]]:
        """Count the router: its products are over a split embedding dim, its kernel replicated."""
        split = "-".join(name for name in ("fsdp", "expert") if getattr(self, name) > 1)
        return Counter(
            {
                ("all-reduce", "tensor"): self.tokens * EXPERTS * FLOAT  # its logits
                + self.tokens * K * FLOAT,  # gradients of the combine weights
                ("all-reduce", split): MODEL // self.tensor * EXPERTS * FLOAT,  # of the kernel
                ("all-gather", "tensor"): MODEL * EXPERTS * FLOAT,  # which is gathered
            }
        )

    def of_weights(self, strategy: str) -> Counter[tuple[str, str]]:
        """Count the weights: stored over fsdp too, gathered once, and their gradients summed."""
        if self.fsdp == 1:
            return Counter()
        # `Sharding.use_weight` has a batched product's gradient summed by an all-reduce.
        summed = {
            "gather": ("all-reduce", 3 * self.weight),
            "ragged": ("reduce-scatter", 3 * self.weight // self.fsdp),
        }
        kind, size = summed[strategy]
        return Counter({("all-gather", "fsdp"): 3 * self.weight, (kind, "fsdp"): size})

    def of_experts(self, strategy: str) -> Counter[tuple[str, str]]:
        """Count the expert's two products on a split hidden dim, and the exchanges around them."""
        part = self.copies(strategy) * self.part
        whole = part * self.tensor
        total = Counter({("all-to-all", "expert"): 4 * part})  # to and from, and gradients
        # Gathered: the input of gate and up, and the gradient of down's output.
        gathered = 2
        if strategy == "ragged":
            # Summed: down's output, and the gradient of the input; each device keeps its part.
            total["reduce-scatter", "tensor"] = 2 * part
            total["all-gather", "expert"] = self.expert * EXPERTS * COUNT  # senders' counts
        else:
            # The input's gradients through gate and through up are summed separately, then sliced.
            total["all-reduce", "tensor"] = 3 * whole
            # With fsdp XLA gathers the input again for the gradients of gate and of up.
            gathered += 2 * (self.fsdp > 1)
        total["all-gather", "tensor"] = gathered * whole
        return total


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("sizes", MESHES, ids=label)
def test_bytes_of_every_axis_and_kind(sizes: dict[str, int], route: str) -> None:
    layer = build_layer(
        mesh_of(sizes), Settings(capacity_factor=-1.0), dispatch=route, flag=True,
        **DIMS, **ROUTES[route],
    )  # fmt: skip
    text = layer.lower().compile().as_text()
    found: Counter[tuple[str, str]] = Counter()
    for each in extract_collectives(text, sizes).collectives:
        found[each.kind, "-".join(each.axes)] += each.count * each.bytes
    local = Local(sizes.get("fsdp", 1), sizes["tensor"], sizes["expert"])
    expected = local.of_router() + local.of_weights(route) + local.of_experts(route)
    wrong = {
        key: (found[key], expected[key])
        for key in found.keys() | expected.keys()
        if key not in expected or not 0 <= found[key] - expected[key] <= SCALARS
    }
    assert not wrong, f"(found, by hand): {wrong}"
