"""Read the parameters that a run begins with, and add adapters where it trains those."""

from __future__ import annotations

from rich.console import Console

from moe_shard.checkpoints.adapters import first_adapters, split_adapters
from moe_shard.checkpoints.imported import load_params
from moe_shard.config.schema import Config
from moe_shard.models.params import AbstractModel, Params
from moe_shard.program.norms import require_finite


def first_params(config: Config, model: AbstractModel, console: Console) -> Params:
    """Read what `load_parameters_path` names.

    Args:
        config: configuration of the run.
        model: the model, with adapters if it has any.
        console: shows the progress, and what was read.

    Raises:
        UserError: it cannot be read, is of another model, or has weights that are not finite.
    """
    run, lora = config.run, config.model.lora.enable_lora
    specs = split_adapters(model).rest(model.specs) if lora else model.specs
    params = load_params(
        run.load_parameters_path,
        specs,
        model=config.model,
        family=run.hf_family,
        outside=run.weights_outside_directory,
        console=console,
    )
    require_finite(params, specs, run.load_parameters_path)
    if not lora:
        return params

    def say(line: str) -> None:
        console.print(line, markup=False)

    return first_adapters(config, model, params, say=say)
