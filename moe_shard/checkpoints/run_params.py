"""Read only the parameters of a run's checkpoint, onto any mesh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from moe_shard.checkpoints.convert import is_fused, other_layout, to_layout
from moe_shard.checkpoints.reading import reading
from moe_shard.checkpoints.whole import find_whole
from moe_shard.data.corpus import Say
from moe_shard.errors import UserError
from moe_shard.models.params import Params


def restore_params(
    folder: Path,
    abstract_params: Params,
    *,
    updates: int | None = None,
    say: Say = lambda _: None,
) -> Params:
    """Read only the parameters of a run, each device its own shards.

    Args:
        folder: `checkpoints/` of the run; nothing is written there.
        abstract_params: shapes, dtypes and shardings to restore to. The dtype may differ from the
            run's, and the experts' gate and up may be one array where the run had two.
        updates: the number of updates that names the checkpoint; None: the newest.
        say: receives a line on which one was read.

    Raises:
        UserError: there is none, it belongs to another model, or it cannot be read.
    """
    whole = find_whole(folder, updates=updates, say=say)
    if whole is None:
        what = "no whole checkpoint" if updates is None else f"no checkpoint {updates}"
        raise UserError(f"{folder} holds {what}\nfix: the folder of a run that has saved one")
    updates = whole.updates
    manager = ocp.CheckpointManager(
        folder,
        options=ocp.CheckpointManagerOptions(read_only=True, lightweight_initialize=True),
        item_handlers={"state": ocp.PyTreeCheckpointHandler()},
    )
    with manager:
        with reading(folder / str(updates)):
            found = manager.metadata(updates).item_metadata["state"]["params"]
        converts = (is_fused(found), is_fused(abstract_params)) in ((False, True), (True, False))
        wanted = {"params": other_layout(abstract_params) if converts else abstract_params}
        _require_same_shapes(folder / str(updates), found, wanted["params"])
        how = ocp.args.PyTreeRestore(
            item=wanted,
            restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
            partial_restore=True,
        )
        with reading(folder / str(updates)):
            params = manager.restore(updates, args=ocp.args.Composite(state=how)).state["params"]
    say(f"after step {updates} of {folder.parent}")
    return to_layout(params, abstract_params) if converts else params


def _require_same_shapes(checkpoint: Path, found: Any, wanted: Params) -> None:
    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        named = {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}
        return {name: tuple(leaf.shape) for name, leaf in named.items()}

    there, here = shapes(found), shapes(wanted)
    for name in sorted({*there, *here}):
        if there.get(name) != here.get(name):
            raise UserError(
                f"{checkpoint} holds another model: {name} has shape {there.get(name)} there and "
                f"{here.get(name)} here\nfix: the config.yml of its run, without such overrides"
            )
