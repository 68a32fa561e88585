"""Import in separate processes: the memory that it needs, and two processes that share a mesh."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tests.autoep.checkpoints import BF16, write_file

ROOT = Path(__file__).parents[2]

PLAN = """
import json, sys
from pathlib import Path
import numpy as np
from moe_shard.autoep.headers import read_file
from moe_shard.autoep.tensor_plan import Layout, Piece, TensorPlan
from moe_shard.autoep.exporting import export_params
from moe_shard.autoep.importing import import_params
file, layers, experts, *rest = sys.argv[1:]
layers, experts = int(layers), int(experts)
headers = read_file(Path(file))
plan = TensorPlan(tuple(
    Piece(f"{l}.{e}", ("experts", "gate"), (l, e), Layout(order=(1, 0)))
    for l in range(layers) for e in range(experts)
))
"""

WATCH = """
import threading, time
import jax
jax.config.update("jax_num_cpu_devices", 4)

def anonymous():
    text = Path("/proc/self/status").read_text()
    return sum(int(line.split()[1]) for line in text.splitlines()
               if line.startswith(("RssAnon:", "RssShmem:"))) * 1024

def during(work):
    # All but what is mapped from files, which the system takes back when it needs it.
    before, peak, done = anonymous(), [0], threading.Event()
    def watch():
        while not done.wait(0.001):
            peak[0] = max(peak[0], anonymous())
    watcher = threading.Thread(target=watch)
    watcher.start()
    result = work()
    done.set()
    watcher.join()
    return result, peak[0] - before
"""

MEMORY = """
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

mesh = Mesh(jax.devices(), "x")
h, m = headers["0.0"].shape
place = NamedSharding(mesh, PartitionSpec(None, "x"))
spec = jax.ShapeDtypeStruct((layers, experts, m, h), np.dtype(rest[0]), sharding=place)
params, imported = during(lambda: import_params(plan, headers, {"experts": {"gate": spec}}))
size = sum(a.nbytes for a in jax.tree.leaves(params))
with ocp.CheckpointManager(
    rest[1], item_handlers={"state": ocp.PyTreeCheckpointHandler()}
) as manager:
    state = ocp.args.PyTreeSave({"params": params})
    manager.save(0, args=ocp.args.Composite(state=state))
print(json.dumps({"size": size, "imported": imported}))
"""

STORED = """
from moe_shard.checkpoints.stored import open_stored
# What is loaded once is not counted.
next(open_stored(Path(rest[0])).blocks())
before = Path(file).read_bytes()
_, exported = during(lambda: export_params(plan, headers, open_stored(Path(rest[0])).blocks()))
assert Path(file).read_bytes() == before
print(json.dumps({"exported": exported}))
"""

SHARDS = """
import jax
port, number = rest
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, int(number))
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from moe_shard.autoep import importing, tensors

seen = set()
original = importing.view
importing.view = lambda header: seen.add((header.begin, header.end)) or original(header)
names = {(h.begin, h.end): name for name, h in headers.items()}
h, m = headers["0.0"].shape
place = NamedSharding(Mesh(jax.devices(), "x"), PartitionSpec(None, "x"))
spec = jax.ShapeDtypeStruct((layers, experts, m, h), np.float32, sharding=place)
array = import_params(plan, headers, {"experts": {"gate": spec}})["experts"]["gate"]
shards = {str(shard.index[1].start or 0): np.asarray(shard.data).tolist()
          for shard in array.addressable_shards}
whole = jax.jit(lambda a: a.sum(), out_shardings=NamedSharding(place.mesh, PartitionSpec()))(array)
print(json.dumps({"shards": shards, "sum": float(whole),
                  "read": sorted(names[place] for place in seen)}))
"""


def start(program: str, *arguments: object) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.Popen(
        [sys.executable, "-c", PLAN + program, *map(str, arguments)],
        env={**environment, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> dict[str, Any]:
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, err
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def test_the_host_holds_no_more_than_a_few_tensors_beside_the_model(tmp_path: Path) -> None:
    """Import to float32, whose shards are the largest: a tensor is 8 MB, a shard 128 MB."""
    layers, experts = 16, 4
    tensor = np.ones((1024, 2048), BF16)
    names = [f"{layer}.{expert}" for layer in range(layers) for expert in range(experts)]
    write_file(tmp_path / "model.safetensors", dict.fromkeys(names, tensor))
    arguments = (tmp_path / "model.safetensors", layers, experts)
    found = end(start(WATCH + MEMORY, *arguments, "float32", tmp_path / "run"))
    assert found["size"] == layers * experts * tensor.size * 4
    assert found["imported"] <= found["size"] + 12 * 8 * 2**20, found
    # This export reads a checkpoint, whose chunks are shards of 128 MB.
    found = end(start(WATCH + STORED, *arguments, tmp_path / "run"))
    assert found["exported"] <= 2.5 * 128 * 2**20, found


def test_two_processes_read_each_their_own_experts(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    layers, experts = 2, 4
    tensors = {
        f"{layer}.{expert}": rng.integers(0, 99, (3, 2)).astype(np.float32)
        for layer in range(layers)
        for expert in range(experts)
    }
    write_file(tmp_path / "model.safetensors", tensors)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    arguments = (tmp_path / "model.safetensors", layers, experts, port)
    both = [start(SHARDS, *arguments, number) for number in range(2)]
    for number, found in enumerate([end(process) for process in both]):
        own = [2 * number, 2 * number + 1]
        assert found["read"] == sorted(f"{layer}.{e}" for layer in range(layers) for e in own)
        assert found["shards"] == {
            str(e): [[tensors[f"{layer}.{e}"].T.tolist()] for layer in range(layers)] for e in own
        }
        assert found["sum"] == sum(float(tensor.sum()) for tensor in tensors.values())
