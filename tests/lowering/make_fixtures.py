"""Regenerate the HLO texts in fixtures/: small real programs, compiled here, nothing run.

    python tests/lowering/make_fixtures.py cpu_moe cpu_gathered cpu_scan cpu_three_axes cpu_none
    python tests/lowering/make_fixtures.py before_optimization
    python3.12 tests/lowering/make_fixtures.py cpu_moe_jax012       (jax 0.12.0.1)
    python tests/lowering/make_fixtures.py tpu_moe tpu_gathered tpu_ring tpu_kernel
                                                        (pip install "jax[tpu]==0.10.2")
    python tests/lowering/make_fixtures.py gpu_moe                  (jax-cuda12-pjrt and -plugin)

TPU and GPU are compiled for without having them. To keep the files small, these are cut out of all
but tpu_ring, tpu_kernel and before_optimization: metadata that no test reads, backend_config
outside ENTRY or a loop, and, for TPU and GPU, the bodies of fused computations that hold no
collective and no loop counter (one opaque line stands for them). File names become program.py, and
the code of a kernel, which holds them too, is left out. The counts in fixtures_hand_counted.py were
taken by eye and grep from these files.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
os.environ["TPU_ACCELERATOR_TYPE"] = "v6e-8"
os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

FOLDER = Path(__file__).parent / "fixtures"
H100 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } device_description_str: "H100"
"""


def devices(target: str) -> list[Any]:
    if target == "cpu":
        return list(jax.devices())
    if target == "gpu":
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name="any", topology="1x1x8", target_config=H100
        )
    else:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=target)
    return list(topology.devices)


class Program:
    """A mesh and the two things the programs below do with it."""

    def __init__(self, target: str, **axes: int) -> None:
        grid = np.array(devices(target)).reshape(tuple(axes.values()))
        self.mesh = Mesh(grid, tuple(axes))

    def pin(self, x: Any, *spec: Any) -> Any:
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, P(*spec)))

    def array(self, shape: tuple[int, ...], *spec: Any, dtype: Any = jnp.float32) -> Any:
        sharding = NamedSharding(self.mesh, P(*spec))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def gradients(loss: Callable[..., Any], *arguments: Any) -> str:
    out = (NamedSharding(arguments[0]["up"].sharding.mesh, P()), None)
    shardings = tuple(jax.tree.map(lambda leaf: leaf.sharding, each) for each in arguments)
    step = jax.value_and_grad(loss, argnums=tuple(range(len(arguments))))
    compiled = jax.jit(step, out_shardings=(out[0], shardings)).lower(*arguments).compile()
    return str(compiled.as_text())


def moe_layer(run: Program, x: Any, p: Any, capacity: int, inner: Any, batch: Any) -> Any:
    """One MoE layer: the first tokens go to every expert, weighted by the router."""
    with jax.named_scope("router"):
        gates = jax.nn.softmax(x @ p["router"])
    with jax.named_scope("dispatch"):
        weights = jnp.moveaxis(gates[:, :capacity], -1, 0)[..., None]
        slots = run.pin(x[:, :capacity][None] * weights, None, batch)
        slots = run.pin(slots, "expert", inner) if inner != "gathered" else slots
    with jax.named_scope("experts"):
        hidden = jax.nn.relu(jnp.einsum("ebcm,emh->ebch", slots, p["up"]))
        hidden = run.pin(hidden, None, batch) if inner == "gathered" else hidden
        out = jnp.einsum("ebch,ehm->ebcm", hidden, p["down"])
    with jax.named_scope("combine"):
        out = run.pin(out, "expert", inner) if inner != "gathered" else out
        out = run.pin(out, None, batch)
        return out.sum(0)


def cpu_moe(inner: Any = ("data", "fsdp")) -> str:
    run = Program("cpu", data=1, fsdp=1, expert=8)
    batch = ("data", "fsdp", "expert")
    p = {
        "router": run.array((32, 8)),
        "up": run.array((8, 32, 64), "expert"),
        "down": run.array((8, 64, 32), "expert"),
    }

    def loss(p: Any, x: Any) -> Any:
        return (moe_layer(run, x, p, 4, inner, batch) ** 2).mean()

    return gradients(loss, p, run.array((8, 16, 32), batch))


def cpu_gathered() -> str:
    return cpu_moe("gathered")


