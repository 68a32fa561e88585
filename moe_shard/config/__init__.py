"""Configuration: `configs/base.yml`, then a model YAML, then `key=value`."""

from moe_shard.config.mesh import MESH_AXES, MeshConfig
from moe_shard.config.schema import (
    Config,
    DataConfig,
    ModelConfig,
    MoEConfig,
    RunConfig,
    TrainConfig,
)

__all__ = [
    "MESH_AXES",
    "Config",
    "DataConfig",
    "MeshConfig",
    "ModelConfig",
    "MoEConfig",
    "RunConfig",
    "TrainConfig",
]
