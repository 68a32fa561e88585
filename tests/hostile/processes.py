"""Generate environments that need a new process: variables, closed output, narrow terminals."""

from __future__ import annotations

import random

from tests.hostile.cases import TINY_YML, Case, Files, odd

_VARIABLES: dict[str, tuple[str, ...]] = {
    "XLA_FLAGS": (
        *("--xla_nonsense=1", "nonsense", "--xla_cpu_enable_fast_math=perhaps", "--", " ", "'"),
        *("--xla_force_host_platform_device_count=0", "--xla_dump_to=/proc/x", "--xla_dump_to"),
        *("--xla_force_host_platform_device_count=3", "--xla_force_host_platform_device_count=x"),
        *("--xla_backend_optimization_level=0", "/nonexistent", "--xla_gpu_autotune_level=4"),
    ),
    "JAX_ENABLE_X64": ("1", "0", "perhaps", ""),
    "JAX_PLATFORMS": ("cuda", "tpu", "rocm", "gpu", "nonsense", "cpu,cuda", "CPU", ""),
    "JAX_DEFAULT_MATMUL_PRECISION": ("highest", "nonsense", "bfloat16", "tensorfloat32"),
    "JAX_NUMPY_DTYPE_PROMOTION": ("strict", "standard", "loose"),
    "JAX_NUMPY_RANK_PROMOTION": ("raise", "warn", "perhaps"),
    "JAX_DEFAULT_PRNG_IMPL": ("rbg", "unsafe_rbg", "nonsense"),
    "JAX_DISABLE_JIT": ("1", "x"),
    "JAX_DEBUG_NANS": ("1", "x"),
    "JAX_NUM_CPU_DEVICES": ("1", "3", "0", "-1", "x"),
    "JAX_TRANSFER_GUARD": ("disallow", "log", "x"),
    "JAX_COMPILATION_CACHE_DIR": ("/proc/nonsense", "tiny.yml", "", "gs://x/y"),
    "JAX_ENABLE_COMPILATION_CACHE": ("0", "x"),
    "JAX_THREEFRY_PARTITIONABLE": ("0", "x"),
    "JAX_TRACEBACK_FILTERING": ("off", "x"),
    "JAX_COORDINATOR_ADDRESS": ("nonsense", "127.0.0.1:99999", ":1", "[::1]:x", ""),
    "JAX_NUM_PROCESSES": ("0", "1", "-1", "x", "1.5"),
    "JAX_PROCESS_ID": ("0", "5", "-1", "x"),
    "SLURM_PROCID": ("0", "x", "-1"),
    "OMPI_COMM_WORLD_RANK": ("0", "x"),
    "JOB_COMPLETION_INDEX": ("3", "x"),
    "WORLD_SIZE": ("x", "1"),
    "HOME": ("/nonexistent/x", "tiny.yml", ""),
    "XDG_CACHE_HOME": ("/proc", "tiny.yml", "relative", ""),
    "TMPDIR": ("/nonexistent/x", "tiny.yml", ""),
    "PYTHONWARNINGS": ("error", "nonsense", "default"),
    "PYTHONOPTIMIZE": ("2",),
    "PYTHONIOENCODING": ("ascii", "utf-16"),
    "PYTHONUTF8": ("0", "1"),
    "PYTHONHASHSEED": ("0", "1"),
    "LC_ALL": ("C", "POSIX", "nonsense", "tr_TR.UTF-8"),
    "COLUMNS": ("20", "1", "0", "x", "100000"),
    "TERM": ("dumb", "nonsense", ""),
    "FORCE_COLOR": ("1", ""),
    "TF_CPP_MIN_LOG_LEVEL": ("0", "x"),
    "TZ": ("nonsense", ""),
    "PATH": ("", "/nonexistent"),
}
_REMOVED = ("HOME", "PATH", "USER", "LANG", "TERM", "TMPDIR")
_SHELLS = (
    *('"$@" >&-', '"$@" 2>&-', '"$@" >&- 2>&-', '"$@" <&- >&- 2>&-', '"$@" | true'),
    *('"$@" > /dev/full', '"$@" 2> /dev/full', '"$@" | head -1', 'ulimit -n 60; "$@"'),
    *('ulimit -f 0; "$@"', 'ulimit -f 1; "$@"', 'ulimit -t 100; "$@"'),
    *('mkdir gone; cp tiny.yml gone; cd gone; rm -r ../gone; "$@"', 'umask 777; "$@"'),
    'script -qec "stty cols 20; $(printf "%q " "$@")" /dev/null',
    'script -qec "stty cols 1; $(printf "%q " "$@")" /dev/null',
)


def process(rng: random.Random) -> Case:
    """Make an environment and a redirection for a process of its own."""
    files: Files = {"tiny.yml": TINY_YML, "program.py": b"print(1)\n"}
    files["p.txt"] = b"HloModule a\n\nENTRY %e () -> f32[] {\n  ROOT %c = f32[] constant(0)\n}\n"
    files["text.txt"] = b"the router sends every token to its experts\n" * 200
    two = ["num_simulated_devices=2", "ici_expert_parallelism=2", "dataset_path=text.txt"]
    train = ["train", "tiny.yml", *two, "num_experts=4", "base_num_decoder_layers=1"]
    argv = rng.choice(
        [
            *([*train, "steps=0"], [*train, "steps=0"], [*train, "steps=2"], [*train, "steps=2"]),
            *(["explain", "tiny.yml"], ["report", "p.txt"], ["--help"], ["train", "--help"]),
            *(["generate", "tiny.yml", "a"], ["watch", "--", "./nothing"], ["status", "."]),
            *(["watch", "--", "sh", "-c", "exit 1"], ["bench", "--tune"], ["profile", "."]),
        ]
    )
    environment: dict[str, str | None] = {}
    for name in rng.sample(sorted(_VARIABLES), k=rng.choice([0, 1, 1, 2])):
        values = _VARIABLES[name]
        environment[name] = rng.choice([*values, *values, odd(rng)])
    if rng.random() < 0.15:
        environment[rng.choice(_REMOVED)] = None
    # What the system itself does not take is no case.
    environment = {name: value and value.replace("\x00", "") for name, value in environment.items()}
    shell = rng.choice(_SHELLS) if not environment or rng.random() < 0.2 else ""
    return Case("process", argv, files, environment, shell=shell)
