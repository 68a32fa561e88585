"""Save and restore checkpoints with Orbax: complete when committed, restored onto any mesh."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from moe_shard.checkpoints.checksums import CUSTOM_METADATA, Damage
from moe_shard.checkpoints.convert import is_fused, other_layout, to_layout
from moe_shard.checkpoints.in_bucket import place_of
from moe_shard.checkpoints.optimizer_state import as_saved
from moe_shard.checkpoints.reading import reading
from moe_shard.checkpoints.retention import retention
from moe_shard.checkpoints.room import hide_late_callbacks, least_bytes, why_not_written
from moe_shard.checkpoints.together import FailedElsewhere, SavesTogether, of_process
from moe_shard.checkpoints.whole import find_whole, on_all_processes, on_first, said_by_all
from moe_shard.config.keys import shown
from moe_shard.config.schema import Config
from moe_shard.data.corpus import Say
from moe_shard.errors import Finding, UserError
from moe_shard.program.step import TrainState

_SHAPING_KEYS = (
    "base_emb_dim",
    "base_num_decoder_layers",
    "base_num_query_heads",
    "base_num_kv_heads",
    "head_dim",
    "base_mlp_dim",
    "base_moe_mlp_dim",
    "moe_latent_dim",
    "num_experts",
    "vocab_size",
    "logits_via_embedding",
    "use_qk_norm",
    "weight_dtype",
    "optimizer",
    *("attention_type", "q_lora_rank", "kv_lora_rank"),
    *("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    *("attention_bias", "attention_out_bias", "attention_sink", "qk_norm_type"),
    *("attention_pattern", "nope_layer_interval", "nope_layers"),
    *("first_num_dense_layers", "interleave_moe_layer_step", "dense_layers"),
    *("shared_experts", "shared_expert_mlp_dim", "shared_expert_gate"),
    *("mlp_bias", "logits_bias", "router_bias", "routed_bias", "normalization_type"),
)
"""Keys that determine which arrays a state holds; a checkpoint fits only equal values of them."""


class Checkpointer:
    """Save and restore the state of one run.

    Opening it verifies the newest checkpoint, and sets it aside if it is damaged (`find_whole`).

    A checkpoint is named by the number of updates made. It does not depend on the mesh: each array
    is whole, and is read in the shards that the restoring mesh needs. Nor does it matter whether
    the run that saved it had the experts' gate and up as one array.

    Attributes:
        to_keep: returns the updates of checkpoints that stay however old they are.
        when_saved: each is called, in order, when a checkpoint is complete, before or with the
            next save.

    Args:
        folder: the run's `checkpoints/`, in a folder or a bucket (`place_of`).
        config: states how often to save, how many to keep, and the shapes of the state.
        say: receives a line on each damaged checkpoint.

    Raises:
        UserError: none of the checkpoints is whole, or the folder cannot be written.
    """

    def __init__(self, folder: Path, config: Config, *, say: Say = lambda _: None) -> None:
        train = config.train
        flat = config.as_flat_dict()
        self._shaping = {key: flat[key] for key in _SHAPING_KEYS if key in flat}
        self._place = place_of(folder)
        self._folder = self._place.path
        found = find_whole(self._place, verify=train.verify_checkpoints, set_aside=True, say=say)
        kept = found.manifest if found else None
        self._saved_by = kept.run if kept else None
        self._run = self._saved_by or uuid.uuid4().hex
        self._size = kept.bytes if kept else None
        self._train, self._say = train, say
        self._in_flight: int | None = None
        self._failed: str | None = None
        self._said_tight = False
        self.to_keep: Callable[[], Collection[int | None]] = tuple
        self.when_saved: list[Callable[[], object]] = []
        self._together = SavesTogether()
        self._manager = self._open()
        hide_late_callbacks()

    def _open(self) -> ocp.CheckpointManager:
        several = jax.process_count() > 1
        try:
            return ocp.CheckpointManager(
                self._folder,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=retention(
                        self._train.max_num_checkpoints_to_keep,
                        self._train.checkpoint_keep_period,
                        lambda: self.to_keep(),
                    ),
                    # In the foreground, several processes wait for each other inside collectives,
                    # also for one that has failed.
                    enable_async_checkpointing=self._train.async_checkpointing or several,
                    async_options=ocp.AsyncOptions(barrier_sync_fn=self._together.wait)
                    if several
                    else None,
                    create=True,
                    temporary_path_class=self._place.committed(lambda: self._run),
                    lightweight_initialize=True,  # reads no metadata, which may be damaged
                ),
                # Without them the structure of a checkpoint cannot be read apart from its arrays.
                item_handlers={
                    "state": ocp.StandardCheckpointHandler(),
                    "config": ocp.JsonCheckpointHandler(),
                },
            )
        except OSError as error:
            raise UserError(
                f"cannot write checkpoints to {self._folder}: {error.strerror or error}\n"
                f"fix: {self._place.allow}"
            ) from error

    def latest(self) -> int | None:
        """Return the updates made in the newest complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    def first(self) -> int:
        """Return the updates made in what the run goes on from; 0: it starts."""
        return self.latest() or 0

    def lasting_name(self) -> str:
        """Return what names the run from now on, also when it has not saved yet.

        Checkpoints that are elsewhere are told by it from those of a run that was here before.
        """

        def kept() -> str:
            named = self._place.kept_text("run")
            name = self._saved_by or named or self._run
            if name != named:
                self._place.keep_text("run", name)
            return name

        self._run = on_first(kept)
        return self._run

    def complete(self) -> set[int]:
        """Return the updates of all complete checkpoints."""
        return {*self._manager.all_steps()} - {self._in_flight}

    def save(self, state: TrainState, *, updates: int) -> None:
        """Save, in the background if so configured; do nothing if it is saved already.

        Where it may not fit, the step waits for it: a run that goes on while it is written would
        hear late that it was not.

        A save that fails is said, now or by `poll`, and leaves the checkpoints before it as they
        are; the next is tried as if nothing had happened.
        """
        self.settle()
        if updates == self.latest():
            return
        if self._failed:  # its last writes may have ended later than it was given up
            self._remove_unfinished()
        self._needed = least_bytes(state, self._size)
        # Begun by all processes or by none, as they wait for each other.
        if hindered := said_by_all(self._place.hindrance(self._needed)):
            own = hindered.get(jax.process_index())
            first, why = next(iter(hindered.items()))
            self._give_up(updates, own or of_process(first, why), here=own is not None)
            return
        tight = self._train.async_checkpointing and self._place.is_tight(self._needed)
        if tight and not self._said_tight:
            self._said_tight = True
            room = self._place.room(self._needed)
            self._say(f"little room for checkpoints ({room}): steps wait for each to be written")
        self._together.begin()
        try:
            saves = self._manager.save(
                updates,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state._asdict()),
                    config=ocp.args.JsonSave(self._shaping),
                ),
                custom_metadata=dict(CUSTOM_METADATA),
            )
            if not saves:
                raise ValueError(f"Orbax declines it beside {self.latest()}")
        except Exception as error:  # tensorstore and Orbax raise bare ones for a full disk
            if jax.process_count() > 1:  # the others wait inside a collective, which nothing ends
                raise Finding(
                    f"the checkpoint after step {updates} could not be begun in {self._folder}: "
                    f"{why_not_written(error)}\nfix: make room, or allow writing; the same "
                    "command continues from the one before"
                ) from error
            self._give_up(updates, why_not_written(error))
            return
        self._in_flight = updates
        if self._train.async_checkpointing and not tight:
            self.poll()
        else:
            self.settle()

    def save_locally(self, state: TrainState, *, updates: int) -> None:
        """Save to each machine's own disk; nothing does where there are no such checkpoints."""

    def poll(self) -> None:
        """Say it if the save in the background has failed; cheap, for every step."""
        if self._in_flight is not None and not self._manager.is_saving_in_progress():
            self.settle()

    def settle(self) -> None:
        """Wait for the save in the background, and say it if it has failed."""
        updates, self._in_flight = self._in_flight, None
        if updates is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            why = why_not_written(error)
            self._together.tell(error, why)
            self._give_up(updates, why, here=not isinstance(error, FailedElsewhere))
        else:
            self._failed = None
            for call in self.when_saved:
                call()

    def _give_up(self, updates: int, why: str, *, here: bool = True) -> None:
        """Remove what was written of a checkpoint, say why, and get ready for the next.

        Args:
            updates: its number.
            why: a line.
            here: whether it was this process that could not write.
        """
        if jax.process_count() == 1 and self._place.closes_after_failure:
            with suppress(Exception):
                self._manager.close()
            self._remove_unfinished()
            self._manager = self._open()
        else:
            # The others may not know yet: nothing here may wait for them.
            with suppress(OSError):
                self._manager.reload()
        room = self._place.room(self._needed)
        self._failed = f"the checkpoint after step {updates} was not saved in {self._folder}: {why}"
        if not here:
            self._tell(f"{self._failed}; training goes on")
            return
        self._tell(
            f"{self._failed} ({room})\nfix: {self._place.fix}; training goes on, the checkpoints "
            "before it are whole, and the next is tried when it is due"
        )

    def _tell(self, text: str) -> None:
        """Say something that each process has to say: most lines are process 0's."""
        if jax.process_index() == 0:
            self._say(text)
        else:
            print(f"process {jax.process_index()}: {text}", file=sys.stderr, flush=True)

    def _remove_unfinished(self) -> None:
        if jax.process_index() == 0:
            self._place.remove_unfinished()

    def finish(self) -> None:
        """Wait until everything is written.

        Raises:
            Finding: the last checkpoint could not be saved.
        """
        self.settle()
        failed: str | None = None
        try:
            with on_all_processes():
                if self._failed:
                    raise Damage(self._failed)
        except Damage as damage:
            failed = str(damage)
        if failed:
            self._remove_unfinished()
            newest = self.latest()
            start = f"the checkpoint after step {newest}" if newest else "the start"
            raise Finding(
                f"{failed}\nfix: {self._place.fix}; the same command continues from {start}"
            )

    def check_fits(self, updates: int) -> None:
        """Refuse a checkpoint with other arrays than this run's state.

        Raises:
            UserError: it belongs to another model or optimizer, or cannot be read.
        """
        saved = self._read(updates, config=ocp.args.JsonRestore()).config
        keys = dict.fromkeys((*self._shaping, *saved))
        differing = [key for key in keys if saved.get(key) != self._shaping.get(key)]
        if differing:
            there = [f"{key}={shown(saved.get(key))}" for key in differing]
            here = ", ".join(f"{key}={shown(self._shaping.get(key))}" for key in differing)
            raise UserError(
                f"{self._folder} holds another model: {', '.join(there)} (this run has {here})\n"
                f"fix: {' '.join(there[:4])}, or another run_name for a run of its own"
            )

    def restore(
        self,
        updates: int,
        abstract_state: TrainState,
        *,
        say: Say = lambda _: None,
    ) -> TrainState:
        """Read a checkpoint, each device its own shards.

        If it has the experts' gate and up separate and the state has them as one, or the reverse,
        it is read as it is stored and converted, once.

        Args:
            updates: the number of updates that names the checkpoint.
            abstract_state: shapes, dtypes and shardings to restore to.
            say: receives a line on a conversion.

        Raises:
            UserError: it cannot be read.
        """
        fused = is_fused(abstract_state.params)
        # None: a model without experts, or a missing structure, which reading will report.
        converts = (self._is_fused(updates), fused) in ((False, True), (True, False))
        if converts and self._shaping["optimizer"] == "adafactor":
            raise UserError(
                f"{self._folder}: the second moments of adafactor are sums over the experts' gate "
                f"and up, saved with prefuse_moe_weights={shown(not fused)}\n"
                f"fix: prefuse_moe_weights={shown(not fused)}"
            )
        stored = other_layout(abstract_state) if converts else abstract_state
        found = self._structure(updates) or {}
        saved = as_saved(found.get("opt_state"), stored.opt_state, stored.step.sharding)
        wanted = ocp.args.StandardRestore(stored._asdict() | {"opt_state": saved.arrays})
        state = TrainState(**self._read(updates, state=wanted).state)
        for line in saved.lines:
            say(line)
        state = state._replace(opt_state=saved.back(state.opt_state))
        if not converts:
            return state
        converted = to_layout(state, abstract_state)
        how = "apart, are now one array" if fused else "as one array, are now apart"
        say(f"the experts' gate and up, saved {how} (prefuse_moe_weights={shown(fused)})")
        return converted

    def _is_fused(self, updates: int) -> bool | None:
        """Return whether a checkpoint has gate and up as one; only its structure is read."""
        return is_fused(self._structure(updates))

    def _structure(self, updates: int) -> Any:
        with reading(self._folder / str(updates)):
            return self._manager.metadata(updates).item_metadata.get("state")

    def _read(self, updates: int, **items: Any) -> Any:
        with reading(self._folder / str(updates)):
            return self._manager.restore(updates, args=ocp.args.Composite(**items))

    def close(self) -> None:
        """Wait until everything is written or has failed, and release what is held."""
        self.settle()
        self._manager.close()
        self._remove_unfinished()
