"""Build one MoE layer on a mesh of the eight devices and run it on the oracle's arrays."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding

from moe_shard.config.load import load_config
from moe_shard.config.moe_config import MoEConfig, RouterConfig
from moe_shard.moe.axes import TOKENS
from moe_shard.moe.layer import MoELayer, MoEStats
from moe_shard.moe.losses import load_balance_loss
from moe_shard.moe.record import MoERecord
from moe_shard.moe.strategy import moe_record
from moe_shard.sharding.annotate import Sharding
from moe_shard.sharding.rules import RuleTable
from tests.moe.inputs import Inputs
from tests.moe.oracle import Settings

AXES = ("data", "fsdp", "fsdp_transpose", "tensor", "context", "expert")
TINY = load_config("mixtral-tiny")
RULES = TINY.mesh.logical_axis_rules  # the default table, of `configs/base.yml`
PATHS = {
    "kernel": ("router", "kernel"),
    "gate": ("experts", "gate"),
    "up": ("experts", "up"),
    "down": ("experts", "down"),
    # where there are biases
    "router_bias": ("router", "bias"),
    "correction": ("router", "correction_bias"),
    "gate_bias": ("experts", "gate_bias"),
    "up_bias": ("experts", "up_bias"),
    "down_bias": ("experts", "down_bias"),
    # where there are shared experts
    **{
        f"shared_{leaf}": ("shared", leaf)
        for leaf in ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
    },
    "shared_score": ("shared_gate",),
    # where experts work on a latent
    "latent_down": ("latent", "down"),
    "latent_up": ("latent", "up"),
}
ROUTER_FIELDS = {field.name for field in dataclasses.fields(RouterConfig)}


def mesh_of(sizes: Mapping[str, int], order: Sequence[int] | None = None) -> Mesh:
    """Make a mesh of these axis sizes (default 1) over the devices, in `order` if given."""
    devices = np.array(jax.devices())
    if order is not None:
        devices = devices[list(order)]
    shape = [sizes.get(axis, 1) for axis in AXES]
    return Mesh(devices.reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def moe_config(
    settings: Settings, *, experts: int, hidden: int, dispatch: Any, flag: bool, **route: Any
) -> MoEConfig:
    """Return the package's configuration of the layer that the oracle's settings describe.

    Args:
        route: further fields of the MoE configuration, or of its router's.
    """
    base = TINY.model.moe
    assert base is not None
    of_router = {name: route.pop(name) for name in list(route) if name in ROUTER_FIELDS}
    return dataclasses.replace(
        base,
        num_experts=experts,
        num_experts_per_tok=settings.k,
        moe_mlp_dim=hidden,
        capacity_factor=float(settings.capacity_factor),
        capacity_rule=settings.capacity_rule,
        min_capacity=settings.min_capacity,
        drop_policy=settings.drop_policy,
        moe_dispatch=dispatch,
        moe_dispatch_no_expert_sharding=flag,
        load_balance_loss_weight=float(settings.load_balance_weight),
        load_balance_loss_type=settings.load_balance,
        router_z_loss_weight=float(settings.z_weight),
        router=dataclasses.replace(
            base.router,
            norm_topk_prob=settings.renormalise,
            routed_score_func=settings.score,
            routed_scaling_factor=settings.scaling,
            n_routing_groups=settings.groups,
            topk_routing_group=settings.kept_groups,
            routing_group_score=settings.group_score,
            routed_score_on_input=settings.on_input,
            **of_router,
        ),
        **route,
    )


class Outputs(NamedTuple):
    """Hold the results of one step; `grads` is keyed by the oracle's names."""

    total: jax.Array
    load_balance: jax.Array
    y: jax.Array
    stats: MoEStats
    grads: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class BuiltLayer:
    """Hold an abstract layer, and the placement of its arrays."""

    graphdef: Any
    shapes: dict[str, jax.ShapeDtypeStruct]
    tokens: jax.ShapeDtypeStruct
    settings: Settings
    mesh: Mesh
    sharding: Sharding
    config: MoEConfig
    fused: bool
    real: np.ndarray | None = None

    def apply(self, params: dict[str, jax.Array], x: jax.Array) -> tuple[jax.Array, MoEStats]:
        """Apply the layer as a pure function of its parameters."""
        state: dict[str, Any] = {}
        for name, param in params.items():
            *modules, leaf = PATHS[name]
            module = state
            for each in modules:
                module = module.setdefault(each, {})
            module[leaf] = param
        if self.fused:  # the oracle stores gate and up separately
            experts = state["experts"]
            for end in ("", "_bias"):
                if f"gate{end}" in experts:
                    both = [experts.pop(f"gate{end}"), experts.pop(f"up{end}")]
                    experts[f"gate_up{end}"] = jnp.stack(both, axis=-2)
        real = None if self.real is None else jnp.asarray(self.real)
        return nnx.merge(self.graphdef, nnx.State(state))(x, real=real)

    def step(
        self,
        params: dict[str, jax.Array],
        x: jax.Array,
        cotangent: jax.Array,
        wrap: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda apply: apply,
    ) -> Outputs:
        """Compute the oracle's `total`, and its gradients for the parameters and the tokens."""

        def total(
            params: dict[str, jax.Array], x: jax.Array
        ) -> tuple[jax.Array, tuple[jax.Array, jax.Array, MoEStats]]:
            y, stats = wrap(self.apply)(params, x)
            loss = jnp.sum(y.astype(jnp.float32) * cotangent.astype(jnp.float32))
            balance = load_balance_loss(
                stats.mean_probs[None],
                stats.expert_counts[None],
                tokens=x.shape[1] if stats.tokens is None else stats.tokens[None],
                k=self.settings.k,
                convention=self.settings.load_balance,
            )
            loss += self.settings.load_balance_weight * balance
            loss += self.settings.z_weight * jnp.mean(stats.router_z_loss)
            return loss, (balance, y, stats)

        (loss, aux), (by_params, by_x) = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(
            params, x
        )
        balance, y, stats = aux
        return Outputs(loss, balance, y, stats, {"x": by_x, **by_params})

    def record(self) -> MoERecord:
        """Return the layer's record; nothing is traced."""
        return moe_record(self.config, self.sharding, self.tokens.shape, self.tokens.dtype)

    def shardings(self) -> tuple[dict[str, NamedSharding], NamedSharding]:
        """Return the shardings of the parameters and of the tokens."""
        return {name: s.sharding for name, s in self.shapes.items()}, self.tokens.sharding

    def jitted(self, **options: Any) -> Any:
        """Jit `step` for the mesh; each gradient is sharded as its parameter."""
        params, tokens = self.shardings()
        places: tuple[Any, ...] = (None, None, tokens, None, {"x": tokens, **params})
        return jax.jit(
            lambda p, x, cotangent: self.step(p, x, cotangent, **options),
            in_shardings=(params, tokens, tokens),
            out_shardings=Outputs(*places),
        )

    def lower(self, **options: Any) -> Any:
        """Lower `step` for abstract arrays, which are never allocated."""
        return self.jitted(**options).lower(self.shapes, self.tokens, self.tokens)

    def run(self, inputs: Inputs) -> Outputs:
        """Run `step` on real arrays and fetch the result to the host."""
        params, tokens = self.shardings()
        arguments = jax.device_put(
            (inputs.params, inputs.x, inputs.cotangent), (params, tokens, tokens)
        )
        outputs: Outputs = jax.device_get(_compiled(self.lower(), self.mesh)(*arguments))
        return outputs


