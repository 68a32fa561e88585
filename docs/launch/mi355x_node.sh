#!/bin/bash
# One node of eight MI355X: one process has them all, and is started again after code 75.
#   pip install "jax[rocm7]" and this package first
set -euo pipefail

exec moe-shard supervise -- train mixtral-8x7b \
  run_name=node base_output_directory="${OUTPUTS:-outputs}" steps=100000
