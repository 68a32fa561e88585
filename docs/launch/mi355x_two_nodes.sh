#!/bin/bash
# Two nodes of eight MI355X: one process each, by mpirun.
#   NODES=node0,node1 docs/launch/mi355x_two_nodes.sh
#
# The first node has process 0, at which the other looks for it. Without MPI, run what follows mpirun
# on each node, with JAX_PROCESS_ID=0 and 1, JAX_NUM_PROCESSES=2 and the same address.
set -euo pipefail
: "${NODES:?two host names with a comma between}"

exec mpirun --host "${NODES%%,*}:1,${NODES##*,}:1" -np 2 --map-by node \
  -x JAX_COORDINATOR_ADDRESS="${NODES%%,*}:${PORT:-1234}" -x PATH \
  moe-shard supervise -- train mixtral-8x7b \
  run_name=two-nodes base_output_directory="${OUTPUTS:?a folder that both nodes see}" \
  steps=100000 ici_expert_parallelism=8 dcn_data_parallelism=2
