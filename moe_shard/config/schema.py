"""What the code reads: frozen dataclasses that refuse contradictions and say how to cure them.

Every leaf names its YAML key once, in `Key`; loading, checking and writing back all go through
that name. Defaults, units and one line on each key stand in `configs/base.yml` and nowhere else.
Sizes that depend on how many devices there are live in `MeshConfig.resolve` and `checks.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

import yaml

from moe_shard.config.keys import Key, check_leaves, keyed_values, shown, to_plain
from moe_shard.config.mesh import MeshConfig
from moe_shard.errors import UserError

DType = Literal["bfloat16", "float32"]
RematPolicy = Literal["none", "dots", "full", "save_exchanged"]
DispatchStrategy = Literal["einsum", "gather", "ragged"]
RaggedTransport = Literal["auto", "ragged", "padded"]
GroupedProductName = Literal["auto", "ragged_dot", "tokamax", "pallas", "blocked"]
CapacityRule = Literal["maxtext", "gshard"]
DropPolicy = Literal["position", "probability"]
LoadBalanceLoss = Literal["maxtext", "gshard", "huggingface"]
Optimizer = Literal["adamw", "sgd"]
MOST_HEADS = MOST_EXPERTS = 2**16  # far above any model; keeps the divisors in a fix countable
GATE_ACTIVATIONS = ("silu", "gelu", "relu")
"""First entry of `mlp_activations`; the second is `linear`. `gelu` is the tanh form, as in JAX."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """The MoE layer of a model.

    Attributes:
        num_experts: E, experts in each MoE layer.
        num_experts_per_tok: K, experts each token is sent to.
        mlp_dim: H, hidden size of one expert.
        capacity_factor: slots per expert over the slots of a perfect balance; 0 or less: as many
            slots as the row has tokens, so that nothing is dropped.
        capacity_rule: a `CapacityRule`; how the factor is rounded.
        min_capacity: fewest slots of an expert for a batch row.
        drop_policy: a `DropPolicy`; which choices an overfull expert keeps.
        dispatch: a `DispatchStrategy`.
        ragged_transport: a `RaggedTransport`; how `ragged` moves rows.
        ragged_buffer_factor: rows `ragged` can take in over those of a balanced load, beyond which
            it drops; -1: it never drops.
        grouped_product: a `GroupedProductName`; how `ragged` multiplies rows by experts' weights.
        num_token_chunks: parts of a layer's tokens that travel one by one.
        force_load_balance: experts are dealt out in turn; for benchmarks.
        use_random_routing: experts are chosen at random; for benchmarks.
        prefuse_weights: gate and up are one parameter and one product.
        no_expert_sharding: the flag: the dispatched batch dim leaves the expert axes alone.
        norm_topk_prob: the K weights of a token are divided by their sum.
        load_balance_loss_weight: factor of the load-balance loss in the training loss.
        load_balance_loss_type: a `LoadBalanceLoss`.
        router_z_loss_weight: factor of the mean squared log-sum-exp of the router's logits.

    Raises:
        UserError: on a value out of range or a contradiction between keys.
    """

    num_experts: Annotated[int, Key("num_experts", least=1, most=MOST_EXPERTS)]
    num_experts_per_tok: Annotated[int, Key("num_experts_per_tok", least=1)]
    mlp_dim: Annotated[int, Key("base_moe_mlp_dim", least=1)]
    capacity_factor: Annotated[float, Key("capacity_factor")]
    capacity_rule: Annotated[CapacityRule, Key("capacity_rule", choices=get_args(CapacityRule))]
    min_capacity: Annotated[int, Key("min_capacity", least=0)]
    drop_policy: Annotated[DropPolicy, Key("drop_policy", choices=get_args(DropPolicy))]
    dispatch: Annotated[DispatchStrategy, Key("moe_dispatch", choices=get_args(DispatchStrategy))]
    ragged_transport: Annotated[
        RaggedTransport, Key("ragged_transport", choices=get_args(RaggedTransport))
    ]
    ragged_buffer_factor: Annotated[float, Key("ragged_buffer_factor", above=0, off=-1)]
    grouped_product: Annotated[
        GroupedProductName, Key("grouped_product", choices=get_args(GroupedProductName))
    ]
    num_token_chunks: Annotated[int, Key("num_moe_token_chunks", least=1)]
    force_load_balance: Annotated[bool, Key("force_load_balance")]
    use_random_routing: Annotated[bool, Key("use_random_routing")]
    prefuse_weights: Annotated[bool, Key("prefuse_moe_weights")]
    no_expert_sharding: Annotated[bool, Key("moe_dispatch_no_expert_sharding")]
    norm_topk_prob: Annotated[bool, Key("norm_topk_prob")]
    load_balance_loss_weight: Annotated[float, Key("load_balance_loss_weight", least=0)]
    load_balance_loss_type: Annotated[
        LoadBalanceLoss, Key("load_balance_loss_type", choices=get_args(LoadBalanceLoss))
    ]
    router_z_loss_weight: Annotated[float, Key("router_z_loss_weight", least=0)]

    def __post_init__(self) -> None:
        check_leaves(self)
        if self.num_experts_per_tok > self.num_experts:
            raise UserError(
                f"num_experts_per_tok={self.num_experts_per_tok} is more than "
                f"num_experts={self.num_experts}: a token cannot go to an expert twice\n"
                f"fix: num_experts_per_tok from 1 to {self.num_experts}"
            )
        if self.force_load_balance and self.use_random_routing:
            raise UserError(
                "force_load_balance=true and use_random_routing=true: tokens are dealt out or "
                "scattered, not both\nfix: one of the two"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The decoder. Sizes count elements.

    Attributes:
        emb_dim: M, the model dim.
        num_decoder_layers: L.
        num_query_heads: N, query heads.
        num_kv_heads: key and value heads; divides `num_query_heads`.
        head_dim: D, even because RoPE turns pairs.
        mlp_dim: hidden size of a dense MLP.
        vocab_size: V.
        mlp_activations: the gate's activation, then "linear".
        norm_epsilon: added to the mean square in RMSNorm.
        rope_max_timescale: RoPE's theta, in positions.
        logits_via_embedding: the output projection is the embedding table, transposed.
        use_qk_norm: RMSNorm over `head_dim` of queries and keys, before RoPE.
        dtype: of activations and matrix products.
        weight_dtype: of the stored parameters.
        remat_policy: what the backward pass finds saved; a `RematPolicy`.
        moe: the MoE layer, or None for a dense model (`num_experts: 1`).

    Raises:
        UserError: on a value out of range or a contradiction between keys.
    """

    emb_dim: Annotated[int, Key("base_emb_dim", least=1)]
    num_decoder_layers: Annotated[int, Key("base_num_decoder_layers", least=1)]
    num_query_heads: Annotated[int, Key("base_num_query_heads", least=1, most=MOST_HEADS)]
    num_kv_heads: Annotated[int, Key("base_num_kv_heads", least=1)]
    head_dim: Annotated[int, Key("head_dim", least=2)]
    mlp_dim: Annotated[int, Key("base_mlp_dim", least=1)]
    vocab_size: Annotated[int, Key("vocab_size", least=2)]
    mlp_activations: Annotated[tuple[str, ...], Key("mlp_activations")]
    norm_epsilon: Annotated[float, Key("normalization_layer_epsilon", above=0)]
    rope_max_timescale: Annotated[float, Key("rope_max_timescale", above=1)]
    logits_via_embedding: Annotated[bool, Key("logits_via_embedding")]
    use_qk_norm: Annotated[bool, Key("use_qk_norm")]
    dtype: Annotated[DType, Key("dtype", choices=get_args(DType))]
    weight_dtype: Annotated[DType, Key("weight_dtype", choices=get_args(DType))]
    remat_policy: Annotated[RematPolicy, Key("remat_policy", choices=get_args(RematPolicy))]
    moe: MoEConfig | None

    def __post_init__(self) -> None:
        check_leaves(self)
        if self.num_query_heads % self.num_kv_heads:
            raise UserError(
                f"base_num_query_heads={self.num_query_heads} is not a multiple of "
                f"base_num_kv_heads={self.num_kv_heads}: every key head serves as many queries\n"
                f"fix: base_num_kv_heads one of {divisors(self.num_query_heads)}"
            )
        if self.head_dim % 2:
            raise UserError(
                f"head_dim={self.head_dim} is odd, and RoPE turns pairs of elements\n"
                f"fix: head_dim={self.head_dim + 1}"
            )
        if self.mlp_activations not in [(name, "linear") for name in GATE_ACTIVATIONS]:
            raise UserError(
                f"mlp_activations={shown(self.mlp_activations)} is not a known pair\n"
                f"fix: [ACTIVATION, linear] with ACTIVATION one of {', '.join(GATE_ACTIVATIONS)}"
            )

    @property
    def activation(self) -> str:
        """The gate's activation, a name in `GATE_ACTIVATIONS`."""
        return self.mlp_activations[0]

    @property
    def num_experts(self) -> int:
        """Experts in each layer; 1 for a dense model."""
        return self.moe.num_experts if self.moe else 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Batch, schedule, optimizer, and what a run leaves behind.

    Attributes:
        per_device_batch_size: sequences a device holds in one microbatch; may be a fraction.
        max_target_length: tokens in a sequence.
        steps: optimizer updates.
        gradient_accumulation_steps: microbatches in one update.
        optimizer: a `Optimizer`.
        learning_rate: peak.
        warmup_steps_fraction: of the schedule, rising linearly from 0.
        learning_rate_final_fraction: of the peak, at the end of the cosine.
        learning_rate_schedule_steps: length of the schedule in updates; -1: `steps`.
        gradient_clipping_threshold: largest global norm of the gradient; 0: no clipping.
        adam_b1: decay of the first moment.
        adam_b2: decay of the second moment.
        adam_eps: added to the root of the second moment.
        adam_weight_decay: decoupled decay per unit of learning rate.
        seed: of the initial parameters and of the order of the data.
        log_period: updates between two lines on the terminal.
        enable_checkpointing: save, and resume from what is there.
        checkpoint_period: updates between two checkpoints.
        max_num_checkpoints_to_keep: the newest; -1: all.
        async_checkpointing: train on while a checkpoint is written.
        save_checkpoint_on_completion: save after the last update as well.
        enable_tensorboard: write `tensorboard/`.
        dump_hlo: write the compiled step to `hlo/`.
        profile: write a profile of a few updates.
        skip_first_n_steps_for_profiler: updates before the profile starts.
        profiler_steps: updates in the profile.

    Raises:
        UserError: on a value out of range.
    """

    per_device_batch_size: Annotated[float, Key("per_device_batch_size", above=0, most=2**20)]
    max_target_length: Annotated[int, Key("max_target_length", least=1)]
    steps: Annotated[int, Key("steps", least=0)]
    gradient_accumulation_steps: Annotated[int, Key("gradient_accumulation_steps", least=1)]
    optimizer: Annotated[Optimizer, Key("optimizer", choices=get_args(Optimizer))]
    learning_rate: Annotated[float, Key("learning_rate", least=0)]
    warmup_steps_fraction: Annotated[float, Key("warmup_steps_fraction", least=0, most=1)]
    learning_rate_final_fraction: Annotated[
        float, Key("learning_rate_final_fraction", least=0, most=1)
    ]
    learning_rate_schedule_steps: Annotated[
        int, Key("learning_rate_schedule_steps", least=1, off=-1)
    ]
    gradient_clipping_threshold: Annotated[float, Key("gradient_clipping_threshold", least=0)]
    adam_b1: Annotated[float, Key("adam_b1", least=0, below=1)]
    adam_b2: Annotated[float, Key("adam_b2", least=0, below=1)]
    adam_eps: Annotated[float, Key("adam_eps", above=0)]
    adam_weight_decay: Annotated[float, Key("adam_weight_decay", least=0)]
    seed: Annotated[int, Key("seed", least=0, below=2**32)]
    log_period: Annotated[int, Key("log_period", least=1)]
    enable_checkpointing: Annotated[bool, Key("enable_checkpointing")]
    checkpoint_period: Annotated[int, Key("checkpoint_period", least=1)]
    max_num_checkpoints_to_keep: Annotated[int, Key("max_num_checkpoints_to_keep", least=1, off=-1)]
    async_checkpointing: Annotated[bool, Key("async_checkpointing")]
    save_checkpoint_on_completion: Annotated[bool, Key("save_checkpoint_on_completion")]
    enable_tensorboard: Annotated[bool, Key("enable_tensorboard")]
    dump_hlo: Annotated[bool, Key("dump_hlo")]
    profile: Annotated[bool, Key("profile")]
    skip_first_n_steps_for_profiler: Annotated[int, Key("skip_first_n_steps_for_profiler", least=0)]
    profiler_steps: Annotated[int, Key("profiler_steps", least=1)]

    def __post_init__(self) -> None:
        check_leaves(self)

    @property
    def schedule_steps(self) -> int:
        """Length of the learning-rate schedule in updates."""
        if self.learning_rate_schedule_steps == -1:
            return self.steps
        return self.learning_rate_schedule_steps

    def microbatch_rows(self, num_devices: int) -> int:
        """Sequences of one microbatch over all devices.

        Args:
            num_devices: devices in the mesh.

        Raises:
            UserError: `per_device_batch_size * num_devices` is not a whole number.
        """
        rows = self.per_device_batch_size * num_devices
        if rows < 1 or abs(rows - round(rows)) > 1e-6:
            raise UserError(
                f"per_device_batch_size={self.per_device_batch_size:g} on {num_devices} devices "
                f"makes {rows:g} sequences a microbatch, not a whole number\n"
                f"fix: per_device_batch_size={max(1, round(rows)) / num_devices:g}"
            )
        return round(rows)

    def global_batch_rows(self, num_devices: int) -> int:
        """Sequences of one update over all devices: the microbatches of all accumulation steps.

        Args:
            num_devices: devices in the mesh.

        Raises:
            UserError: as `microbatch_rows`.
        """
        return self.microbatch_rows(num_devices) * self.gradient_accumulation_steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the text comes from.

    Attributes:
        dataset_path: files or directories of text; empty: the standard library's own source text.
        tokenizer_path: empty: bytes, the only tokenizer built.
        seed: as in `TrainConfig`.

    Raises:
        UserError: a tokenizer is asked for.
    """

    dataset_path: Annotated[tuple[str, ...], Key("dataset_path")]
    tokenizer_path: Annotated[str, Key("tokenizer_path")]
    seed: Annotated[int, Key("seed", least=0, below=2**32)]

    def __post_init__(self) -> None:
        check_leaves(self)
        if self.tokenizer_path:
            raise UserError(
                f"tokenizer_path={self.tokenizer_path}: this version reads bytes only\n"
                'fix: leave tokenizer_path="" and vocab_size at 257 or more'
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Names and places.

    Attributes:
        base_output_directory: runs are written below it.
        run_name: directory of this run; by default the model's name, so that the same command
            resumes the same run.
        model_name: the model YAML's name without `.yml`.

    Raises:
        UserError: `run_name` is not the name of a directory.
    """

    base_output_directory: Annotated[str, Key("base_output_directory")]
    run_name: Annotated[str, Key("run_name")]
    model_name: Annotated[str, Key("model_name")]

    def __post_init__(self) -> None:
        check_leaves(self)
        if self.run_name in {"", ".", ".."} or "/" in self.run_name or "\\" in self.run_name:
            raise UserError(
                f"run_name={shown(self.run_name)} is not the name of a directory\n"
                "fix: a name without slashes; base_output_directory says where it stands"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run, resolved.

    Attributes:
        run: names and places.
        model: the decoder.
        mesh: axes, sizes, rule table.
        train: batch, schedule, optimizer.
        data: where the text comes from.
        warnings: one line each, for standard error.
        unbuilt: key and value of what the model asks for and this version does not compute.
    """

    run: RunConfig
    model: ModelConfig
    mesh: MeshConfig
    train: TrainConfig
    data: DataConfig
    warnings: tuple[str, ...] = ()
    unbuilt: tuple[tuple[str, Any], ...] = ()

    @property
    def not_built(self) -> tuple[str, ...]:
        """`unbuilt` as `key=value`."""
        return tuple(f"{key}={shown(value)}" for key, value in self.unbuilt)

    def require_built(self) -> None:
        """Refuse to go on with a model that this version would compute differently.

        Raises:
            UserError: `not_built` is not empty.
        """
        if self.not_built:
            raise UserError(
                f"{self.run.model_name} asks for {brief_list(self.not_built)}\n"
                "this version does not build that: training would train another model\n"
                "fix: a model without these keys, e.g. mixtral-8x7b (configs/models)"
            )

    def as_flat_dict(self) -> dict[str, Any]:
        """Every key with its value in plain YAML types; loads again, as a model file, to the same.

        Sizes of -1 stay -1, so that the file is good for another number of devices.
        """
        flat: dict[str, Any] = {}
        for part in (self.run, self.model, self.model.moe, self.mesh, self.train, self.data):
            flat |= keyed_values(part) if part is not None else {"num_experts": 1}
        flat |= self.mesh.flat_sizes()
        # The table is whole: rows that it lacks must not come back from base.yml.
        flat["override_logical_axis_rules"] = True
        return flat | {key: to_plain(value) for key, value in self.unbuilt}

    def to_yaml(self) -> str:
        """The text of `config.yml`."""
        return yaml.safe_dump(self.as_flat_dict(), sort_keys=False, default_flow_style=None)


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, smallest first."""
    return [size for size in range(1, number + 1) if number % size == 0]


def brief_list(items: Sequence[str], most: int = 8) -> str:
    """At most `most` items on one line, and how many more there are."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
