"""Read planes as the profilers of GPUs, TPUs and CPUs lay them out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moe_shard.errors import UserError
from moe_shard.runtime.trace_events import newest_profile, plane_events, read_events


def event(name: str, start: float, duration: float, **stats: Any) -> SimpleNamespace:
    return SimpleNamespace(
        name=name, start_ns=start, duration_ns=duration, stats=list(stats.items())
    )


def plane(name: str, **lines: list[SimpleNamespace]) -> SimpleNamespace:
    named = {key.replace("_", " "): events for key, events in lines.items()}
    return SimpleNamespace(
        name=name, lines=[SimpleNamespace(name=key, events=each) for key, each in named.items()]
    )


def test_a_gpus_streams_name_the_instruction_beside_the_kernel() -> None:
    found = list(
        plane_events(
            plane(
                "/device:GPU:3",
                Stream_14=[
                    event(
                        "gemm_fusion_dot_2", 5, 7, hlo_op="gemm_fusion_dot.2", hlo_module="jit_s"
                    ),
                    event("MemcpyD2D", 20, 1),
                ],
                XLA_Ops=[event("derived", 5, 7)],
                Steps=[event("0", 0, 99)],
            )
        )
    )
    assert [(e.device, e.line, e.kernel, e.instruction, e.program) for e in found] == [
        ("GPU:3", "Stream 14", "gemm_fusion_dot_2", "gemm_fusion_dot.2", "jit_s"),
        ("GPU:3", "Stream 14", "MemcpyD2D", "", ""),
    ]
    assert (found[0].start, found[0].end) == (5, 12)


def test_a_tpus_events_are_called_by_their_instruction_and_lie_in_a_program() -> None:
    found = list(
        plane_events(
            plane(
                "/device:TPU:0",
                XLA_Modules=[event("jit_step(123)", 10, 50), event("jit_other(4)", 70, 10)],
                XLA_Ops=[
                    event(
                        "%fusion.7 = bf16[8,128]{1,0:T(8,128)} fusion(%a, %b), kind=kOutput", 12, 3
                    ),
                    event("copy-done.1", 72, 2),
                    event("fusion.9", 65, 1),
                ],
                Async_XLA_Ops=[event("%copy-start = ...", 12, 30)],
            ),
            host="worker-1 ",
        )
    )
    assert [(e.device, e.instruction, e.program) for e in found] == [
        ("worker-1 TPU:0", "fusion.7", "jit_step"),
        ("worker-1 TPU:0", "copy-done.1", "jit_other"),
        ("worker-1 TPU:0", "fusion.9", ""),
    ]


def test_simulated_devices_share_the_plane_of_the_host() -> None:
    kernel = event("dot.3", 1, 2, hlo_op="dot.3", hlo_module="jit_step", device_ordinal=5)
    noise = [event("ThreadpoolListener::Record", 0, 0), event("end: dot.3", 3, 0)]
    found = list(
        plane_events(plane("/host:CPU", tf_XLAEigen=[kernel, *noise], python=[event("$f", 0, 9)]))
    )
    assert [(e.device, e.instruction, e.program) for e in found] == [("CPU:5", "dot.3", "jit_step")]
    assert list(plane_events(plane("Task Environment", x=[kernel]))) == []


def test_a_folder_without_a_profile_is_refused_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="profile=true"):
        newest_profile(tmp_path)


def test_a_damaged_profile_is_refused(tmp_path: Path) -> None:
    (tmp_path / "host.xplane.pb").write_bytes(b"\x0a\xff\xff\xff\xff\x0fnot a profile")
    with pytest.raises(UserError, match="cannot read"):
        read_events(tmp_path)


def test_the_newest_profile_has_a_file_of_each_host(tmp_path: Path) -> None:
    for folder, hosts in (("2026_01_01", ["a"]), ("2026_01_02", ["a", "b"])):
        (tmp_path / folder).mkdir()
        for host in hosts:
            (tmp_path / folder / f"{host}.xplane.pb").touch()
    assert {file.name for file in newest_profile(tmp_path)} == {"a.xplane.pb", "b.xplane.pb"}
