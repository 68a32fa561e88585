"""Give the killed run, and no other, disks of its own; lose some of them."""

from __future__ import annotations

from pathlib import Path

from tests.soak.kills import LOCAL, OTHER_MESH, REPLICAS, Soak


def test_only_the_killed_run_has_disks_of_its_own(tmp_path: Path) -> None:
    soak = Soak(tmp_path, 2, 1, 0, local=True)
    assert {*REPLICAS, *LOCAL} <= {*soak.arguments("killed")}
    assert not {*LOCAL} & {*soak.arguments("alone")}
    assert not {*REPLICAS, *LOCAL} & {*Soak(tmp_path, 2, 1, 0).arguments("killed")}
    # Later arguments win.
    elsewhere = dict(each.split("=") for each in soak.arguments("elsewhere", *OTHER_MESH))
    assert elsewhere["ici_data_parallelism"] == "1"
    for process in ("0", "1"):
        (tmp_path / "disks" / "killed" / process).mkdir(parents=True)
    for _ in range(100):
        soak._lose()
    assert soak.figures["lost disks"] == 2
    assert not [*tmp_path.glob("disks/*/*")]
