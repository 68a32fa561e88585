"""Compare a start with the run's config.yml: what takes effect, what changes the run, what cannot.

The last start's config.yml is compared with this start's, key by key, before jax is loaded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any, get_args

from moe_shard.checkpoints.run_files import checkpoint_names
from moe_shard.config.keys import shown
from moe_shard.config.load import base_settings
from moe_shard.config.mesh_config import LEVELS, MESH_AXES, parallelism_key
from moe_shard.config.model_config import DType
from moe_shard.config.schema import Config, brief_list
from moe_shard.config.strict_yaml import parse_yaml, read_mapping
from moe_shard.errors import UserError
from moe_shard.files import next_numbered, read_small, write_bytes
from moe_shard.training.run_folder import reach_run


class Kind(Enum):
    """Say what a key means to a run that goes on: the words that a changed one is shown with."""

    EFFECT = "takes effect from here on"
    RUN = "makes another run of it"
    FIXED = "cannot change"
    FREE = "changes where and how, not what"


_KEYS: dict[Kind, str] = {
    Kind.EFFECT: """
        steps learning_rate warmup_steps_fraction learning_rate_final_fraction learning_rate_rule
        learning_rate_schedule_steps gradient_clipping_threshold adam_b1 adam_b2 adam_eps
        adam_weight_decay adam_decay_vectors mu_dtype muon_beta muon_weight_decay
        muon_consistent_rms load_balance_loss_weight load_balance_loss_type load_balance_probs
        router_z_loss_weight routed_bias_update_rate mtp_loss_scaling_factor log_period
        enable_checkpointing
        checkpoint_period checkpoint_period_minutes checkpoint_keep_period
        eval_start_step eval_steps eval_patience eval_interval eval_dataset_path target_eval_loss
        eval_data_columns eval_split
        max_consecutive_bad_steps skip_step_on_spikes skip_step_interval skip_step_scaling_factor
        max_num_checkpoints_to_keep async_checkpointing
        save_checkpoint_on_completion verify_checkpoints enable_tensorboard resume_strict
        enable_wandb wandb_project_name wandb_run_name
        """,
    Kind.RUN: """
        dataset_weights
        seed dataset_type dataset_path tokenizer_path eval_holdout_fraction train_data_columns
        train_split dataset_encoding corrupt_records split_special_tokens
        use_sft sft_train_on_completion_only packing chat_template chat_template_path
        chat_template_date lora_alpha
        per_device_batch_size max_target_length gradient_accumulation_steps dtype
        mlp_activations mlp_activations_limit mlp_linear_offset
        normalization_layer_epsilon
        embedding_multiplier residual_multiplier logits_scaling
        local_rope_max_timescale use_v_norm
        final_logits_soft_cap latent_norm_epsilon sliding_window_size chunk_attn_window_size
        attn_logits_soft_cap attention_scale clip_qkv temperature_tuning temperature_tuning_scale
        temperature_tuning_floor rope_type rope_max_timescale partial_rotary_factor rope_interleave
        rope_factor original_max_position_embeddings max_position_embeddings beta_fast beta_slow
        rope_truncate rope_attention_scaling rope_attention_factor mscale rope_low_freq_factor
        rope_high_freq_factor rope_short_factors rope_long_factors num_experts_per_tok
        capacity_factor capacity_rule min_capacity drop_policy moe_dispatch ragged_buffer_factor
        force_load_balance use_random_routing routed_score_func n_routing_groups topk_routing_group
        routing_group_score norm_topk_prob norm_topk_epsilon routed_scaling_factor
        routed_score_on_input
        sparsemixer_jitter normalization_zero_centered use_qk_norm_in_gdn mtp_after_final_norm
        indexer_topk indexer_rope_interleave
        mamba_step_min mamba_step_max
        """,
    Kind.FIXED: """
        base_emb_dim base_num_decoder_layers base_mlp_dim vocab_size mlp_bias normalization_type
        logits_via_embedding logits_bias first_num_dense_layers interleave_moe_layer_step
        dense_layers weight_dtype attention_type base_num_query_heads base_num_kv_heads head_dim
        q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim attention_pattern
        nope_layer_interval nope_layers attention_bias attention_out_bias attention_sink use_qk_norm
        attention_output_gate global_num_kv_heads global_head_dim share_kv_projections
        norm_placement router_norm router_expert_scale routed_norms layer_scalar
        qk_norm_type num_experts base_moe_mlp_dim moe_latent_dim router_bias routed_bias
        shared_experts shared_expert_mlp_dim shared_expert_gate optimizer muon_include_routers
        trainable_parameters_mask enable_lora lora_rank lora_module_path
        mixer_pattern layers_without_mlp gdn_num_key_heads gdn_num_value_heads gdn_key_head_dim
        gdn_value_head_dim gdn_conv_kernel_dim mtp_num_layers mamba_num_heads mamba_head_dim
        use_indexer indexer_head_dim indexer_n_heads
        mamba_expand mamba_num_groups mamba_state_dim mamba_conv_kernel_dim mamba_conv_bias
        mamba_proj_bias short_conv_kernel_dim short_conv_bias
        """,
    Kind.FREE: """
        enable_emergency_checkpoint local_checkpoint_directory local_checkpoint_period
        enable_multi_tier_checkpointing multi_tier_checkpointing_backup_interval_minutes
        multi_tier_checkpointing_backup_interval_steps mtc_data_parallelism
        lora_restore_path
        model_name hf_family load_parameters_path run_name base_output_directory jax_cache_dir
        weights_outside_directory
        jax_distributed_initialization_timeout
        remat_policy decoder_layer_input query_proj key_proj value_proj context attention_out
        out_proj query_wa_proj mla_q kv_wa_proj mla_kv mlpwi_0 mlpwi_1 mlpwo moe_mlpwi_0
        moe_mlpwi_1 moe_mlpwo moe_exchanged attention context_parallel_strategy
        context_parallel_load_balance ragged_transport grouped_product num_moe_token_chunks
        prefuse_moe_weights moe_dispatch_no_expert_sharding cross_entropy num_vocab_tiling
        gdn_chunk_size mamba_chunk_size cast_weights_once shard_optimizer_over_data
        optimizer_memory_host_offload
        decode_sampling_strategy decode_sampling_temperature decode_sampling_nucleus_p
        decode_sampling_top_k max_new_tokens dump_hlo profile skip_first_n_steps_for_profiler
        profiler_steps mesh_axes logical_axis_rules rule_conflicts num_simulated_devices
        custom_mesh_and_rule override_logical_axis_rules
        """,
}

KIND_OF: dict[str, Kind] = {
    **{key: kind for kind, keys in _KEYS.items() for key in keys.split()},
    **{parallelism_key(level, axis): Kind.FREE for level in LEVELS for axis in MESH_AXES},
}
"""Kind of every key of `base.yml`; a test compares the two."""

_PLACES = {"model_name", "run_name", "base_output_directory"}
"""Keys that say where the run is: the folder is the same, however it is named."""


@dataclass(frozen=True)
class Changes:
    """Hold the settings in which a start differs from the last one of the same run.

    Attributes:
        folder: folder of the run.
        resumes: whether there is a checkpoint to go on from.
        differing: key -> its value at the last start and at this one.
        unread: why the last start's config.yml cannot be read; empty where it can.
        optimizer: this start's optimizer.
        stretched: whether the length of the schedule follows `steps`.
    """

    folder: Path
    resumes: bool
    differing: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    unread: str = ""
    optimizer: str = "adamw"
    stretched: bool = False

    def of(self, kind: Kind) -> dict[str, tuple[Any, Any]]:
        """Return the differing keys of one kind; a key that is not in the table changes the run."""
        return {
            key: values
            for key, values in self.differing.items()
            if KIND_OF.get(key, Kind.RUN) is kind and not self._is_idle(key)
        }

    def _is_idle(self, key: str) -> bool:
        """Return whether a key is Muon's own, and the optimizer another one."""
        return key.startswith("muon_") and self.optimizer != "muon"

    def require_possible(self, *, strict: bool) -> None:
        """Refuse what cannot change in a run that goes on.

        Args:
            strict: refuse as well what makes another run of it.

        Raises:
            UserError: names both values and the fix.
        """
        fixed, other = self.of(Kind.FIXED), self.of(Kind.RUN)
        if self.resumes and fixed:
            back = " ".join(f"{key}={shown(values[0])}" for key, values in list(fixed.items())[:4])
            raise UserError(
                f"{self.folder} holds checkpoints of another model: {_listed(fixed)}\n"
                f"fix: {back}, or another run_name for a run of its own"
            )
        if self.resumes and strict and other:
            raise UserError(
                f"{self.folder} would go on as another run: {_listed(other)} (resume_strict=true)\n"
                "fix: the earlier values, another run_name, or resume_strict=false"
            )

    def lines(self) -> Iterator[str]:
        """Yield a line a kind, in the order of their weight."""
        if self.unread:
            yield f"the config.yml of the last start is not compared with this one: {self.unread}"
        if not self.resumes:
            if all_of := {k: v for k, v in self.differing.items() if not self._is_idle(k)}:
                yield f"settings since the last start, without a checkpoint: {_listed(all_of)}"
            return
        for kind in (Kind.RUN, Kind.EFFECT, Kind.FREE):
            if found := self.of(kind):
                yield f"{kind.value}: {_listed(found)}"
        if "steps" in self.differing and self.stretched:
            yield "with learning_rate_schedule_steps=-1 the schedule has the new length as well"