_programs: dict[str, Any] = {}


def _compiled(lowered: Any, mesh: Mesh) -> Any:
    """Compile equal program texts once: without an expert axis the flag does not change them."""
    # The text names the mesh's axes and sizes, not the order of its devices.
    key = f"{[device.id for device in mesh.devices.flat]}\n{lowered.as_text()}"
    if key not in _programs:
        _programs[key] = lowered.compile()
    return _programs[key]


def forget_programs() -> None:
    """Drop the compiled programs."""
    _programs.clear()


def build_layer(
    mesh: Mesh,
    settings: Settings,
    *,
    dispatch: str,
    flag: bool,
    rows: int,
    tokens: int,
    model: int,
    hidden: int,
    experts: int,
    dtype: Any = jnp.float32,
    rules: Sequence[tuple[str, Sequence[str]]] = RULES,
    biases: bool = False,
    gate: bool = True,
    real: np.ndarray | None = None,
    **route: Any,
) -> BuiltLayer:
    """Trace the layer's constructor and place what it declares by its logical axes.

    Args:
        biases: whether the experts have biases.
        gate: whether they have a gate.
        real: [B S], which tokens are not padding.
    """
    sharding = Sharding(mesh, RuleTable(rules), "record")
    config = moe_config(
        settings, experts=experts, hidden=hidden, dispatch=dispatch, flag=flag, **route
    )
    layer = nnx.eval_shape(
        lambda: MoELayer(
            config=config,
            model_dim=model,
            gating=dataclasses.replace(
                TINY.model.gating,
                mlp_activations=(settings.activation, "linear")[: 1 + gate],
                mlp_activations_limit=-1 if math.isinf(settings.limit) else settings.limit,
                mlp_linear_offset=settings.offset,
                mlp_bias=biases,
            ),
            dtype=dtype,
            weight_dtype=jnp.float32,
            sharding=sharding,
            rngs=nnx.Rngs(0),
        )
    )
    graphdef, state = nnx.split(layer)
    fused = config.prefuse_moe_weights
    if fused:
        for end, axes in ("", ("exp", "embed_moe", "mlp_moe")), ("_bias", ("exp", "mlp_moe")):
            if f"gate_up{end}" in state["experts"]:
                whole = state["experts"].pop(f"gate_up{end}").get_raw_value()
                one = jax.ShapeDtypeStruct((*whole.shape[:-2], hidden), jnp.float32)
                for leaf in (f"gate{end}", f"up{end}"):
                    state["experts"][leaf] = nnx.Param(one, out_sharding=axes, eager_sharding=False)
    shapes = {}
    named = {path: name for name, path in PATHS.items()}
    for path, variable in nnx.to_flat_state(state):
        name = named[tuple(map(str, path))]
        shape = variable.get_raw_value()
        placed = sharding.named_sharding(name, variable.get_metadata()["out_sharding"], shape.shape)
        shapes[name] = jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=placed)
    token_shape = (rows, tokens, model)
    assert math.prod(mesh.shape.values()) == len(jax.devices())
    return BuiltLayer(
        graphdef=graphdef,
        shapes=shapes,
        tokens=jax.ShapeDtypeStruct(
            token_shape, dtype, sharding=sharding.named_sharding("x", TOKENS, token_shape)
        ),
        settings=settings,
        mesh=mesh,
        sharding=sharding,
        config=config,
        fused=fused,
        real=real,
    )
