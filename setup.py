"""List the packages of a distribution; everything else about it stands in pyproject.toml.

`configs/` is at the top of a checkout, where people look for it, and installed inside the package
as `moe_shard/configs`, where `moe_shard.config.load.configs_dir` finds it. pyproject.toml can
either find packages or map one to another folder, not both.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["moe_shard", "moe_shard.*"]), "moe_shard.configs"],
    package_dir={"moe_shard.configs": "configs"},
)