def cpu_scan(when: str = "after") -> str:
    """Five layers, each with an inner loop of three that changes the layout twice."""
    run = Program("cpu", fsdp=2, expert=4)

    def swap(y: Any, _: Any) -> tuple[Any, None]:
        with jax.named_scope("dispatch"):
            z = run.pin(y * 1.5, "expert")
        with jax.named_scope("combine"):
            return run.pin(jnp.sin(z), None, "expert"), None

    def layer(x: Any, w: Any) -> tuple[Any, None]:
        with jax.named_scope("mlp"):
            y = run.pin(jnp.tanh(x @ run.pin(w)), None, "expert")
        return run.pin(jax.lax.scan(swap, y, None, length=3)[0], None, "expert"), None

    def forward(p: Any, x: Any) -> Any:
        return jax.lax.scan(layer, x, p["up"])[0]

    p = {"up": run.array((5, 32, 32), None, "fsdp")}
    x = run.array((16, 32), None, "expert")
    lowered = jax.jit(forward, out_shardings=x.sharding).lower(p, x)
    return str(lowered.as_text("hlo") if when == "before" else lowered.compile().as_text())


def before_optimization() -> str:
    """The same as it was traced, names without percent signs."""
    return cpu_scan("before")


def cpu_three_axes() -> str:
    """A weight gathered over two axes at once, a gradient reduced over two others."""
    run = Program("cpu", data=2, fsdp=2, expert=2)

    def loss(p: Any, x: Any) -> Any:
        with jax.named_scope("attention"):
            w = run.pin(p["up"])
        with jax.named_scope("mlp"):
            return ((x @ w) ** 2).mean()

    p = {"up": run.array((32, 64), ("fsdp", "expert"))}
    return gradients(loss, p, run.array((8, 32), "data"))


def cpu_none() -> str:
    run = Program("cpu", data=8)
    forward = jax.jit(lambda p, x: jnp.tanh(x @ p))
    compiled = forward.lower(run.array((32, 32)), run.array((8, 32), "data")).compile()
    return str(compiled.as_text())


def accelerator_moe(target: str) -> str:
    """Six scanned MoE layers, experts over `expert`, their weights also over `fsdp`."""
    run = Program(target, fsdp=2, expert=4)
    batch = ("fsdp", "expert")
    p = {
        "router": run.array((6, 4096, 4), dtype=jnp.bfloat16),
        "up": run.array((6, 4, 4096, 14336), None, "expert", "fsdp", dtype=jnp.bfloat16),
        "down": run.array((6, 4, 14336, 4096), None, "expert", None, "fsdp", dtype=jnp.bfloat16),
    }

    def layer(x: Any, p: Any) -> tuple[Any, None]:
        return x.at[:, :2048].add(moe_layer(run, x, p, 2048, "fsdp", batch)), None

    def loss(p: Any, x: Any) -> Any:
        return (jax.lax.scan(layer, x, p)[0].astype(jnp.float32) ** 2).mean()

    return gradients(loss, p, run.array((16, 4096, 4096), batch, dtype=jnp.bfloat16))


def tpu_moe() -> str:
    return accelerator_moe("v6e:2x4")


def gpu_moe() -> str:
    return accelerator_moe("gpu")


def tpu_gathered() -> str:
    """Eight scanned layers whose batch dim keeps `expert`, so that weights travel."""
    run = Program("v5e:2x4", expert=8)

    def layer(x: Any, p: Any) -> tuple[Any, None]:
        with jax.named_scope("dispatch"):
            slots = run.pin(x.reshape(16, 8, 512, 4096), "expert")
        with jax.named_scope("experts"):
            hidden = jax.nn.relu(jnp.einsum("becm,emh->bech", slots, p["up"]))
            out = jnp.einsum("bech,ehm->becm", run.pin(hidden, "expert"), p["down"])
        with jax.named_scope("combine"):
            return run.pin(run.pin(out, "expert").reshape(16, 4096, 4096), "expert"), None

    def loss(p: Any, x: Any) -> Any:
        return (jax.lax.scan(jax.checkpoint(layer), x, p)[0].astype(jnp.float32) ** 2).mean()

    p = {
        "up": run.array((8, 8, 4096, 8192), None, "expert", dtype=jnp.bfloat16),
        "down": run.array((8, 8, 8192, 4096), None, "expert", dtype=jnp.bfloat16),
    }
    shardings = {name: leaf.sharding for name, leaf in p.items()}
    out = (NamedSharding(run.mesh, P()), shardings)
    x = run.array((16, 4096, 4096), "expert", dtype=jnp.bfloat16)
    return str(jax.jit(jax.value_and_grad(loss), out_shardings=out).lower(p, x).compile().as_text())


def tpu_ring() -> str:
    """A product with a gathered weight and its gradient, both unrolled around the ring."""
    run = Program("v5e:2x4", fsdp=8)

    def loss(p: Any, x: Any) -> Any:
        with jax.named_scope("experts"):
            y = x @ p["up"]
        return (y.astype(jnp.float32) ** 2).mean()

    p = {"up": run.array((8192, 8192), "fsdp", dtype=jnp.bfloat16)}
    x = run.array((16384, 8192), "fsdp", dtype=jnp.bfloat16)
    out = (None, {"up": p["up"].sharding})
    return str(jax.jit(jax.value_and_grad(loss), out_shardings=out).lower(p, x).compile().as_text())


