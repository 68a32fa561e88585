"""Define the frozen dataclasses that the code reads; they refuse contradictions and name the fix.

An attribute has the name and the default of its key in `configs/base.yml`, which has units and a
line on each as well; tests compare the two. Only MaxText's `base_` is left out of attributes.
Sizes that depend on the number of devices are in `MeshConfig.resolve` and `checks.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

from moe_shard.config.data_config import DataConfig as DataConfig
from moe_shard.config.eval_config import EvalConfig
from moe_shard.config.generate_config import GenerateConfig
from moe_shard.config.keys import Key, check_leaves, keyed_values, shown, to_plain
from moe_shard.config.local_config import LocalConfig
from moe_shard.config.mesh_config import MeshConfig
from moe_shard.config.model_config import CrossEntropyName, DType, ModelConfig
from moe_shard.config.output_address import check_output
from moe_shard.config.strict_yaml import format_yaml
from moe_shard.errors import UserError

Optimizer = Literal["adamw", "sgd", "adafactor", "muon"]
MomentDType = Literal["", "bfloat16", "float16", "float32"]
LearningRateRule = Literal["plain", "maxtext"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Describe the batch, the schedule, the optimizer, and what a run writes.

    Attributes:
        per_device_batch_size: sequences per device in one microbatch; may be a fraction.
        max_target_length: tokens in a sequence.
        steps: optimizer updates.
        gradient_accumulation_steps: microbatches in one update.
        cross_entropy: a `CrossEntropyName`; "auto" is by chunks of tokens.
        num_vocab_tiling: chunks that a device divides its tokens into for logits and loss; -1:
            chosen by size.
        cast_weights_once: whether the layers' matrices are cast to `dtype` once a step, before the
            layers; otherwise each layer casts its own, in every pass over it.
        optimizer: an `Optimizer`; "adafactor" has a rate relative to the parameters, and reads no
            other key of an optimizer; "muon" updates vectors, embedding and logits by Adam.
        shard_optimizer_over_data: whether each device of the data axis holds and updates a part of
            the parameters, and of the optimizer's state, of its own (ZeRO-1).
        optimizer_memory_host_offload: whether the optimizer's moments live in the host's memory.
        learning_rate: peak learning rate.
        warmup_steps_fraction: fraction of the schedule over which the learning rate rises linearly
            from 0.
        learning_rate_final_fraction: learning rate at the end of the cosine, over its peak.
        learning_rate_rule: a `LearningRateRule`; "plain" starts at one step of the warm-up and
            stays at the final rate, "maxtext" starts at 0 and is 0 once the schedule is over.
        learning_rate_schedule_steps: length of the schedule in updates; -1: `steps`.
        gradient_clipping_threshold: global norm that the gradient is clipped to; 0: no clipping.
        skip_step_on_spikes: whether a step whose loss or gradient norm is far above those of the
            steps before is skipped.
        skip_step_interval: steps whose mean and standard deviation it is compared with.
        skip_step_scaling_factor: standard deviations above the mean that are a spike.
        max_consecutive_bad_steps: steps in a row whose loss, gradient or update is not finite, or
            is a spike, after which the run ends; -1: any number is skipped.
        adam_b1: decay of the first moment.
        adam_b2: decay of the second moment.
        adam_eps: number added to the root of the second moment.
        adam_weight_decay: decoupled weight decay per unit of learning rate.
        adam_decay_vectors: whether weight decay includes the scales of norms and biases.
        mu_dtype: dtype of the first moments, a `MomentDType`; empty: that of the parameters.
        muon_beta: decay of Muon's momentum.
        muon_weight_decay: as `adam_weight_decay`, for what Muon updates.
        muon_consistent_rms: root mean square of Muon's updates; -1: scaled by the width instead.
        muon_include_routers: whether Muon updates the routers' matrices too.
        trainable_parameters_mask: regular expressions; parameters in whose names ("/" between the
            parts) one is found are trained, the others stay as they are; empty: all are trained.
        seed: seed of the initial parameters and of the order of the data.
        log_period: updates between two lines on the terminal, and between two records of layers.
        enable_checkpointing: whether to save checkpoints, and to resume from those that are there.
        resume_strict: whether to refuse to resume with settings that make another run of it.
        checkpoint_period: updates between two checkpoints.
        checkpoint_period_minutes: minutes after which a checkpoint is saved as well; 0: none is
            for the time alone.
        max_num_checkpoints_to_keep: number of newest checkpoints to keep; -1: all.
        checkpoint_keep_period: of older ones, those whose updates it divides are kept too; -1:
            none.
        async_checkpointing: whether training continues while a checkpoint is written.
        save_checkpoint_on_completion: whether to save after the last update as well.
        verify_checkpoints: whether the checksums of a checkpoint's files are compared before a
            run continues from it; otherwise their names and sizes are.
        enable_tensorboard: whether to write `tensorboard/`.
        enable_wandb: whether to log the same numbers to Weights & Biases.
        wandb_project_name: project there.
        wandb_run_name: name of the run there; empty: `run_name`.
        dump_hlo: whether to write the compiled step to `hlo/`.
        profile: whether to write a profile of a few updates.
        skip_first_n_steps_for_profiler: updates before the profile starts.
        profiler_steps: updates in the profile.

    Raises:
        UserError: on a value out of range.
    """

    per_device_batch_size: Annotated[float, Key(above=0, most=2**20)] = 1.0
    max_target_length: Annotated[int, Key(least=1, most=2**26)] = 2048
    steps: Annotated[int, Key(least=0)] = 1000
    gradient_accumulation_steps: Annotated[int, Key(least=1, most=2**20)] = 1
    cross_entropy: Annotated[CrossEntropyName, Key(choices=get_args(CrossEntropyName))] = "auto"
    num_vocab_tiling: Annotated[int, Key(least=1, off=-1)] = -1
    cast_weights_once: Annotated[bool, Key()] = True
    optimizer: Annotated[Optimizer, Key(choices=get_args(Optimizer))] = "adamw"
    shard_optimizer_over_data: Annotated[bool, Key()] = False
    optimizer_memory_host_offload: Annotated[bool, Key()] = False
    learning_rate: Annotated[float, Key(least=0)] = 3e-05
    warmup_steps_fraction: Annotated[float, Key(least=0, most=1)] = 0.1
    learning_rate_final_fraction: Annotated[float, Key(least=0, most=1)] = 0.1
    learning_rate_rule: Annotated[LearningRateRule, Key(choices=get_args(LearningRateRule))] = (
        "plain"
    )
    learning_rate_schedule_steps: Annotated[int, Key(least=1, off=-1)] = -1
    gradient_clipping_threshold: Annotated[float, Key(least=0)] = 1.0
    skip_step_on_spikes: Annotated[bool, Key()] = False
    skip_step_interval: Annotated[int, Key(least=2, most=2**20)] = 128
    skip_step_scaling_factor: Annotated[float, Key(least=0)] = 6.0
    max_consecutive_bad_steps: Annotated[int, Key(least=1, off=-1)] = 3
    adam_b1: Annotated[float, Key(least=0, below=1)] = 0.9
    adam_b2: Annotated[float, Key(least=0, below=1)] = 0.95
    adam_eps: Annotated[float, Key(above=0)] = 1e-08
    adam_weight_decay: Annotated[float, Key(least=0)] = 0.1
    adam_decay_vectors: Annotated[bool, Key()] = False
    mu_dtype: Annotated[MomentDType, Key(choices=get_args(MomentDType))] = ""
    muon_beta: Annotated[float, Key(least=0, below=1)] = 0.95
    muon_weight_decay: Annotated[float, Key(least=0)] = 0.0
    muon_consistent_rms: Annotated[float, Key(above=0, off=-1)] = -1.0
    muon_include_routers: Annotated[bool, Key()] = False
    trainable_parameters_mask: Annotated[tuple[str, ...], Key()] = ()
    seed: Annotated[int, Key(least=0, below=2**32)] = 0
    log_period: Annotated[int, Key(least=1)] = 1
    enable_checkpointing: Annotated[bool, Key()] = True
    resume_strict: Annotated[bool, Key()] = False
    checkpoint_period: Annotated[int, Key(least=1)] = 1000
    checkpoint_period_minutes: Annotated[float, Key(least=0)] = 0.0
    max_num_checkpoints_to_keep: Annotated[int, Key(least=1, off=-1)] = -1
    checkpoint_keep_period: Annotated[int, Key(least=1, off=-1)] = -1
    async_checkpointing: Annotated[bool, Key()] = True
    save_checkpoint_on_completion: Annotated[bool, Key()] = True
    verify_checkpoints: Annotated[bool, Key()] = True
    enable_tensorboard: Annotated[bool, Key()] = True
    enable_wandb: Annotated[bool, Key()] = False
    wandb_project_name: Annotated[str, Key()] = "moe_shard"
    wandb_run_name: Annotated[str, Key()] = ""
    dump_hlo: Annotated[bool, Key()] = False
    profile: Annotated[bool, Key()] = False
    skip_first_n_steps_for_profiler: Annotated[int, Key(least=0)] = 1
    profiler_steps: Annotated[int, Key(least=1)] = 5

    def __post_init__(self) -> None:
        check_leaves(self)
        if self.checkpoint_keep_period != -1 and self.max_num_checkpoints_to_keep == -1:
            raise UserError(
                f"checkpoint_keep_period={self.checkpoint_keep_period} keeps what is kept anyway: "
                "max_num_checkpoints_to_keep=-1 keeps all\nfix: max_num_checkpoints_to_keep=3"
            )

    @property
    def schedule_steps(self) -> int:
        """Return the length of the learning-rate schedule in updates."""
        if self.learning_rate_schedule_steps == -1:
            return self.steps
        return self.learning_rate_schedule_steps

    def microbatch_rows(self, num_devices: int) -> int:
        """Return the sequences of one microbatch over all devices.

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
        """Return the sequences of one update over all devices: those of all its microbatches.

        Args:
            num_devices: devices in the mesh.

        Raises:
            UserError: as `microbatch_rows`.
        """
        return self.microbatch_rows(num_devices) * self.gradient_accumulation_steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Describe the names and paths of a run.

    Attributes:
        base_output_directory: directory that runs are written into, or gs://BUCKET/PATH.
        run_name: directory of this run; by default the model's name, so that the same command
            resumes the same run.
        model_name: the model YAML's name without `.yml`.
        load_parameters_path: source of the initial parameters: a Hugging Face directory, an
            imported model or a run; empty: they are initialised from `seed`.
        hf_family: name or file of the family by which a Hugging Face directory is read; empty: the
            one that its config.json names.
        weights_outside_directory: whether the index of a Hugging Face directory may name files of
            weights outside of it, by `..` or absolute paths.
        jax_cache_dir: directory that compiled programs are kept in for later starts; "auto":
            `moe_shard/jax` in the user's cache directory; empty: none are kept.
        jax_distributed_initialization_timeout: seconds for which processes wait for each other.

    Raises:
        UserError: `run_name` is not the name of a directory, or a path is an address.
    """

    base_output_directory: Annotated[str, Key()] = "outputs"
    run_name: Annotated[str, Key()]
    model_name: Annotated[str, Key()]
    load_parameters_path: Annotated[str, Key()] = ""
    hf_family: Annotated[str, Key()] = ""
    weights_outside_directory: Annotated[bool, Key()] = False
    jax_cache_dir: Annotated[str, Key()] = "auto"
    jax_distributed_initialization_timeout: Annotated[int, Key(least=1, most=86_400)] = 50

    def __post_init__(self) -> None:
        check_leaves(self)
        if self.run_name in {"", ".", ".."} or "/" in self.run_name or "\\" in self.run_name:
            raise UserError(
                f"run_name={shown(self.run_name)} is not the name of a directory\n"
                "fix: a name without slashes; base_output_directory is where it stands"
            )
        check_output(self.base_output_directory, self.run_name)
        for key, path in (
            ("load_parameters_path", self.load_parameters_path),
            ("jax_cache_dir", self.jax_cache_dir),
        ):
            if "://" in path:
                raise UserError(
                    f"{key}={shown(path)} is an address, and files are read and written here by "
                    f"path\nfix: {key}=a folder, where a bucket may be mounted (gcsfuse, s3fs)"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Hold the resolved configuration of one run.

    Attributes:
        run: names and paths.
        model: the decoder.
        mesh: axes, their sizes, and the rule table.
        train: batch, schedule, optimizer.
        data: where the text comes from.
        evaluation: when the run is evaluated on held-out text.
        local: checkpoints on each machine's own disk.
        generate: how text is generated.
        warnings: one line each, for standard error.
        unbuilt: key, value, and what it requests, for what the model needs and this version does
            not build.
        detected: what was found where the model is a Hugging Face directory, one line each.
        stored_dtype: dtype of the weights of a Hugging Face directory or an imported model, where
            the command does not say `weight_dtype`; empty elsewhere.
    """

    run: RunConfig
    model: ModelConfig
    mesh: MeshConfig
    train: TrainConfig
    data: DataConfig
    evaluation: EvalConfig
    local: LocalConfig
    generate: GenerateConfig
    warnings: tuple[str, ...] = ()
    unbuilt: tuple[tuple[str, Any, str], ...] = ()
    detected: tuple[str, ...] = ()
    stored_dtype: DType | Literal[""] = ""

    def __post_init__(self) -> None:
        held_out = self.data.eval_dataset_path or self.data.eval_holdout_fraction
        if self.evaluation.eval_interval != -1 and not held_out:
            raise UserError(
                f"eval_interval={self.evaluation.eval_interval} without text to evaluate on\n"
                "fix: eval_dataset_path=FILES, or eval_holdout_fraction=0.05 of dataset_path"
            )
        if self.data.use_sft and self.train.cross_entropy == "tokamax":
            raise UserError(
                "cross_entropy=tokamax has a target for every token, and use_sft=true has not\n"
                "fix: cross_entropy=auto"
            )
        if self.model.lora.enable_lora and self.train.trainable_parameters_mask:
            raise UserError(
                "enable_lora=true trains the adapters, and trainable_parameters_mask="
                f"{shown(self.train.trainable_parameters_mask)} other parameters\n"
                "fix: lora_module_path names the weights that have adapters"
            )
        if self.local.key and not self.train.enable_checkpointing:
            raise UserError(
                f"{self.local.key}=true saves beside the run's own checkpoints, and "
                "enable_checkpointing=false saves none\nfix: enable_checkpointing=true"
            )
        for key in ("shard_optimizer_over_data", "optimizer_memory_host_offload"):
            if self.local.enable_emergency_checkpoint and getattr(self.train, key):
                raise UserError(
                    f"enable_emergency_checkpoint=true saves a state that each replica has whole "
                    f"on its devices, which {key}=true does not leave it\n"
                    f"fix: {key}=false, or checkpoint_period_minutes=MINUTES"
                )

    def as_stored(self) -> Config:
        """Return the same with parameters in the checkpoint's dtype, for what does not train."""
        if not self.stored_dtype:
            return self
        model = dataclasses.replace(self.model, weight_dtype=self.stored_dtype)
        return dataclasses.replace(self, model=model)

    @property
    def not_built(self) -> tuple[str, ...]:
        """Return `unbuilt` in words: what it is, and `key=value`."""
        return tuple(f"{what} ({key}={shown(value)})" for key, value, what in self.unbuilt)

    def require_built(self) -> None:
        """Refuse a model that this version would compute differently.

        Raises:
            UserError: `not_built` is not empty.
        """
        if self.not_built:
            raise UserError(
                f"{self.run.model_name} asks for {brief_list(self.not_built, 5)}\n"
                "this version does not build that: training would train another model\n"
                "fix: a model without these keys, e.g. mixtral-8x7b (configs/models)"
            )

    def as_flat_dict(self) -> dict[str, Any]:
        """Return every key with its value in plain YAML types; loading them gives the same again.

        Sizes of -1 stay -1, so that the file is good for another number of devices.
        """
        flat: dict[str, Any] = {}
        model, moe = self.model, self.model.moe
        parts: list[Any] = [self.run, model, model.remat, model.gating, model.attention]
        parts += [
            model.attention.rope,
            model.delta,
            model.mamba,
            model.short_conv,
            model.mtp,
            model.lora,
        ]
        if moe is None:
            flat["num_experts"] = 1
        else:
            parts += [moe, moe.router]
        parts += [self.mesh, self.train, self.local, self.data, self.evaluation, self.generate]
        for part in parts:
            flat |= keyed_values(part)
        flat |= self.mesh.flat_sizes()
        # The table is complete: rules that it lacks must not come back from base.yml.
        flat["override_logical_axis_rules"] = True
        return flat | {key: to_plain(value) for key, value, _ in self.unbuilt}

    def to_yaml(self) -> str:
        """Return the text of `config.yml`."""
        return format_yaml(self.as_flat_dict())


def brief_list(items: Sequence[str], most: int = 8) -> str:
    """Write at most `most` items on one line, and how many more there are."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
