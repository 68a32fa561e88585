"""Configure checkpoints on each machine's own disk, beside those of the run's folder."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from moe_shard.config.keys import Key, check_leaves
from moe_shard.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalConfig:
    """Describe whether, where and how often checkpoints are saved to each machine's own disk.

    Attributes:
        enable_emergency_checkpoint: whether they are saved by Orbax's emergency manager: replicas
            of the run bring each other back.
        enable_multi_tier_checkpointing: whether they are saved for GKE's replicator service, which
            copies them to other machines and to a bucket.
        local_checkpoint_directory: folder on that disk, or RAM disk.
        local_checkpoint_period: updates between two checkpoints there.
        multi_tier_checkpointing_backup_interval_minutes: minutes between copies to the bucket; 0:
            they go by updates.
        multi_tier_checkpointing_backup_interval_steps: updates between copies to the bucket; 0:
            they go by the clock.
        mtc_data_parallelism: groups of processes that hold the same, from which the service brings
            back a part that is lost; 0: as many as the mesh has.

    Raises:
        UserError: a value out of range, or keys that go together and do not.
    """

    enable_emergency_checkpoint: Annotated[bool, Key()] = False
    enable_multi_tier_checkpointing: Annotated[bool, Key()] = False
    local_checkpoint_directory: Annotated[str, Key()] = ""
    local_checkpoint_period: Annotated[int, Key(least=0)] = 0
    multi_tier_checkpointing_backup_interval_minutes: Annotated[int, Key(least=0)] = 0
    multi_tier_checkpointing_backup_interval_steps: Annotated[int, Key(least=0)] = 0
    mtc_data_parallelism: Annotated[int, Key(least=0)] = 0

    def __post_init__(self) -> None:
        check_leaves(self)
        if self.enable_emergency_checkpoint and self.enable_multi_tier_checkpointing:
            raise UserError(
                "enable_emergency_checkpoint=true and enable_multi_tier_checkpointing=true are two "
                "ways to save to the same folder\n"
                "fix: the second with GKE's replicator service, the first without it"
            )
        folder, period = self.local_checkpoint_directory, self.local_checkpoint_period
        if not self.key:
            if folder or period:
                raise UserError(
                    "local_checkpoint_directory and local_checkpoint_period do nothing by "
                    "themselves\nfix: enable_emergency_checkpoint=true, or neither of them"
                )
        elif not folder or "://" in folder or period == 0:
            raise UserError(
                f"{self.key}=true needs a folder on each machine, and how often\n"
                "fix: local_checkpoint_directory=FOLDER local_checkpoint_period=UPDATES"
            )
        self._check_service()

    def _check_service(self) -> None:
        """Refuse keys of the replicator service without it, and it without an interval.

        Raises:
            UserError: they do not go together.
        """
        minutes = self.multi_tier_checkpointing_backup_interval_minutes
        steps = self.multi_tier_checkpointing_backup_interval_steps
        if not self.enable_multi_tier_checkpointing:
            given = {
                "mtc_data_parallelism": self.mtc_data_parallelism,
                "multi_tier_checkpointing_backup_interval_minutes": minutes,
                "multi_tier_checkpointing_backup_interval_steps": steps,
            }
            if names := [key for key, value in given.items() if value]:
                raise UserError(
                    f"{' and '.join(names)}: of GKE's replicator service, which is not asked for\n"
                    "fix: enable_multi_tier_checkpointing=true, or none of them"
                )
        elif bool(minutes) == bool(steps):
            raise UserError(
                "enable_multi_tier_checkpointing=true needs one interval of copies to the bucket, "
                f"and has {'two' if minutes else 'none'}\n"
                "fix: multi_tier_checkpointing_backup_interval_minutes=30 alone"
            )
        elif 0 < steps < (period := self.local_checkpoint_period):
            raise UserError(
                f"multi_tier_checkpointing_backup_interval_steps={steps} copies more often than "
                f"local_checkpoint_period={period} saves\n"
                f"fix: multi_tier_checkpointing_backup_interval_steps={period}"
            )

    @property
    def key(self) -> str:
        """Return the key that asks for local checkpoints; empty if none does."""
        for key in ("enable_emergency_checkpoint", "enable_multi_tier_checkpointing"):
            if getattr(self, key):
                return key
        return ""

    def due(self, updates: int) -> bool:
        """Return whether a checkpoint is due after a number of updates."""
        return bool(self.key) and updates % self.local_checkpoint_period == 0
