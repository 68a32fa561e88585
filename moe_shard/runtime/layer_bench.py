"""Measure one MoE layer: every dispatch strategy in one run, under two kinds of routing.

Times are shown as ratios and measured round-robin (A B C D, A B C D, ...), so that a machine that
slows down slows all of them. Counts, bytes and FLOPs are read from the compiled program and do not
vary.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from moe_shard.config.hardware import find_hardware
from moe_shard.config.load import load_config
from moe_shard.config.moe_config import MoEConfig
from moe_shard.config.strategies import find_strategy, strategy_names
from moe_shard.lowering.memory import memory_from_compiled
from moe_shard.lowering.reports import report_from_text
from moe_shard.lowering.work import flops_by_scope
from moe_shard.moe.axes import TOKENS
from moe_shard.moe.layer import MoELayer
from moe_shard.moe.losses import load_balance_loss
from moe_shard.runtime.bounds import LAYER_EXCHANGES, PRODUCTS, moe_wire_bytes
from moe_shard.sharding.annotate import Sharding
from moe_shard.sharding.init_sharded import place
from moe_shard.sharding.rules import RuleTable

RoutingKind = Literal["balanced", "skewed"]
_SKEW = 0.1
"""Difference between the mean scores of consecutive experts, in standard deviations."""


@dataclass(frozen=True)
class LayerSize:
    """Describe the measured layer: B sequences of S tokens, dims M and H, E experts, top-K."""

    rows: int = 8
    tokens: int = 128
    model_dim: int = 256
    hidden_dim: int = 512
    experts: int = 8
    k: int = 2
    capacity_factor: float = 1.0
    dtype: DTypeLike = jnp.float32


@dataclass(frozen=True)
class Variant:
    """Describe one way to compute the layer.

    Attributes:
        name: the name in tables.
        changes: fields of `MoEConfig` that it changes.
    """

    name: str
    changes: dict[str, Any]
    routing: dict[str, Any] = field(default_factory=dict)


_FLAG = "moe_dispatch_no_expert_sharding"
_BASELINE = "gather"
"""The variant that times are relative to; it is measured first."""


def variants() -> tuple[Variant, ...]:
    """List the ways to compute the layer: every registered strategy, with flag on and off.

    Strategies that ignore the flag have chunks, fused weights and forced balance instead.
    """
    found = []
    for name in sorted(strategy_names(), key=lambda each: (each != _BASELINE, each)):
        strategy = {"moe_dispatch": name}
        found.append(Variant(name, strategy | {_FLAG: True}))
        if not find_strategy(name).always_moves_tokens:
            found.append(Variant(f"{name}, flag off", strategy | {_FLAG: False}))
            continue
        found += [
            Variant(f"{name}, 2 chunks", strategy | {"num_moe_token_chunks": 2}),
            Variant(f"{name}, fused gate/up", strategy | {"prefuse_moe_weights": True}),
            Variant(f"{name}, forced balance", strategy, {"force_load_balance": True}),
        ]
    return tuple(found)


@dataclass(frozen=True)
class Measurement:
    """Hold one program on one routing: `value_and_grad` over parameters and input.

    Attributes:
        strategy: the variant's name.
        routing: "balanced": that of a random router; "skewed": some experts are chosen much more
            often.
        tokens: S, tokens of a sequence.
        verdict: verdict on the lowering.
        collectives: executed collectives, further rounds of `ragged` not counted.
        wire_bytes: bytes sent per device along the expert axis.
        wire_over_bound: `wire_bytes` over the least for the tokens routed; None without an expert
            axis.
        temp_bytes: bytes of temporaries per device.
        gflops: GFLOPs of the experts' products on one device, padding included.
        flops_over_ideal: these over the FLOPs of the tokens routed.
        dropped: fraction of the choices that were dropped.
        seconds: median time of a call.
        ratio: median over rounds of its time over that of the first program with its S and routing.
        tokens_per_second: tokens per second of one device.
        fraction_of_peak: ideal FLOPs per second over the device's peak; None where that is unknown.
    """

    strategy: str
    routing: RoutingKind
    tokens: int
    verdict: str | None
    collectives: int
    wire_bytes: int
    wire_over_bound: float | None
    temp_bytes: int | None
    gflops: float
    flops_over_ideal: float
    dropped: float
    seconds: float
    ratio: float
    tokens_per_second: float
    fraction_of_peak: float | None

    def to_json(self) -> dict[str, Any]:
        """Return an object of `moe-shard bench --json`."""
        return asdict(self)


@dataclass(frozen=True)
class _Candidate:
    variant: Variant
    compiled: jax.stages.Compiled
    arguments: dict[RoutingKind, tuple[Any, ...]]

    def call(self, routing: RoutingKind) -> tuple[float, Any]:
        started = time.perf_counter()
        result = jax.block_until_ready(self.compiled(*self.arguments[routing]))
        return time.perf_counter() - started, result


def measure(
    mesh: Mesh,
    size: LayerSize,
    *,
    rounds: int,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Measurement]:
    """Compile and time all variants on both routings, for one size.

    Args:
        mesh: the devices; `expert` is the axis of interest.
        size: the size of the layer.
        rounds: number of timed calls of each program, after one warm-up call.
        progress: called with a description of the current step.
    """
    candidates = []
    for variant in variants():
        if not _makes_a_difference(variant, mesh):
            continue
        progress(f"S {size.tokens}: compiling {variant.name}")
        candidates.append(_prepare(mesh, size, variant))
    found = []
    routings: tuple[RoutingKind, ...] = ("balanced", "skewed")
    for routing in routings:
        dropped = [float(candidate.call(routing)[1][0][1]) for candidate in candidates]
        times: list[list[float]] = []
        for index in range(rounds):
            progress(f"S {size.tokens}, {routing}: round {index + 1} of {rounds}")
            times.append([candidate.call(routing)[0] for candidate in candidates])
        for index, candidate in enumerate(candidates):
            mine = [(row[index], row[0]) for row in times]
            found.append(_measurement(mesh, size, candidate, routing, dropped[index], mine))
    return found


def _makes_a_difference(variant: Variant, mesh: Mesh) -> bool:
    """Return whether the flag changes the program; it does not without an expert group."""
    return mesh.shape["expert"] > 1 or "flag off" not in variant.name


def _config(size: LayerSize, variant: Variant) -> MoEConfig:
    base = load_config("mixtral-tiny").model.moe
    assert base is not None
    return replace(
        base,
        num_experts=size.experts,
        num_experts_per_tok=size.k,
        moe_mlp_dim=size.hidden_dim,
        capacity_factor=size.capacity_factor,
        router=replace(base.router, **variant.routing),
        **variant.changes,
    )


def _prepare(mesh: Mesh, size: LayerSize, variant: Variant) -> _Candidate:
    sharding = Sharding(mesh, RuleTable.default(), rule_conflicts="record")
    moe = _config(size, variant)

    def build() -> MoELayer:
        return MoELayer(
            config=moe,
            model_dim=size.model_dim,
            gating=load_config("mixtral-tiny").model.gating,
            dtype=size.dtype,
            weight_dtype=jnp.float32,
            sharding=sharding,
            rngs=nnx.Rngs(0),
        )

    graph, state = nnx.split(nnx.eval_shape(build))
    shardings = nnx.to_pure_dict(
        nnx.map_state(
            lambda path, param: place(".".join(path), param, param.get_value(), sharding),
            state,
        )
    )
    shape = (size.rows, size.tokens, size.model_dim)
    x_sharding = sharding.named_sharding("x", TOKENS, shape)

    def init(skew: float) -> Any:
        params = nnx.to_pure_dict(nnx.state(build()))
        # The first element of every token is one, so its row of the kernel acts as a bias.
        bias = skew * jnp.arange(size.experts, dtype=jnp.float32)
        params["router"]["kernel"] = params["router"]["kernel"].at[0].set(bias)
        return params

    def loss(params: Any, x: Float[Array, "B S M"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
        y, stats = nnx.merge(graph, params)(x)
        dropped = jnp.sum(stats.dropped) / jnp.sum(stats.expert_counts)
        mean = jnp.mean(jnp.square(y.astype(jnp.float32)))
        balance = load_balance_loss(
            stats.mean_probs[None],
            stats.expert_counts[None],
            tokens=size.tokens,
            k=size.k,
            convention="maxtext",
        )
        return mean + 0.01 * balance, dropped

    step = jax.jit(
        jax.value_and_grad(loss, argnums=(0, 1), has_aux=True),
        in_shardings=(shardings, x_sharding),
        out_shardings=(None, (shardings, x_sharding)),
    )
    x = jax.jit(
        lambda: jax.random.normal(jax.random.key(1), shape, size.dtype).at[..., 0].set(1),
        out_shardings=x_sharding,
    )()
    make = jax.jit(init, out_shardings=shardings)
    balanced, skewed = make(0.0), make(_SKEW * 8 / size.experts * 4)
    compiled = step.lower(balanced, x).compile()
    return _Candidate(variant, compiled, {"balanced": (balanced, x), "skewed": (skewed, x)})


def _measurement(
    mesh: Mesh,
    size: LayerSize,
    candidate: _Candidate,
    routing: RoutingKind,
    dropped: float,
    times: Sequence[tuple[float, float]],
) -> Measurement:
    memory = memory_from_compiled(candidate.compiled)
    text = candidate.compiled.as_text()
    assert text is not None
    report = report_from_text(text, mesh=dict(mesh.shape), memory=memory)
    assert report.extraction is not None
    tokens = size.rows * size.tokens // mesh.size
    group = mesh.shape["expert"]
    row_bytes = size.model_dim * jnp.dtype(size.dtype).itemsize
    least = LAYER_EXCHANGES * tokens * size.k * row_bytes * (group - 1) // group
    sent = moe_wire_bytes(report.collectives, ["expert"])
    flops = flops_by_scope(report.extraction.walk, report.extraction.roles.flow)["experts"]
    ideal = 2 * PRODUCTS * tokens * size.k * size.model_dim * size.hidden_dim
    seconds = statistics.median(mine for mine, _ in times)
    hardware = find_hardware(mesh.devices.flat[0].device_kind)
    peak = hardware.peak_flops.get(jnp.dtype(size.dtype).name) if hardware else None
    return Measurement(
        strategy=candidate.variant.name,
        routing=routing,
        tokens=size.tokens,
        verdict=report.verdict,
        collectives=sum(total["count"] for total in report.totals.values()),
        wire_bytes=sent,
        wire_over_bound=sent / least if least else None,
        temp_bytes=memory["temp_bytes"] if memory else None,
        gflops=flops / 1e9,
        flops_over_ideal=flops / ideal,
        dropped=dropped,
        seconds=seconds,
        ratio=statistics.median(mine / first for mine, first in times),
        tokens_per_second=tokens / seconds,
        fraction_of_peak=ideal / seconds / peak if peak else None,
    )
