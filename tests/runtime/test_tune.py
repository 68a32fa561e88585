"""Tune the tiles in the interpreter: the command runs from end to end, and its table is used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_shard.cli import bench
from moe_shard.errors import UserError
from moe_shard.moe.grouped import choose
from moe_shard.moe.grouped.tiles import TILED_PRODUCTS, ProductTile, read_tiles, tiling, user_tiles
from moe_shard.runtime import tune

SHAPE = (2, 64, 32, 48)
FEW = [ProductTile(32, 32, 16, 4, 1), ProductTile(64, 16, 32, 4, 1)]


@pytest.fixture(autouse=True)
def few_candidates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tune, "_candidates", lambda *_: FEW)


def run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> Any:
    assert bench.main(["--tune", *arguments, "--rounds", "1", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_what_it_writes_is_what_runs_use(capsys: pytest.CaptureFixture[str]) -> None:
    found = run("2x64x32x48", capsys=capsys)
    path = user_tiles("cpu")
    assert found["table"] == str(path)
    assert [line["product"] for line in found["tiles"]] == [*TILED_PRODUCTS]
    assert not found["not_measured"]
    assert all(line["failed"] == 0 and line["seconds"] > 0 for line in found["tiles"])
    entries = read_tiles(path)
    assert [entry.shape for entry in entries] == [SHAPE] * 4
    assert all("measured on cpu, 20" in entry.source for entry in entries)
    device = jax.devices()[0]
    used = tiling("cpu", 2, device)
    for entry in entries:
        assert used.entry(entry.product, SHAPE).tile == entry.tile
    using = choose("pallas", platform="cpu", groups=2, rows=4096, dtype=jnp.bfloat16, device=device)
    assert using.alignment == min(entries[0].tile.rows, 128)
    # A second shape is added, and the first measured again is replaced.
    run("2x64x32x48", "2x32x16x16", capsys=capsys)
    assert len(read_tiles(path)) == 8


def test_time_that_is_over_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    found = run("2x64x32x48", "--seconds", "0", capsys=capsys)
    assert found["not_measured"] == 4
    assert not user_tiles("cpu").exists()


def test_a_tile_with_other_results_is_no_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    right = tune._call

    def wrong(routine: Any, product: Any, *, apart: bool) -> Any:
        call = right(routine, product, apart=apart)
        if routine.tiling.entries[0].tile == FEW[0]:
            return lambda *given: call(*given) * 1.1
        return call

    monkeypatch.setattr(tune, "_call", wrong)
    found = tune.tune(jax.devices()[0], "cpu", [SHAPE], seconds=100, rounds=1)
    assert {each.failed for each in found} == {1}
    assert FEW[0] not in {each.entry.tile for each in found}


def test_two_products_where_these_are_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    best = tune._best

    def as_if(*arguments: Any) -> Any:
        tiles, times, failed = best(*arguments)
        return tiles, {tile: 1.0 if tile is None else 2.0 for tile in times}, failed

    monkeypatch.setattr(tune, "_best", as_if)
    found = tune.tune(jax.devices()[0], "cpu", [SHAPE], seconds=100, rounds=1)
    assert [each.entry.fuse for each in found] == [True, False, True, True]


def test_rows_are_the_same_whatever_groups_are_padded_to() -> None:
    data = tune._Data(jax.devices()[0], (4, 100, 8, 8), jnp.float32)
    for block in (16, 64):
        x, _, _, _, sizes = data.operands(block)
        assert not (sizes % block).any()
        assert x.shape[0] == sizes.sum()
        rows = data.without_padding("forward", x, block)
        assert np.array_equal(rows, jax.random.normal(jax.random.key(0), (100, 8), jnp.float32))
        assert np.isclose(jnp.sum(x**2), jnp.sum(rows**2))


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ((), "there is no card here"),
        (("1x2x3x4",), "at least 2 groups"),
        (("qwen",), "qwen"),
    ],
)
def test_bad_usage(asked: tuple[str, ...], says: str) -> None:
    with pytest.raises(UserError, match=says):
        bench.main(["--tune", *asked])


def test_a_tpu_has_no_such_tiles() -> None:
    with pytest.raises(UserError, match="no kernels with tiles"):
        tune.tune(jax.devices()[0], "tpu", [SHAPE], seconds=1)
