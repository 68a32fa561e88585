"""One MoE layer, measured: every dispatch strategy, flag on and off, side by side in one run.

Times are shown as ratios and taken in turn (A B C D, A B C D, ...), so that a machine that slows
down slows all of them; counts and bytes are read from the compiled program and do not vary.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from moe_shard.config.load import load_config
from moe_shard.config.schema import DispatchStrategy
from moe_shard.lowering.report import memory_from_compiled, report_from_text
from moe_shard.moe.layer import MoELayer
from moe_shard.sharding.annotate import Annotator

TOKENS = ("activation_batch_moe", "activation_length_moe", "activation_embed_moe")


@dataclass(frozen=True)
class LayerSize:
    """The layer measured: B rows, S tokens a row, model dim M, expert dim H, E experts, top-K."""

    rows: int = 8
    tokens: int = 128
    model_dim: int = 256
    hidden_dim: int = 512
    experts: int = 8
    k: int = 2
    capacity_factor: float = 1.0


@dataclass(frozen=True)
class Measurement:
    """One program: `value_and_grad` of the layer over its parameters and its input, float32.

    Attributes:
        strategy: `moe_dispatch`.
        flag: `moe_dispatch_no_expert_sharding`.
        tokens: S.
        verdict: of the lowering.
        collectives: how many run.
        collective_bytes: their output bytes per device.
        temp_bytes: scratch memory per device.
        gflops: of one device, as XLA counts them; None where the backend does not tell.
        seconds: median time of a call.
        ratio: the median, over rounds, of its time over that of the first program of its S.
    """

    strategy: str
    flag: bool
    tokens: int
    verdict: str | None
    collectives: int
    collective_bytes: int
    temp_bytes: int | None
    gflops: float | None
    seconds: float
    ratio: float

    def to_json(self) -> dict[str, Any]:
        """As an object of `bench_moe --json`."""
        return asdict(self)


@dataclass(frozen=True)
class _Candidate:
    strategy: str
    flag: bool
    compiled: jax.stages.Compiled
    arguments: tuple[Any, ...]

    def seconds(self) -> float:
        started = time.perf_counter()
        jax.block_until_ready(self.compiled(*self.arguments))
        return time.perf_counter() - started


def measure(
    mesh: Mesh,
    size: LayerSize,
    *,
    rounds: int,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Measurement]:
    """Compile and time all strategies, flag on and off, for one size.

    Args:
        mesh: the devices; `expert` is the axis of interest.
        size: the layer.
        rounds: how often each program is timed, after one call to warm up.
        progress: told what is being done.
    """
    candidates = []
    for strategy in reversed(get_args(DispatchStrategy)):
        for flag in (True, False):
            progress(f"S {size.tokens}: compiling {strategy}, flag {'on' if flag else 'off'}")
            candidates.append(_prepare(mesh, size, strategy, flag))
    for candidate in candidates:
        candidate.seconds()
    times: list[list[float]] = []
    for index in range(rounds):
        progress(f"S {size.tokens}: round {index + 1} of {rounds}")
        times.append([candidate.seconds() for candidate in candidates])
    return [
        _measurement(mesh, size, candidate, [(row[index], row[0]) for row in times])
        for index, candidate in enumerate(candidates)
    ]


def _prepare(mesh: Mesh, size: LayerSize, strategy: DispatchStrategy, flag: bool) -> _Candidate:
    config = load_config("mixtral-tiny")
    assert config.model.moe is not None
    moe = replace(
        config.model.moe,
        num_experts=size.experts,
        num_experts_per_tok=size.k,
        mlp_dim=size.hidden_dim,
        capacity_factor=size.capacity_factor,
        dispatch=strategy,
        no_expert_sharding=flag,
    )
    annotate = Annotator(mesh, config.mesh.rules)

    def build() -> MoELayer:
        return MoELayer(
            config=moe,
            model_dim=size.model_dim,
            activation="silu",
            dtype=jnp.float32,
            weight_dtype=jnp.float32,
            annotate=annotate,
            rngs=nnx.Rngs(0),
        )

    def init() -> Any:
        return nnx.to_pure_dict(nnx.state(build()))

    graph, state = nnx.split(nnx.eval_shape(build))
    shardings = nnx.to_pure_dict(
        nnx.map_state(
            lambda path, param: annotate.sharding(
                ".".join(path), param.get_metadata("logical_axes"), param.get_value().shape
            ),
            state,
        )
    )
    shape = (size.rows, size.tokens, size.model_dim)
    x_sharding = annotate.sharding("x", TOKENS, shape)

    def loss(params: Any, x: Float[Array, "B S M"]) -> Float[Array, ""]:
        y, stats = nnx.merge(graph, params)(x)
        return jnp.mean(jnp.square(y)) + 0.01 * jnp.mean(stats.load_balance_loss)

    step = jax.jit(
        jax.value_and_grad(loss, argnums=(0, 1)),
        in_shardings=(shardings, x_sharding),
        out_shardings=(None, (shardings, x_sharding)),
    )
    params = jax.jit(init, out_shardings=shardings)()
    x = jax.jit(
        lambda: jax.random.normal(jax.random.key(1), shape, jnp.float32), out_shardings=x_sharding
    )()
    return _Candidate(strategy, flag, step.lower(params, x).compile(), (params, x))


def _measurement(
    mesh: Mesh, size: LayerSize, candidate: _Candidate, times: Sequence[tuple[float, float]]
) -> Measurement:
    memory = memory_from_compiled(candidate.compiled)
    text = candidate.compiled.as_text()
    assert text is not None
    report = report_from_text(text, mesh=dict(mesh.shape), memory=memory)
    flops = (candidate.compiled.cost_analysis() or {}).get("flops")
    return Measurement(
        strategy=candidate.strategy,
        flag=candidate.flag,
        tokens=size.tokens,
        verdict=report.verdict,
        collectives=sum(total["count"] for total in report.totals.values()),
        collective_bytes=sum(total["bytes"] for total in report.totals.values()),
        temp_bytes=memory["temp_bytes"] if memory else None,
        gflops=flops / 1e9 if flops else None,
        seconds=statistics.median(mine for mine, _ in times),
        ratio=statistics.median(mine / first for mine, first in times),
    )
