"""Checkpoints with Orbax: written aside and committed whole, restored onto any mesh."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from moe_shard.config.keys import shown
from moe_shard.config.schema import Config
from moe_shard.errors import UserError
from moe_shard.training.step import TrainState

# Orbax logs every phase of a save as information, and some of it as warnings.
logging.getLogger("absl").setLevel(logging.ERROR)

_SHAPING_KEYS = (
    "base_emb_dim",
    "base_num_decoder_layers",
    "base_num_query_heads",
    "base_num_kv_heads",
    "head_dim",
    "base_mlp_dim",
    "base_moe_mlp_dim",
    "num_experts",
    "vocab_size",
    "logits_via_embedding",
    "use_qk_norm",
    "weight_dtype",
    "optimizer",
)
"""Keys that decide which arrays a state holds; a checkpoint fits no other values of them."""


class Checkpointer:
    """Saves and restores the state of one run.

    A checkpoint is named by the number of updates made. Nothing of the mesh is kept in it: each
    array is whole, and is read in the shards that the restoring mesh wants.

    Args:
        folder: `checkpoints/` of the run.
        config: how often, how many, and what shapes the state.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        train = config.train
        self._shaping = {
            key: value for key, value in config.as_flat_dict().items() if key in _SHAPING_KEYS
        }
        self._folder = folder
        self._manager = ocp.CheckpointManager(
            folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=(
                    None
                    if train.max_num_checkpoints_to_keep == -1
                    else train.max_num_checkpoints_to_keep
                ),
                enable_async_checkpointing=train.async_checkpointing,
                create=True,
            ),
        )

    def latest(self) -> int | None:
        """Updates made in the newest whole checkpoint, or None if there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState, *, updates: int) -> None:
        """Save, in the background where the configuration says so; a second time does nothing."""
        if updates == self.latest():
            return
        self._manager.save(
            updates,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state._asdict()),
                config=ocp.args.JsonSave(self._shaping),
            ),
        )

    def check_fits(self, updates: int) -> None:
        """Refuse a checkpoint that holds other arrays than this run's state.

        Raises:
            UserError: it is of another model or optimizer, or cannot be read.
        """
        saved = self._read(updates, config=ocp.args.JsonRestore()).config
        differing = [key for key in _SHAPING_KEYS if saved.get(key) != self._shaping.get(key)]
        if differing:
            there = ", ".join(f"{key}={shown(saved.get(key))}" for key in differing)
            here = ", ".join(f"{key}={shown(self._shaping.get(key))}" for key in differing)
            raise UserError(
                f"{self._folder} holds another model: {there} (this run has {here})\n"
                "fix: another run_name, or remove that folder to start anew"
            )

    def restore(self, updates: int, abstract_state: TrainState) -> TrainState:
        """Read a checkpoint, each device its own shards.

        Args:
            updates: which one.
            abstract_state: shapes, dtypes and shardings to restore to.

        Raises:
            UserError: it cannot be read.
        """
        wanted = ocp.args.StandardRestore(abstract_state._asdict())
        return TrainState(**self._read(updates, state=wanted).state)

    def _read(self, updates: int, **items: Any) -> Any:
        try:
            return self._manager.restore(updates, args=ocp.args.Composite(**items))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"cannot read the checkpoint {self._folder / str(updates)}: "
                f"{str(error).splitlines()[0][:160]}\n"
                "fix: remove that folder to continue from the checkpoint before it"
            ) from error

    def reached_preemption(self, updates: int) -> bool:
        """True on every process at the same step once the scheduler has announced a preemption."""
        return jax.process_count() > 1 and self._manager.reached_preemption(updates)

    def close(self) -> None:
        """Wait until everything is written."""
        self._manager.wait_until_finished()
        self._manager.close()
