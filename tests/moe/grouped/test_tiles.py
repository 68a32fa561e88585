"""Check which tiles are chosen for a device and a shape, and that tables are read strictly."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import pytest
import yaml

from moe_shard.config.load import configs_dir
from moe_shard.errors import UserError
from moe_shard.moe.grouped import choose
from moe_shard.moe.grouped.tiles import (
    TILED_PRODUCTS,
    ProductTile,
    TileEntry,
    Tiling,
    read_tiles,
    tiling,
    user_tiles,
)

MIXTRAL, OLMOE = (8, 16384, 4096, 14336), (64, 65536, 2048, 1024)
LINE = {
    "platform": "cuda",
    "product": "forward",
    "bytes": 2,
    "rows": 64,
    "columns": 64,
    "depth": 32,
    "warps": 4,
    "stages": 2,
    "from": "measured in a test",
}


def device(kind: str, shared: int) -> Any:
    return SimpleNamespace(device_kind=kind, shared_memory_per_block_optin=shared)


H100 = device("NVIDIA H100 80GB HBM3", 232448)
A100 = device("NVIDIA A100-SXM4-80GB", 166912)
MI300X = device("AMD Instinct MI300X", 65536)
UNKNOWN = device("NVIDIA RTX 9999", 101376)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the tests a cache of their own, so that no table of this machine's user is read."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def write(path: Path, *lines: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({"tiles": [*lines]}))
    return path


def test_the_measured_ones_on_an_h100() -> None:
    found = tiling("cuda", 2, H100)
    for shape in (MIXTRAL, OLMOE):
        for product in ("forward", "dx"):
            assert found.tile(product, shape, 128) == ProductTile(128, 256, 64, 8, 4)
        assert found.tile("dw", shape, 128) == ProductTile(128, 128, 64, 4, 4)
    assert found.words(MIXTRAL) == (
        "tiles forward 128x256, dx 128x256, dw 128x128 (measured on NVIDIA H100), "
        "gated 128x128 (estimate)"
    )


def test_what_exceeds_shared_memory_is_never_chosen() -> None:
    """4 stages of 128 x 64 and 64 x 256 elements of 2 bytes are 192 KB, an A100 has 163."""
    assert tiling("cuda", 2, A100).tile("forward", MIXTRAL, 128).stages == 3
    assert tiling("cuda", 2, UNKNOWN).tile("forward", MIXTRAL, 128) == ProductTile(
        128, 128, 64, 8, 3
    )
    for platform, of in (("cuda", H100), ("cuda", A100), ("rocm", MI300X), ("cuda", UNKNOWN)):
        for itemsize in (1, 2, 4):
            for product in TILED_PRODUCTS:
                found = tiling(platform, itemsize, of)
                tile = found.tile(product, MIXTRAL, 128)
                # By hand: two operands, each `depth` deep.
                bytes_of_a_step = (tile.rows + tile.columns) * tile.depth * max(itemsize, 2)
                assert tile.stages * bytes_of_a_step <= of.shared_memory_per_block_optin


def test_a_device_that_is_not_known_gets_what_fits_all_of_its_platform() -> None:
    for platform, least in (("cuda", 99 * 1024), ("rocm", 64 * 1024)):
        found = tiling(platform, 2, None)
        assert found.shared_memory == least
        assert all(found.tile(each, OLMOE, 128).shared_bytes(2) <= least for each in TILED_PRODUCTS)


def test_none_fits_a_device_of_the_future() -> None:
    found = Tiling((), 2, 65536).entry("dw", MIXTRAL)
    assert found.source == "estimate"
    assert found.tile.shared_bytes(2) <= 65536


def test_tiles_are_cut_to_small_arrays_and_blocks() -> None:
    found = tiling("cuda", 2, H100)
    assert found.tile("forward", (2, 64, 24, 40), 32) == ProductTile(32, 64, 32, 4, 4)
    assert found.tile("dx", (2, 64, 24, 40), 32) == ProductTile(32, 32, 64, 4, 4)
    assert found.tile("dw", (2, 64, 24, 40), 32) == ProductTile(32, 64, 32, 4, 4)


def test_the_users_own_table_goes_first_and_by_the_nearest_shape() -> None:
    wide = LINE | {"columns": 128, "shape": [8, 16384, 4096, 14336], "share": 0.86}
    write(user_tiles(H100.device_kind), LINE | {"shape": [64, 65536, 2048, 1024]}, wide)
    found = tiling("cuda", 2, H100)
    assert found.entry("forward", OLMOE).tile == ProductTile(64, 64, 32, 4, 2)
    assert found.entry("forward", MIXTRAL).tile == ProductTile(64, 128, 32, 4, 2)
    assert found.entry("forward", (128, 32768, 2048, 768)).tile.columns == 64
    # Other products, dtypes and devices keep the package's.
    assert found.entry("dx", MIXTRAL).source == "measured on NVIDIA H100"
    assert tiling("cuda", 4, H100).entry("forward", MIXTRAL).source == "estimate"
    assert tiling("cuda", 2, A100).entry("forward", MIXTRAL).tile.columns == 256


def test_the_record_says_whose_tiles_they_are() -> None:
    write(user_tiles(H100.device_kind), LINE)
    using = choose(
        "auto",
        platform="cuda",
        groups=8,
        rows=16384,
        dtype=jnp.bfloat16,
        dims=(4096, 14336),
        device=H100,
    )
    assert using.alignment == 64  # that of the forward tile
    assert "tiles forward 64x64 (measured in a test), gated 128x128" in using.reason
    assert "blocks of 64 rows, 3% more at most" in using.reason
    using = choose(
        "auto", platform="rocm", groups=8, rows=16384, dtype=jnp.bfloat16, dims=(4096, 14336)
    )
    assert using.reason.endswith(
        "tiles forward 128x128, gated 128x64, dx 128x128, dw 128x128 (estimate)"
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rows": 100}, "rows=100 is not a power of 2 from 16 on"),
        ({"rows": True}, "rows=True is not a number"),
        ({"depth": 8}, "depth=8 is not a power of 2 from 16 on"),
        ({"columns": 4096}, "columns=4096 is not a number from 1 to 1024"),
        ({"warps": 64}, "warps=64 is more than 32"),
        ({"stages": 0}, "stages=0 is not"),
        ({"platform": "tpu"}, "'tpu'"),
        ({"product": "dz"}, "'dz'"),
        ({"bytes": 8}, "8"),
        ({"from": 3}, "`from` is not a line"),
        ({"shape": [1, 2, 3]}, "`shape` is not four numbers"),
        ({"share": "much"}, "`share` is not a number"),
        ({"speed": 3}, "unknown key 'speed'"),
        ({"warps": None}, "warps=None"),
    ],
)
def test_a_damaged_table_is_refused(change: dict[str, Any], says: str, cache: Path) -> None:
    path = write(cache / "tiles.yml", LINE, LINE | change)
    with pytest.raises(UserError) as raised:
        read_tiles(path)
    assert says in str(raised.value)
    assert f"{path}: entry 2" in str(raised.value)
    assert len(str(raised.value).splitlines()) == 2


@pytest.mark.parametrize("text", ["", "tiles: 3", "tiles: []\nmore: 1", "- 1", "tiles: [3]", "{"])
def test_what_is_no_table_is_refused(text: str) -> None:
    path = user_tiles(H100.device_kind)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(UserError, match="fix: "):
        tiling("cuda", 2, H100)


def test_every_entry_of_the_package_says_where_it_is_from() -> None:
    entries = read_tiles(configs_dir() / "tiles.yml")
    assert {entry.source for entry in entries} == {"measured on NVIDIA H100", "estimate"}
    for platform in ("cuda", "rocm"):
        for itemsize in (2, 4):
            made = [e.product for e in entries if (e.platform, e.itemsize) == (platform, itemsize)]
            assert {*made} == {*TILED_PRODUCTS}
    assert not [entry for entry in entries if "rocm" in entry.platform and "meas" in entry.source]


def test_the_name_of_a_file_has_no_path_in_it(cache: Path) -> None:
    assert user_tiles("../../NVIDIA H100 80GB").parent == cache / "moe_shard" / "tiles"


def test_distance_counts_factors_of_two() -> None:
    entry = TileEntry("cuda", "dw", 2, ProductTile(64, 64, 64, 4, 2), "x", "", (8, 1024, 256, 512))
    assert entry.distance((16, 2048, 256, 512)) == 0  # as many rows a group
    assert entry.distance((8, 4096, 128, 512)) == 3
