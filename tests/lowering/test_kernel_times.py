"""Check the table of kernel times on profiles written by hand, of the layouts of each platform."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from io import StringIO
from math import isclose

import pytest
from rich.console import Console

from moe_shard.lowering.collectives import extract_collectives
from moe_shard.lowering.kernel_stages import STAGES, KernelStages
from moe_shard.lowering.kernel_sums import KernelEvent, kernel_times
from moe_shard.lowering.kernel_times import KernelTimes
from tests.lowering.fixtures_hand_counted import read

MS = 1e6  # nanoseconds


def program(name: str) -> KernelStages:
    return KernelStages(extract_collectives(read(name)))


@pytest.fixture(scope="module")
def gpu() -> KernelStages:
    return program("gpu_moe")


def kernel(
    instruction: str, start: float, ms: float, *, stream: str = "Stream #1", device: str = "GPU:0"
) -> KernelEvent:
    return KernelEvent(device, stream, instruction, start * MS, ms * MS, instruction, "jit_loss")


def times(events: Iterable[KernelEvent], stages: KernelStages) -> KernelTimes:
    found = kernel_times(events, stages)
    assert found is not None
    return found


def seconds(found: KernelTimes) -> dict[str, float]:
    return {each.stage: round(1e3 * each.seconds, 6) for each in found.stages}


@pytest.mark.parametrize(
    ("instruction", "stage", "pass_"),
    [
        ("gemm_fusion_dot.21", "experts", "forward"),
        ("gemm_fusion_dot.23", "experts", "backward"),
        ("gemm_fusion_dot.29", "router", "forward"),
        ("loop_dynamic_update_slice_fusion.9", "combine", "forward"),
        # Both halves of a pair are on the wire, whatever stage asked for it.
        ("all-to-all-start", "all-to-all", "forward"),
        ("all-to-all-done.3", "all-to-all", "backward"),
        ("reduce-scatter-done", "reduce-scatter", "backward"),
        # It has no name; what reads its result has one.
        ("loop_dynamic_slice_fusion.5", "router", "backward"),
    ],
)
def test_a_kernel_is_of_the_stage_that_the_program_shows(
    gpu: KernelStages, instruction: str, stage: str, pass_: str
) -> None:
    found = gpu.of(instruction)
    assert found is not None
    assert (found.stage, found.pass_) == (stage, pass_)


def test_a_reduce_scatter_that_tpu_writes_as_a_fusion_is_a_collective() -> None:
    found = program("tpu_moe").of("fusion.124")
    assert found is not None
    assert found.stage == "reduce-scatter"


def test_a_change_of_dtype_is_a_cast_and_one_of_layout_a_copy(gpu: KernelStages) -> None:
    assert gpu.of("copy.71") is not None
    assert gpu.of("copy.71").stage == "copies"  # type: ignore[union-attr]
    tpu = program("tpu_moe").of("convert.7")
    assert tpu is not None
    assert tpu.stage == "casts"


def test_a_pallas_kernel_is_found_by_its_own_name() -> None:
    stages = program("tpu_kernel")
    event = KernelEvent("GPU:0", "Stream #1", "multiply", 0, MS, "", "")
    assert [each.stage for each in times([event], stages).stages] == ["experts"]


def step(start: float, device: str = "GPU:0") -> list[KernelEvent]:
    """One step of 10 ms: 1 idle, 2 of an exchange of 4 overlapped with experts."""
    return [
        kernel("input_reduce_fusion.2", start, 1, device=device),  # runs once a step
        kernel("gemm_fusion_dot.21", start + 1, 4, device=device),
        kernel("all-to-all-start", start + 3, 4, stream="Stream #2", device=device),
        kernel("gemm_fusion_dot.23", start + 8, 2, device=device),
    ]


def test_stages_idle_time_and_overlap_of_two_steps(gpu: KernelStages) -> None:
    found = times([*step(100), *step(110)], gpu)
    assert found.steps == 2
    assert isclose(found.step, 10e-3)
    assert seconds(found) == {"experts": 6.0, "all-to-all": 4.0, "other": 1.0}
    assert isclose(found.idle, 1e-3)
    assert isclose(found.overlapped, 2e-3)
    experts = next(each for each in found.stages if each.stage == "experts")
    assert isclose(experts.by_pass["forward"], 4e-3)
    assert isclose(experts.by_pass["backward"], 2e-3)
    assert found.kernels[0].kernel in {"gemm_fusion_dot.21", "all-to-all-start"}
    assert found.kernels[0].executions == 1


def test_the_mean_of_devices_and_the_worst(gpu: KernelStages) -> None:
    slow = [*step(100, "GPU:1"), kernel("gemm_fusion_dot.22", 110, 6, device="GPU:1")]
    found = times([*step(100), *slow], gpu)
    experts = next(each for each in found.stages if each.stage == "experts")
    assert found.devices == 2
    assert isclose(experts.seconds, 9e-3)
    assert isclose(experts.worst, 12e-3)
    assert isclose(found.step, 13e-3)
    assert isclose(found.worst_step, 16e-3)


def test_the_kernels_of_a_cuda_graph_go_by_their_own_names(gpu: KernelStages) -> None:
    def launched(kernel: str, start: float) -> KernelEvent:
        return KernelEvent("GPU:0", "Stream #1", kernel, start * MS, MS, "while.18", "jit_loss")

    graph = [launched("gemm_fusion_dot_21", 101), launched("nvjet_sm90_tst", 102)]
    found = times([kernel("input_reduce_fusion.2", 100, 1), *graph], gpu)
    assert seconds(found) == {"experts": 1.0, "other": 2.0}
    assert isclose(found.unattributed, 1e-3)
    assert "nvjet_sm90_tst" in {each.kernel for each in found.kernels}


def test_a_loop_counts_as_what_it_runs(gpu: KernelStages) -> None:
    events = [
        kernel(name, start, ms, stream="XLA Ops", device="TPU:0")
        for name, start, ms in [
            ("while.18", 100, 10),
            ("gemm_fusion_dot.21", 102, 3),
            ("input_reduce_fusion.2", 110, 1),
        ]
    ]
    found = times(events, gpu)
    assert seconds(found) == {"experts": 3.0, "other": 1.0}
    assert isclose(found.idle, 5e-3)  # of 9


def test_what_one_line_nests_is_counted_once(gpu: KernelStages) -> None:
    events = [kernel("gemm_fusion_dot.21", 100, 10), kernel("all-to-all-start", 102, 3)]
    assert seconds(times(events, gpu)) == {"experts": 7.0, "all-to-all": 3.0}


def test_kernels_without_an_instruction(gpu: KernelStages) -> None:
    def unnamed(name: str, start: float, program: str = "") -> KernelEvent:
        return KernelEvent("GPU:0", "Stream #1", name, start * MS, MS, "", program)

    events = [
        unnamed("gemm_fusion_dot_21", 101),  # XLA names a kernel after its instruction
        unnamed("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(...)", 103),
        unnamed("sm90_xmma_gemm_f32f32", 104),
        unnamed("loop_add_fusion", 105, "jit_other"),
    ]
    found = times([*step(100)[:1], *events, *step(107)[:1]], gpu)
    by_stage = {stage: found.steps * value for stage, value in seconds(found).items()}
    assert by_stage == {"experts": 1.0, "reduce-scatter": 1.0, "other": 3.0}
    assert isclose(found.steps * found.unattributed, 1e-3)
    assert isclose(found.steps * found.other_programs, 1e-3)
    text = shown(found)
    assert "12.5% of the step is in kernels that its text does not name" in text
    assert "of other programs" in text


def test_a_profile_of_another_program_has_no_times(gpu: KernelStages) -> None:
    assert kernel_times([], gpu) is None
    stranger = KernelEvent("GPU:0", "Stream #1", "fusion", 0, 1, "fusion.9999", "jit_other")
    assert kernel_times([stranger], gpu) is None


@pytest.mark.parametrize("seed", range(4))
def test_the_rows_add_up_to_the_step(gpu: KernelStages, seed: int) -> None:
    draw = random.Random(seed)
    events = []
    for device, stream in [(d, s) for d in ("GPU:0", "GPU:1") for s in ("Stream #1", "Stream #2")]:
        now = 0.0
        for _ in range(300):
            now += draw.choice([0, 0, draw.random()])
            length = draw.random()
            name = draw.choice(gpu.names)
            events.append(kernel(name, now, length, stream=stream, device=device))
            now += length
    draw.shuffle(events)
    found = times(events, gpu)
    total = sum(each.seconds for each in found.stages)
    assert isclose(total + found.idle - found.overlapped, found.step, rel_tol=1e-9)
    content = found.to_json()
    assert [each["stage"] for each in content["stages"]] == [
        stage for stage in STAGES if stage in {each.stage for each in found.stages}
    ]
    for each in content["stages"]:
        passes = ("forward_s", "backward_s", "optimizer_s", "unknown_s")
        assert isclose(sum(each[name] for name in passes), each["seconds"])
        assert each["worst_s"] >= each["seconds"] * (1 - 1e-9)
    assert json.loads(json.dumps(content)) == content


def shown(found: KernelTimes) -> str:
    page = StringIO()
    found.render_table(Console(file=page, width=140, color_system=None))
    return page.getvalue()


def test_the_table(gpu: KernelStages) -> None:
    text = shown(times([*step(100), *step(110)], gpu))
    assert "kernel time of a step, mean of 1 device and 2 steps" in text
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}
    assert rows["experts"] == ["4.00", "2.00", "6.00", "60.0%", "6.00"]
    assert rows["idle"] == ["1.00", "10.0%", "1.00"]
    assert rows["overlapped"] == ["-2.00", "-20.0%"]
    assert rows["step"] == ["10.00", "100.0%", "10.00"]
    assert "simulated" not in text