def find_changes(folder: Path, config: Config) -> Changes | None:
    """Compare a start with the last one in the folder; None if there was none.

    Args:
        folder: folder of the run.
        config: this start's configuration.
    """
    path = folder / "config.yml"
    if not os.path.lexists(path):
        return None
    resumes = any(name.isdecimal() for name in checkpoint_names(folder))
    try:
        earlier = read_mapping(path)
    except UserError as error:
        return Changes(folder, resumes, unread=str(error).splitlines()[0])
    base, now = base_settings(), config.as_flat_dict()
    differing = {}
    for key, value in now.items():
        there = earlier.get(key, base.get(key))
        # A default of -1 is derived from other keys.
        known = key in earlier or (key in base and there != -1 and "num_experts" in earlier)
        if key in _PLACES or not known or there == value:
            continue
        if key not in earlier and 1 in (earlier["num_experts"], now["num_experts"]):
            continue  # of the MoE layer, which a dense model does not list
        differing[key] = (there, value)
    return Changes(
        folder,
        resumes,
        differing,
        optimizer=config.train.optimizer,
        stretched=config.train.learning_rate_schedule_steps == -1,
    )


def keep_weight_dtype(config: Config) -> Config:
    """Keep the dtype of the parameters that a run began with, unless the command says another.

    A run of an earlier version has parameters in the dtype of the checkpoint that it began with.

    Args:
        config: this start's configuration.
    """
    changes = find_changes(reach_run(config.run), config) if config.stored_dtype else None
    begun: Any
    begun, here = changes.differing.get("weight_dtype", ("", "")) if changes else ("", "")
    if changes is None or not changes.resumes or begun not in get_args(DType):
        return config
    line = (
        f"parameters stay in {begun}, as this run began (weight_dtype={begun}); a run of another "
        f"run_name keeps them in {here}"
    )
    model = replace(config.model, weight_dtype=begun)
    return replace(config, model=model, warnings=(*config.warnings, line))


