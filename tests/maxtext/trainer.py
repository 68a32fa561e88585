"""Define small runs of MaxText's own commands, with facts of their steps read by hand.

The steps were read in the text of jax 0.12.0.1 and libtpu 0.0.50 (`constraints-maxtext.txt`): the
operands of every collective over the expert axis were followed to the parameter or to the tokens
they come from.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

LAYERS = 2

SMALL = (
    "model_name=mixtral-8x7b override_model_config=true vocab_size=512 head_dim=16 num_experts=8 "
    f"base_num_decoder_layers={LAYERS} base_num_query_heads=4 base_num_kv_heads=4 "
    "per_device_batch_size=1 dataset_type=synthetic attention=dot_product log_config=false "
    "enable_checkpointing=false enable_goodput_recording=false monitor_goodput=false "
    "skip_jax_distributed_system=true"
).split()

DENSE = [
    "sparse_matmul=false",
    "capacity_factor=1.0",
    "max_target_length=64",
    "base_emb_dim=64",
    *("base_mlp_dim=128", "base_moe_mlp_dim=128"),
]
SPARSE = [
    "max_target_length=128",
    "base_emb_dim=256",
    *("base_mlp_dim=256", "base_moe_mlp_dim=256"),
]
"""MaxText's default path, of kernels whose tiles these sizes fill."""

MESHES = {
    "expert8": ["ici_fsdp_parallelism=1", "ici_expert_parallelism=8"],
    "fsdp2-expert4": ["ici_fsdp_parallelism=2", "ici_expert_parallelism=4"],
}
EXPERT_AXIS = {"expert8": 8, "fsdp2-expert4": 4}
FLAG = "moe_dispatch_no_expert_sharding=true"

TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
"""What a TPU's compiler has to be told on a machine without one."""


class Case(NamedTuple):
    """Describe one step.

    Attributes:
        where: "cpu", where MaxText trains, or "v5e", for which it compiles.
        mesh: one of `MESHES`.
        keys: key=value pairs in addition to `SMALL`.
        verdict: the right verdict.
        exchanges: how often a layer sends tokens to experts or back: forward, backward.
        exchanged_by: the kind of collective that sends them.
        gathered: how often a layer gathers each expert weight over the expert axis.
    """

    where: str
    mesh: str
    keys: list[str]
    verdict: str
    exchanges: tuple[int, int] = (0, 0)
    exchanged_by: str = "all-to-all"
    gathered: Mapping[str, int] = MappingProxyType({})


# Forward, and again where the backward pass recomputes the layer.
_ALL_WEIGHTS = {"wi_0": 2, "wi_1": 2, "wo": 2}
# To the experts and back; then both again, and the gradients of both.
_EXCHANGES = (2, 4)

_GATHERED: dict[str, Any] = {"verdict": "weight-gathered", "gathered": _ALL_WEIGHTS}
_SENT: dict[str, Any] = {"verdict": "expert-parallel", "exchanges": _EXCHANGES}
CASES = {
    f"{where}-dense-{flag}-{mesh}": Case(
        where, mesh, [*DENSE, *([FLAG] if flag == "on" else [])], **known
    )
    for where in ("cpu", "v5e")
    for flag, mesh, known in [
        ("off", "expert8", _GATHERED),
        ("off", "fsdp2-expert4", _GATHERED),
        ("on", "expert8", _SENT),
        # MaxText shards the down projection's result by sequences with `expert` among the axes,
        # so that the experts' activations return to the sequences, and `wo` is gathered there.
        ("on", "fsdp2-expert4", _SENT | {"verdict": "mixed", "gathered": {"wo": 2}}),
    ]
}
CASES["cpu-dense-on-fsdp2-expert4-unscanned"] = CASES["cpu-dense-on-fsdp2-expert4"]._replace(
    keys=[*DENSE, FLAG, "scan_layers=false"]
)
for _mesh in MESHES:
    # The flag has no effect here, as MaxText documents: it is on in one of the two.
    CASES[f"v5e-sparse-{_mesh}"] = Case(
        "v5e",
        _mesh,
        SPARSE if _mesh == "expert8" else [*SPARSE, FLAG],
        "expert-parallel",
        _EXCHANGES,
        "ragged-all-to-all",
    )


def command(case: Case, folder: Path) -> list[str]:
    """Return MaxText's command for a case."""
    keys = [*SMALL, *MESHES[case.mesh], *case.keys, "run_name=run"]
    if case.where == "cpu":
        module, own = "train", ["hardware=cpu", "steps=1"]
    else:
        module, own = "train_compile", ["compile_topology=v5e-8", "compile_topology_num_slices=1"]
    keys += [*own, f"base_output_directory={folder}"]
    return [sys.executable, "-m", f"maxtext.trainers.pre_train.{module}", base_file(), *keys]


def environment(flags: str) -> dict[str, str]:
    """Return the environment of MaxText on a machine with only CPUs."""
    root = str(Path(__file__).parents[2])
    inherited = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    maxtext = {"DECOUPLE_GCLOUD": "TRUE", "JAX_PLATFORMS": "cpu", "PYTHONPATH": root}
    return {**inherited, **TPU, **maxtext, "XLA_FLAGS": flags}


def package() -> Path:
    """Return the folder of the installed MaxText."""
    found = find_spec("maxtext")
    assert found is not None, "MaxText is not installed: make test-maxtext"
    assert found.origin is not None
    return Path(found.origin).parent


def base_file() -> str:
    """Return the path of MaxText's base.yml."""
    return str(package() / "configs" / "base.yml")
