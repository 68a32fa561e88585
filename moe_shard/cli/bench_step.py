"""Time the whole training step: variants of this package, and others on the same work.

    moe-shard bench --step [MODEL] [key=value ...] [--tokens 512 1024] [--rounds 7] [--json]

MODEL is mixtral-tiny with two layers, M256 and H512 on CPU, and olmoe-1b-7b with eight layers on an
accelerator, unless another is named. MaxText and transformers on torch are measured in the same run
where they are installed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

from rich.table import Table

from moe_shard.config import load_config
from moe_shard.errors import EXIT_DONE, CommandParser, UserError
from moe_shard.quiet import hide_accelerator_warnings
from moe_shard.terminal import Console
from moe_shard.units import human_bytes

if TYPE_CHECKING:
    from moe_shard.config import Config
    from moe_shard.runtime.step_bench import StepMeasurement

_SMALL = (
    *("base_emb_dim=256", "base_mlp_dim=512", "base_moe_mlp_dim=512", "base_num_decoder_layers=2"),
    *("base_num_query_heads=4", "base_num_kv_heads=4", "head_dim=64", "vocab_size=512"),
    *("per_device_batch_size=1", "capacity_factor=1.0"),
)
_LARGE = ("base_num_decoder_layers=8", "per_device_batch_size=4", "capacity_factor=1.25")
PEERS = ("maxtext", "transformers")


def time_steps(argv: Sequence[str], prog: str = "moe-shard bench --step") -> int:
    """Time the steps and print a table or one JSON object."""
    parser = CommandParser(prog=prog, description="Time the whole training step, in turns.")
    parser.add_argument("model", metavar="MODEL", nargs="?", help="a model's name or file")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="overrides the model's")
    parser.add_argument("--tokens", type=int, nargs="+", metavar="S", help="of a sequence")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each")
    parser.add_argument(
        "--variants", nargs="+", metavar="NAME", help="of this package (default: all)"
    )
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar='"NAME: key=value ..."',
        help="one more way of this package",
    )
    parser.add_argument(
        "--against", choices=PEERS, nargs="*", default=list(PEERS), help="other packages"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_intermixed_args(argv)
    if args.rounds < 1 or min(args.tokens or [1]) < 1:
        parser.error("--rounds and --tokens must be at least 1")
    if args.model and "=" in args.model:
        args.model, args.overrides = None, [args.model, *args.overrides]
    own = [_named(each) for each in args.variant]
    # Only now: --help and bad usage are answered before jax has been loaded.
    with hide_accelerator_warnings():
        import jax

        from moe_shard.runtime.devices import start_devices

        where = start_devices(num_simulated=8)
    # A program that was kept has no compile time, and MaxText keeps its own.
    jax.config.update("jax_enable_compilation_cache", False)
    on_cpu, devices = jax.default_backend() == "cpu", jax.device_count()
    model, sizes = ("mixtral-tiny", [*_SMALL]) if on_cpu else ("olmoe-1b-7b", [*_LARGE])
    if args.model:
        model, sizes = args.model, []
    mesh = [f"ici_expert_parallelism={devices}", "ici_fsdp_parallelism=1"]
    keys = [*sizes, *mesh, *args.overrides]
    measurements: list[StepMeasurement] = []
    notes: list[str] = []
    with Console(stderr=True).status("") as status:
        for tokens in args.tokens or ([512, 1024] if on_cpu else [2048]):
            config = [*keys, f"max_target_length={tokens}"]
            found, notes = _measure(
                model, config, args.variants, own, args.against, args.rounds, status.update
            )
            measurements += found
    if args.json:
        content = {
            "hardware": where,
            "num_devices": devices,
            "jax": version("jax"),
            "model": model,
            "keys": keys,
            "notes": notes,
            "steps": [each.to_json() for each in measurements],
        }
        print(json.dumps(content, indent=1))
    else:
        _print(where, f"{model} {' '.join(keys)}", measurements, notes)
    return EXIT_DONE


def _named(given: str) -> tuple[str, list[str]]:
    name, colon, keys = given.partition(":")
    if not colon or not keys.split():
        raise UserError(f'--variant {given!r} is not "NAME: key=value ..."')
    return name.strip(), keys.split()


def _measure(
    model: str,
    keys: Sequence[str],
    wanted: Sequence[str] | None,
    more: Sequence[tuple[str, list[str]]],
    against: Sequence[str],
    rounds: int,
    progress: object,
) -> tuple[list[StepMeasurement], list[str]]:
    from moe_shard.runtime.peers import maxtext_step, transformers_step
    from moe_shard.runtime.step_bench import measure_steps, prepare_own, step_variants

    assert callable(progress)
    config: Config = load_config(model, list(keys))
    variants = step_variants(config)
    if strangers := set(wanted or ()) - variants.keys():
        raise UserError(
            f"no variant {', '.join(sorted(strangers))}\nfix: {', '.join(variants)}; or --variant"
        )
    variants = {name: variants[name] for name in wanted or variants} | dict(more)
    contenders, notes = [], []
    for name, overrides in variants.items():
        progress(f"compiling {name}")
        contenders.append(prepare_own(name, load_config(model, [*keys, *overrides])))
    for peer, prepare in (("maxtext", maxtext_step), ("transformers", transformers_step)):
        if peer in against:
            progress(f"preparing {peer}")
            made = prepare(config)
            if isinstance(made, str):
                notes.append(made)
            else:
                contenders.append(made)
    return measure_steps(config, contenders, rounds=rounds, progress=progress), notes


def _print(
    where: str, model: str, measurements: Sequence[StepMeasurement], notes: Sequence[str]
) -> None:
    table = Table(title=f"whole training steps, jax {version('jax')}")
    peers = list(dict.fromkeys(peer for each in measurements for peer in each.ratio_to))
    table.add_column("S")
    table.add_column("step")
    for name in ("time", *(f"x {peer}" for peer in peers), "ms", "wire x least", "FLOP x ideal"):
        table.add_column(name, justify="right")
    for name in ("temp MB", "compile s", "tokens/s", "MFU"):
        table.add_column(name, justify="right")
    table.add_column("")
    for before, each in zip([None, *measurements], measurements, strict=False):
        if before and before.tokens != each.tokens:
            table.add_section()
        table.add_row(
            str(each.tokens),
            each.name,
            f"{each.ratio:.2f}",
            *(f"{each.ratio_to[peer]:.2f}" if peer in each.ratio_to else "" for peer in peers),
            f"{1e3 * each.seconds:,.1f}",
            _number(each.wire_over_bound, ".2f"),
            _number(each.flops_over_ideal, ".2f"),
            "" if each.temp_bytes is None else human_bytes(each.temp_bytes),
            _number(each.compile_seconds, ".1f"),
            f"{each.tokens_per_second:,.0f}",
            "" if each.mfu is None else f"{100 * each.mfu:.1f}%",
            each.remark,
        )
    console = Console(width=None if sys.stdout.isatty() else 180)
    console.print(where)
    console.print(model, markup=False)
    console.print(table)
    for note in notes:
        console.print(f"note: {note}", markup=False)
    console.print(
        "time: relative to the first line of the same S, median of interleaved rounds\n"
        "wire, temp, tokens/s: per device; FLOP of all products, relative to what tokens need"
    )


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