def refuse_impossible(config: Config) -> None:
    """Refuse, before anything slow, settings with which a run cannot go on.

    Raises:
        UserError: as `Changes.require_possible`.
    """
    changes = find_changes(reach_run(config.run), config)
    if changes:
        changes.require_possible(strict=config.train.resume_strict)


def batch_line(folder: Path, config: Config, num_devices: int) -> str:
    """Return a line if an update has another number of sequences than at the last start.

    Args:
        folder: folder of the run, whose lowering.json has the devices of the last start.
        config: this start's configuration.
        num_devices: devices of this start.
    """
    try:
        earlier = parse_yaml(read_small(folder / "config.yml").decode())
        devices = json.loads(read_small(folder / "lowering.json"))["num_devices"]
        rows = devices * earlier["per_device_batch_size"] * earlier["gradient_accumulation_steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""  # not a run of this version, or damaged: nothing to compare with
    here = config.train.global_batch_rows(num_devices)
    if rows == here or devices == num_devices:
        return ""
    return (
        f"{Kind.RUN.value}: sequences in an update {rows:g} -> {here}, as it has {num_devices} "
        f"devices instead of {devices}; per_device_batch_size={rows / num_devices:g} keeps them"
    )


def keep_earlier(folder: Path, text: str) -> Path | None:
    """Keep the last start's config.yml under the next free number, if this start's differs.

    Args:
        folder: folder of the run.
        text: this start's config.yml.

    Returns:
        Where it is kept, or None.

    Raises:
        OSError: it cannot be read or written.
    """
    path = folder / "config.yml"
    if not os.path.lexists(path) or (content := read_small(path)) == text.encode():
        return None
    kept = next_numbered(path)
    write_bytes(kept, content)
    return kept


def _listed(differing: dict[str, tuple[Any, Any]]) -> str:
    """Write changes as `key earlier -> now`, at most eight of them."""
    return brief_list(
        [f"{key} {shown(there)} -> {shown(here)}" for key, (there, here) in differing.items()]
    )
