"""What a MoE layer does and why not otherwise: printed before step 0, and asserted on in tests."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class MoERecord:
    """The choices made when a layer was traced.

    Attributes:
        strategy: `moe_dispatch`.
        transport: how tokens reach their experts: "ragged-all-to-all", "padded all-to-all",
            "all-to-all" (equal pieces, or slots moved by the partitioner), "none".
        grouped_product: the routine that multiplies rows with their experts' weights; "batched"
            where experts have equally many.
        fast_paths: those taken: "singleton", "forced-balance", "equal-pieces", "fused-gate-up",
            "token-chunks", "dropless".
        reasons: {what was chosen or passed over: why}.
    """

    strategy: str
    transport: str
    grouped_product: str
    fast_paths: tuple[str, ...]
    reasons: dict[str, str]

    def lines(self, layers: str) -> list[str]:
        """For a person.

        Args:
            layers: which layers this is of, such as "layers 0-31".
        """
        paths = ", ".join(self.fast_paths) or "none"
        head = (
            f"MoE of {layers}: {self.strategy}, transport {self.transport}, "
            f"products {self.grouped_product}, fast paths {paths}"
        )
        return [head, *(f"  {what}: {why}" for what, why in self.reasons.items())]

    def to_json(self) -> dict[str, Any]:
        """The object `moe` of `lowering.json`."""
        return asdict(self)
