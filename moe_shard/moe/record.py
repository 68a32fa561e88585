"""Record how an MoE layer runs, and why not otherwise: printed before step 0, used in tests.

A record follows from configuration, mesh and shapes alone (`moe_shard.moe.strategy.moe_record`);
nothing has to be traced for it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from moe_shard.config.moe_config import MoEConfig


@dataclass(frozen=True)
class MoERecord:
    """Describe how one layer runs.

    Attributes:
        strategy: the value of `moe_dispatch`.
        transport: how tokens reach their experts: "ragged-all-to-all", "padded all-to-all",
            "equal all-to-all", "all-to-all" (of slots, by the partitioner) or "none".
        grouped_product: the routine that multiplies token copies with their experts' weights: a
            name of `moe.grouped`, or "batched" where experts have equally many.
        fast_paths: fast paths that it takes, of "singleton", "forced-balance", "equal-pieces",
            "fused-gate-up" and "token-chunks".
        router: how experts are chosen and what is added to them, such as
            "sigmoid, top 8 in 4 of 8 groups, correction bias, 1 shared expert".
        reasons: choice -> why.
        not_taken: fast path -> why not.
    """

    strategy: str
    transport: str
    grouped_product: str
    fast_paths: tuple[str, ...]
    router: str
    reasons: dict[str, str]
    not_taken: dict[str, str]

    @classmethod
    def of(
        cls,
        config: MoEConfig,
        *,
        transport: tuple[str, str],
        grouped_product: tuple[str, str],
        singleton: str,
        equal_pieces: str,
        gate_up: str | None = None,
    ) -> MoERecord:
        """Make the record of a layer.

        Args:
            config: the layer's configuration.
            transport: the transport, and the reason for it.
            grouped_product: the routine, and the reason for it.
            singleton: why tokens leave their devices; empty where they do not.
            equal_pieces: why peers do not get equal pieces; empty where they do.
            gate_up: why the routine does not compute gate and up as one product; empty where it
                does; None where it cannot but by one parameter.
        """
        chunks = config.num_moe_token_chunks
        forced = config.router.force_load_balance
        if config.prefuse_moe_weights:
            gate_up = ""
        elif gate_up is None:
            gate_up = "prefuse_moe_weights=false"
        elif gate_up:
            gate_up = f"prefuse_moe_weights=false, {gate_up}"
        why_not = {
            "singleton": singleton,
            "forced-balance": "" if forced else "force_load_balance=false",
            "equal-pieces": equal_pieces,
            "fused-gate-up": gate_up,
            "token-chunks": "" if chunks > 1 else "num_moe_token_chunks=1",
        }
        return cls(
            strategy=config.moe_dispatch,
            transport=transport[0],
            grouped_product=grouped_product[0],
            fast_paths=tuple(path for path, why in why_not.items() if not why),
            router=_router_in_words(config),
            reasons={
                f"transport {transport[0]}": transport[1],
                f"product {grouped_product[0]}": grouped_product[1],
            },
            not_taken={path: why for path, why in why_not.items() if why},
        )

    def apart(self, why: str) -> MoERecord:
        """Return the record of a layer whose gate and up are never one product.

        Args:
            why: why not.
        """
        path = "fused-gate-up"
        return replace(
            self,
            fast_paths=tuple(each for each in self.fast_paths if each != path),
            not_taken=self.not_taken | {path: why},
        )

    def lines(self, layers: str) -> list[str]:
        """Return the record as lines for people.

        Args:
            layers: the layers that this is about, such as "layers 0-31".
        """
        return [
            f"MoE in {layers}: dispatch {self.strategy}, transport {self.transport}, "
            f"product {self.grouped_product}, fast paths: {', '.join(self.fast_paths) or 'none'}",
            f"  router: {self.router}",
            *(f"  {what}: {why}" for what, why in self.reasons.items()),
            f"  not taken: {', '.join(f'{path} ({why})' for path, why in self.not_taken.items())}",
        ]

    def to_json(self) -> dict[str, Any]:
        """Return a value of the object `moe` of `lowering.json`."""
        return asdict(self)


def _router_in_words(config: MoEConfig) -> str:
    router = config.router
    groups, chosen = router.groups
    words = [router.routed_score_func, f"top {config.num_experts_per_tok}"]
    if chosen < groups:
        words[-1] += f" in {chosen} of {groups} groups"
    if router.routed_bias:
        words.append("correction bias")
    if router.routed_score_on_input:
        words.append("weights on the input")
    if config.shared_experts:
        plural = "s" if config.shared_experts > 1 else ""
        words.append(f"{config.shared_experts} shared expert{plural}")
    return ", ".join(words)
