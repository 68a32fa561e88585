"""Load a run's configuration: `configs/base.yml`, then a model YAML, then `key=value`."""

from moe_shard.config.checks import check_against_mesh, expert_axes, expert_parallelism
from moe_shard.config.load import configs_dir, list_models, load_config
from moe_shard.config.mesh_config import MESH_AXES, MeshConfig
from moe_shard.config.model_config import ModelConfig
from moe_shard.config.moe_config import MoEConfig
from moe_shard.config.schema import Config, DataConfig, RunConfig, TrainConfig

__all__ = [
    "MESH_AXES",
    "Config",
    "DataConfig",
    "MeshConfig",
    "MoEConfig",
    "ModelConfig",
    "RunConfig",
    "TrainConfig",
    "check_against_mesh",
    "configs_dir",
    "expert_axes",
    "expert_parallelism",
    "list_models",
    "load_config",
]
