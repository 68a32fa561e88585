"""Run a training whose files cannot grow, as on a full disk, and let it go on once they can."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak.full_disk import Row, compare, read_output, train, whole_checkpoints

pytestmark = pytest.mark.survival

STEPS = 4
SMALL = (
    *(f"steps={STEPS}", "max_target_length=64", "per_device_batch_size=1", "eval_interval=-1"),
    *("num_simulated_devices=1", "ici_expert_parallelism=1"),
)


def test_it_says_what_is_not_saved_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    code, output = train(tmp_path, tmp_path / "alone", *SMALL)
    assert code == 0, output
    row = Row(size=0, background=True)
    # 16 KiB a file: settings and records fit, arrays do not.
    row.code, output = train(tmp_path, tmp_path / "outputs", *SMALL, limit="ulimit -f 16;")
    read_output(row, output)
    run = tmp_path / "outputs" / "full"
    assert row.code == 1, output
    assert output.splitlines()[-1].startswith("fix: make room")
    assert row.not_saved[-1] == STEPS
    assert len(row.not_saved) >= 2
    assert whole_checkpoints(run) == ([], [])
    code, output = train(tmp_path, tmp_path / "outputs", *SMALL)
    compare(row, run, tmp_path / "alone" / "full", code, output, steps=STEPS)
    assert row.wrong == []
