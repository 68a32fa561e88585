"""Measure tiles for the card that is there, for `moe-shard bench --tune`."""

from __future__ import annotations

import argparse
import json
import re
import sys

from rich.table import Table

from moe_shard.config import load_config
from moe_shard.errors import EXIT_DONE, UserError
from moe_shard.quiet import hide_accelerator_warnings
from moe_shard.terminal import Console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `--tune`."""
    parser.add_argument(
        "--tune",
        nargs="*",
        metavar="MODEL|GxNxAxP",
        help="measure the tiles of the grouped products on this card at the shapes of these models "
        "(or of G groups, N rows, A to P elements; by default those of three), and write the table "
        "that runs on this kind of card use from then on",
    )
    parser.add_argument(
        "--seconds", type=float, default=150, help="of --tune: begin no product after this time"
    )


def tune_tiles(args: argparse.Namespace) -> int:
    """Measure, write the user's table, and print what was found.

    Raises:
        UserError: a shape or model is not one, or there is no card.
    """
    with hide_accelerator_warnings():
        import jax

        from moe_shard.moe.grouped.tiles import add_tiles, user_tiles
        from moe_shard.runtime.devices import start_devices
        from moe_shard.runtime.tune import SHAPES, tune

        where = start_devices(num_simulated=1)
    device = jax.devices()[0]
    platform = str(device.platform)
    if platform == "gpu":
        platform = "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"
    if platform == "cpu" and not args.tune:
        raise UserError(
            "--tune: there is no card here, and an interpreter would take days for real shapes\n"
            "fix: on a GPU; or --tune 2x64x32x48 to try the command"
        )
    shapes = [_shape(each) for each in args.tune] or list(SHAPES.values())
    console = Console(stderr=True)
    with console.status("") as status:
        found = tune(
            device,
            platform,
            shapes,
            seconds=args.seconds,
            rounds=min(args.rounds, 5),
            progress=status.update,
        )
    path = user_tiles(device.device_kind)
    add_tiles(path, [each.entry for each in found])
    missing = len(shapes) * 4 - len(found)
    if args.json:
        lines = [each.to_json() for each in found]
        print(
            json.dumps(
                {"hardware": where, "table": str(path), "tiles": lines, "not_measured": missing},
                indent=1,
            )
        )
        return EXIT_DONE
    table = Table(title="best tiles, in bfloat16")
    for name in ("groups x rows x in x out", "product", "tile", "depth", "warps", "stages"):
        table.add_column(name)
    for name in ("of the card's own product", "time, x the former tile's", "measured", "failed"):
        table.add_column(name, justify="right")
    for each in found:
        entry, tile = each.entry, each.entry.tile
        assert entry.shape is not None
        assert entry.share is not None
        table.add_row(
            "x".join(map(str, entry.shape)),
            entry.product if entry.fuse else f"{entry.product} (two products are faster)",
            str(tile),
            *map(str, (tile.depth, tile.warps, tile.stages)),
            f"{100 * entry.share:.0f}%",
            f"{each.seconds / each.before:.2f}",
            str(each.candidates),
            str(each.failed),
        )
    printed = Console(width=None if sys.stdout.isatty() else 160)
    printed.print(where)
    printed.print(table)
    if missing:
        printed.print(f"{missing} products were not measured: --seconds={args.seconds:g} were over")
    if found:
        printed.print(f"written to {path}; runs on {device.device_kind} use it from now on")
    return EXIT_DONE


def _shape(text: str) -> tuple[int, int, int, int]:
    """Return a shape that was given, or that of a model's experts on one device.

    Raises:
        UserError: neither a shape nor a model with experts.
    """
    if re.fullmatch(r"\d+(x\d+){3}", text):
        groups, rows, into, out = map(int, text.split("x"))
        if min(groups, rows, into, out) < 1 or groups < 2:
            raise UserError(f"--tune {text}: at least 2 groups and no size of 0")
        return groups, rows, into, out
    config = load_config(text)
    moe = config.model.moe
    if moe is None:
        raise UserError(
            f"--tune {text}: the model has no experts\nfix: a model that has, or GxNxAxP"
        )
    tokens = int(config.train.per_device_batch_size * config.train.max_target_length)
    into = moe.expert_dim(config.model.emb_dim)
    return moe.num_experts, tokens * moe.num_experts_per_tok, into, moe.moe_mlp_dim