def tpu_kernel() -> str:
    """Tokens to their experts, a kernel that multiplies them, and back.

    XLA prints the kernel's metadata over several lines.
    """
    run = Program("v5e:2x4", expert=8)

    def multiply(x: Any, w: Any, out: Any) -> None:
        out[...] = jnp.dot(x[...], w[0], preferred_element_type=jnp.float32).astype(out.dtype)

    def local(p: Any, x: Any) -> Any:
        with jax.named_scope("dispatch"):
            rows = jax.lax.all_to_all(x, "expert", 0, 0).reshape(1024, 256)
        with jax.named_scope("experts"):
            rows = pl.pallas_call(
                multiply,
                out_shape=jax.ShapeDtypeStruct((1024, 512), x.dtype),
                name="multiply",
                metadata={"tile": "[8, 128]", "note": 'a { alone, and "quotes"'},
            )(rows, p["up"])
        with jax.named_scope("combine"):
            return jax.lax.all_to_all(rows.reshape(8, 128, 512), "expert", 0, 0)

    specs = ({"up": P("expert")}, P("expert"))
    layer = jax.shard_map(
        local, mesh=run.mesh, in_specs=specs, out_specs=P("expert"), check_vma=False
    )
    p = {"up": run.array((8, 256, 512), "expert", dtype=jnp.bfloat16)}
    x = run.array((64, 128, 256), "expert", dtype=jnp.bfloat16)
    return str(jax.jit(layer).lower(p, x).compile().as_text())


COLLECTIVE = re.compile(r" (all|collective|reduce-scatter|async)[a-z-]*\(")
KEEPS_METADATA = re.compile(r" (while|custom-call)\(|%gemm_|calls=%all-reduce-scatter")


def anonymous(text: str) -> str:
    """Without the paths of this machine."""
    text = re.sub(r'("custom_call_config":\{"body":)"[^"]*"', r'\1""', text)
    return re.sub(r'^(\d+) "[^"]*/[^"/]*"$', r'\1 "program.py"', text, flags=re.M)


def shortened(text: str, collapse: bool) -> str:
    """Cut out what the tests do not read."""
    blocks = re.split(r"(?<=\n)(?=%|ENTRY )", text)
    return "".join(shortened_block(block, collapse) for block in blocks)


def shortened_block(block: str, collapse: bool) -> str:
    head = block.split("(")[0]
    fused = "fused" in head or "wrapped" in head
    entry = head.startswith("ENTRY")
    if fused and collapse and not COLLECTIVE.search(block):
        block = collapsed(block)
    lines = []
    for line in block.split("\n"):
        short = re.sub(r' (scheduling|deduplicated)_name="[^"]*"', "", line)
        if "known_trip_count" not in line and not (entry and '"flag_configs"' not in line):
            short = re.sub(r", backend_config=\{.*\}$", "", short)
        if not COLLECTIVE.search(line) and (fused or not KEEPS_METADATA.search(line)):
            short = re.sub(r", metadata=\{[^{}]*\}", "", short)
        lines.append(short)
    return "\n".join(lines)


def collapsed(block: str) -> str:
    """A fused computation that holds no collective, as its parameters and one opaque line."""
    root = re.search(r"\n  ROOT (%\S+) = (\S+|\(.*?\)) [a-z][a-z-]*\(", block)
    parameters = re.findall(r"\n(  %(\S+) = [^\n]* parameter\(\d+\))", block)
    if root is None or re.match(r"(s32|u32|pred)\[\]", root[2]):
        return block  # it may count the trips of a loop
    operands = ", ".join(f"%{name}" for _, name in parameters)
    opaque = f'  ROOT {root[1]} = {root[2]} custom-call({operands}), custom_call_target="Cut"'
    lines = [block.split("\n")[0], *(line for line, _ in parameters), opaque, "}", "", ""]
    return "\n".join(lines)


PROGRAMS = {
    "cpu_moe": cpu_moe,
    "cpu_moe_jax012": cpu_moe,
    "cpu_gathered": cpu_gathered,
    "cpu_scan": cpu_scan,
    "cpu_three_axes": cpu_three_axes,
    "before_optimization": before_optimization,
    "cpu_none": cpu_none,
    "tpu_moe": tpu_moe,
    "tpu_gathered": tpu_gathered,
    "tpu_ring": tpu_ring,
    "tpu_kernel": tpu_kernel,
    "gpu_moe": gpu_moe,
}
UNCUT = ("tpu_ring", "tpu_kernel", "before_optimization")

if __name__ == "__main__":
    for name in sys.argv[1:]:
        text = anonymous(PROGRAMS[name]())
        if name not in UNCUT:
            text = shortened(text, collapse=not name.startswith("cpu"))
        FOLDER.mkdir(exist_ok=True)
        (FOLDER / f"{name}.txt").write_text(text, encoding="utf-8")
        print(f"{name}: {len(text)} characters")
