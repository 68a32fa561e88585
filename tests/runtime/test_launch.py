"""Which process this is, from each launcher's variables; a wrong value is two lines."""

from __future__ import annotations

import pytest

from moe_shard.errors import UserError
from moe_shard.runtime.launch import Launch, find_launch, why_alone

EXPLICIT = {
    "JAX_COORDINATOR_ADDRESS": "node0:1234",
    "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": "1",
}
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
ORTE = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911"}
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "WORLD_SIZE": "2",
    "RANK": "1",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize(
    ("env", "wanted"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "77", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),  # a batch script
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"}, None),
        ({"JOB_COMPLETION_INDEX": "3"}, None),  # a sweep
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        (EXPLICIT, Launch(2, 1, "node0:1234", True, "the environment")),
        (
            EXPLICIT | {"JAX_COORDINATOR_ADDRESS": "[fd00::1]:99"},
            Launch(2, 1, "[fd00::1]:99", True, "the environment"),
        ),
        (SLURM, Launch(2, 1, None, True, "Slurm")),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2"}, Launch(2, 1, None, None, "Slurm")),
        (
            SLURM | {"JAX_COORDINATOR_ADDRESS": "a:1"},
            Launch(2, 1, "a:1", True, "Slurm"),
        ),
        # mpirun in a Slurm job starts its daemons by srun.
        (SLURM | {"SLURM_PROCID": "0"} | OPEN_MPI | ORTE, Launch(2, 1, None, None, "Open MPI")),
        (
            OPEN_MPI | {"JAX_COORDINATOR_ADDRESS": "a:1"},
            Launch(2, 1, "a:1", None, "Open MPI"),
        ),
        (OPEN_MPI | {"JAX_COORDINATOR_PORT": "9"}, Launch(2, 1, "127.0.0.1:9", None, "Open MPI")),
        (TORCHRUN, Launch(2, 1, "node0:29501", True, "torchrun")),
        (
            {k: v for k, v in EXPLICIT.items() if k != "JAX_PROCESS_ID"}
            | {"JOB_COMPLETION_INDEX": "1"},
            Launch(2, 1, "node0:1234", True, "the environment"),
        ),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, Launch(None, None, None, None, "the TPU pod")),
    ],
)
def test_processes_are_found(env: dict[str, str], wanted: Launch | None) -> None:
    assert find_launch(env) == wanted


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({}, ""),
        ({"WORLD_SIZE": "1", "RANK": "0"}, ""),
        ({"WORLD_SIZE": "many", "RANK": "0"}, ""),
        ({"WORLD_SIZE": "4", "RANK": "1", "MASTER_ADDR": "node0"}, "WORLD_SIZE=4 without torchrun"),
        ({"WORLD_SIZE": "4", "RANK": "1"} | EXPLICIT | {"JAX_NUM_PROCESSES": "1"}, ""),
        (TORCHRUN | {"WORLD_SIZE": "1", "RANK": "0"}, ""),
        (
            {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},
            "SLURM_NTASKS=4; the sa",
        ),
        ({"SLURM_JOB_ID": "77", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, ""),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"}, ""),
        ({"JOB_COMPLETION_INDEX": "3"}, ""),  # a sweep
    ],
)
def test_one_process_where_several_were_meant_is_said(env: dict[str, str], words: str) -> None:
    if "JAX_PROCESS_ID" not in env:
        assert find_launch(env) is None
    said = why_alone(env)
    assert bool(said) == bool(words)
    assert words in said
    assert "\n" not in said


def test_open_mpi_5_on_one_host_has_one_port_for_all_ranks() -> None:
    found = [
        find_launch(OPEN_MPI | {"OMPI_COMM_WORLD_RANK": rank, "PMIX_NAMESPACE": "prterun-7@1"})
        for rank in "01"
    ]
    first, second = (each.address for each in found if each)
    assert first is not None
    assert first == second


@pytest.mark.parametrize(
    ("env", "words"),
    [
        (EXPLICIT | {"JAX_PROCESS_ID": "5"}, ("JAX_PROCESS_ID=5", "0 to 1")),
        (EXPLICIT | {"JAX_PROCESS_ID": "-1"}, ("JAX_PROCESS_ID=-1",)),
        (EXPLICIT | {"JAX_PROCESS_ID": "one"}, ("JAX_PROCESS_ID=one",)),
        (EXPLICIT | {"JAX_PROCESS_ID": "9" * 4000}, ("JAX_PROCESS_ID=99",)),
        (EXPLICIT | {"JAX_NUM_PROCESSES": "0"}, ("JAX_NUM_PROCESSES=0",)),
        (EXPLICIT | {"JAX_NUM_PROCESSES": "2.0"}, ("JAX_NUM_PROCESSES=2.0",)),
        (EXPLICIT | {"JAX_COORDINATOR_ADDRESS": "nonsense"}, ("nonsense", "HOST:PORT")),
        (EXPLICIT | {"JAX_COORDINATOR_ADDRESS": "a:99999"}, ("99999", "65535")),
        (EXPLICIT | {"JAX_COORDINATOR_ADDRESS": "a:0"}, ("a:0", "65535")),
        (EXPLICIT | {"JAX_COORDINATOR_ADDRESS": ":1234"}, (":1234", "HOST:PORT")),
        (EXPLICIT | {"JAX_COORDINATOR_ADDRESS": "http://a:80"}, ("http://a:80",)),
        (EXPLICIT | {"JAX_COORDINATOR_ADDRESS": "fd00::1:80"}, ("fd00::1:80",)),
        *(
            ({k: v for k, v in EXPLICIT.items() if k != left_out}, (f"{left_out} is not set",))
            for left_out in EXPLICIT
        ),
        ({"JAX_PROCESS_ID": "0"}, ("JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES are not set",)),
        (SLURM | {"SLURM_PROCID": "2"}, ("SLURM_PROCID=2", "SLURM_STEP_NUM_TASKS=2")),
        (SLURM | {"SLURM_NTASKS": "4"}, ("SLURM_NTASKS=4", "contradict")),
        (SLURM | {"JAX_NUM_PROCESSES": "4"}, ("JAX_NUM_PROCESSES=4", "contradict")),
        (SLURM | {"JAX_PROCESS_ID": "0"}, ("JAX_PROCESS_ID=0", "SLURM_PROCID=1", "contradict")),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "x"}, ("SLURM_STEP_NUM_TASKS=x",)),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, ("JAX_COORDINATOR_ADDRESS is not set",)),
        (OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "7"}, ("OMPI_COMM_WORLD_RANK=7",)),
        (TORCHRUN | {"MASTER_PORT": "x"}, ("MASTER_PORT=x",)),
        (OPEN_MPI | {"JAX_COORDINATOR_PORT": "70000"}, ("JAX_COORDINATOR_PORT=70000",)),
    ],
)
def test_a_wrong_value_is_two_lines(env: dict[str, str], words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as raised:
        find_launch(env)
    what, fix = str(raised.value).splitlines()
    for word in words:
        assert word in what + fix
    assert fix.startswith("fix: ")
