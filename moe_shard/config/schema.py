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

from moe_shard.config.generate_config import GenerateConfig
from moe_shard.config.keys import Key, check_leaves, keyed_values, shown, to_plain
from moe_shard.config.mesh_config import MeshConfig
from moe_shard.config.model_config import ModelConfig
from moe_shard.errors import UserError

Optimizer = Literal["adamw", "sgd"]
LearningRateRule = Literal["plain", "maxtext"]
DatasetType = Literal["text", "synthetic"]


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
        learning_rate_rule: a `LearningRateRule`; "plain" begins at one part of the warm-up and
            stays at the end's rate, "maxtext" begins at 0 and is 0 once the schedule is over.
        learning_rate_schedule_steps: length of the schedule in updates; -1: `steps`.
        gradient_clipping_threshold: largest global norm of the gradient; 0: no clipping.
        adam_b1: decay of the first moment.
        adam_b2: decay of the second moment.
        adam_eps: added to the root of the second moment.
        adam_weight_decay: decoupled decay per unit of learning rate.
        decay_vectors: it takes in scales of norms and biases too.
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
    learning_rate_rule: Annotated[
        LearningRateRule, Key("learning_rate_rule", choices=get_args(LearningRateRule))
    ]
    learning_rate_schedule_steps: Annotated[
        int, Key("learning_rate_schedule_steps", least=1, off=-1)
    ]
    gradient_clipping_threshold: Annotated[float, Key("gradient_clipping_threshold", least=0)]
    adam_b1: Annotated[float, Key("adam_b1", least=0, below=1)]
    adam_b2: Annotated[float, Key("adam_b2", least=0, below=1)]
    adam_eps: Annotated[float, Key("adam_eps", above=0)]
    adam_weight_decay: Annotated[float, Key("adam_weight_decay", least=0)]
    decay_vectors: Annotated[bool, Key("adam_decay_vectors")]
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
        dataset_type: a `DatasetType`; "synthetic" is one batch of random tokens, the same in every
            step, for measuring.
        dataset_path: files or directories of text; empty: the standard library's own source text.
        tokenizer_path: a Hugging Face model directory or a tokenizer.json; empty: bytes.
        seed: as in `TrainConfig`.
    """

    dataset_type: Annotated[DatasetType, Key("dataset_type", choices=get_args(DatasetType))]
    dataset_path: Annotated[tuple[str, ...], Key("dataset_path")]
    tokenizer_path: Annotated[str, Key("tokenizer_path")]
    seed: Annotated[int, Key("seed", least=0, below=2**32)]

    def __post_init__(self) -> None:
        check_leaves(self)
        if self.dataset_type == "synthetic" and self.dataset_path:
            raise UserError(
                f"dataset_path={shown(self.dataset_path)} with dataset_type=synthetic, which reads "
                "no text\nfix: dataset_type=text, or no dataset_path"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Names and places.

    Attributes:
        base_output_directory: runs are written below it.
        run_name: directory of this run; by default the model's name, so that the same command
            resumes the same run.
        model_name: the model YAML's name without `.yml`.
        load_parameters_path: where the first parameters of a new run come from: a Hugging Face
            directory, an imported model or a run; empty: they are drawn from `seed`.
        hf_family: name or file of the family that a Hugging Face directory is read by; empty: as
            its config.json says.

    Raises:
        UserError: `run_name` is not the name of a directory, or a path is an address.
    """

    base_output_directory: Annotated[str, Key("base_output_directory")]
    run_name: Annotated[str, Key("run_name")]
    model_name: Annotated[str, Key("model_name")]
    load_parameters_path: Annotated[str, Key("load_parameters_path")]
    hf_family: Annotated[str, Key("hf_family")]

    def __post_init__(self) -> None:
        check_leaves(self)
        if self.run_name in {"", ".", ".."} or "/" in self.run_name or "\\" in self.run_name:
            raise UserError(
                f"run_name={shown(self.run_name)} is not the name of a directory\n"
                "fix: a name without slashes; base_output_directory says where it stands"
            )
        for key, path in (
            ("base_output_directory", self.base_output_directory),
            ("load_parameters_path", self.load_parameters_path),
        ):
            if "://" in path:
                raise UserError(
                    f"{key}={shown(path)} is an address, and files are read and written here by "
                    f"path\nfix: {key}=a folder, where a bucket may be mounted (gcsfuse, s3fs)"
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
        generate: how text is written.
        warnings: one line each, for standard error.
        unbuilt: key and value of what the model asks for and this version does not compute, and
            what that is.
        detected: what was found where the model is a Hugging Face directory, one line each.
    """

    run: RunConfig
    model: ModelConfig
    mesh: MeshConfig
    train: TrainConfig
    data: DataConfig
    generate: GenerateConfig
    warnings: tuple[str, ...] = ()
    unbuilt: tuple[tuple[str, Any, str], ...] = ()
    detected: tuple[str, ...] = ()

    @property
    def not_built(self) -> tuple[str, ...]:
        """`unbuilt` in words: what it is, and `key=value`."""
        return tuple(f"{what} ({key}={shown(value)})" for key, value, what in self.unbuilt)

    def require_built(self) -> None:
        """Refuse to go on with a model that this version would compute differently.

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
        """Every key with its value in plain YAML types; loads again, as a model file, to the same.

        Sizes of -1 stay -1, so that the file is good for another number of devices.
        """
        flat: dict[str, Any] = {}
        model, moe = self.model, self.model.moe
        parts = [self.run, model, model.gating, model.attention, model.attention.rope]
        if moe is None:
            flat["num_experts"] = 1
        else:
            parts += [moe, moe.router]
        for part in (*parts, self.mesh, self.train, self.data, self.generate):
            flat |= keyed_values(part)
        flat |= self.mesh.flat_sizes()
        # The table is whole: rows that it lacks must not come back from base.yml.
        flat["override_logical_axis_rules"] = True
        return flat | {key: to_plain(value) for key, value, _ in self.unbuilt}

    def to_yaml(self) -> str:
        """The text of `config.yml`."""
        return yaml.safe_dump(self.as_flat_dict(), sort_keys=False, default_flow_style=None)


def brief_list(items: Sequence[str], most: int = 8) -> str:
    """At most `most` items on one line, and how many more there are."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
