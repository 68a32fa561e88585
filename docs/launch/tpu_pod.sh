#!/bin/bash
# A TPU pod: the same command on every host; jax finds them by the TPU's metadata.
#   TPU=my-v5e-16 ZONE=us-east5-b docs/launch/tpu_pod.sh
#
# The hosts share no disk: checkpoints go to a bucket, put yours for my-bucket (its service account needs
# to read and write it; pip install "moe_shard[gcs]" on every host).
# Each host starts its process again after code 75 (a preempted host, a process that is gone), as long
# as the run moves on; the processes wait for each other at every start, here for ten minutes: a host that
# is replaced has to boot.
set -euo pipefail
: "${TPU:?the name of the TPU}" "${ZONE:?its zone}"

gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command='
  moe-shard supervise -- train mixtral-8x7b \
    run_name=pod base_output_directory=gs://my-bucket/outputs steps=100000 \
    jax_distributed_initialization_timeout=600
'
