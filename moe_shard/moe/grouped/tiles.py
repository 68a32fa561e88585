"""Choose the tiles of the kernels on GPUs, from a table of what was measured or estimated.

The package's table is `configs/tiles.yml`; `moe-shard bench --tune` writes one of the same form for
the card that is there, which comes first. Of the entries for a platform, a product and a width of
dtype, those of the same kind of device come first, then the nearest measured shape, then the order
of the file. An entry that does not fit the device's shared memory is never chosen.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import jax
from jax.experimental import pallas as pl

from moe_shard.config.load import configs_dir
from moe_shard.config.strict_yaml import read_mapping
from moe_shard.errors import UserError
from moe_shard.files import cache_folder, write_text

ProductName = Literal["forward", "gated", "dx", "dw"]
TILED_PRODUCTS: tuple[ProductName, ...] = get_args(ProductName)
"""The kernels: rows by weights, the same for gate and up at once, and the gradients of both."""
SMALLEST_TILE = 16
"""The least that a Triton product accepts, in every dim."""
_LEAST_SHARED = {"cuda": 99 * 1024, "rocm": 64 * 1024, "cpu": 64 * 1024}
"""Bytes that a program has on every device since Ampere and CDNA; the interpreter needs none."""
_MOST_WARPS = 32
ProductShape = tuple[int, int, int, int]
"""Groups, their rows together, elements of an input row, elements of an output row."""


@dataclass(frozen=True)
class ProductTile:
    """Describe what one program of a kernel computes, and how.

    Attributes:
        rows: rows of its part of the result.
        columns: columns of it; of each of the two products of "gated".
        depth: elements that one step of its loop contracts.
        warps: warps (wavefronts on AMD) of the program.
        stages: steps whose operands are in shared memory at once.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def shared_bytes(self, itemsize: int, weights: int = 1) -> int:
        """Return the shared memory that it takes, for elements of `itemsize` bytes.

        Args:
            itemsize: bytes of an element.
            weights: matrices that the same rows are multiplied by at once.
        """
        return self.stages * (self.rows + weights * self.columns) * self.depth * itemsize

    def within(self, rows: int, columns: int, depth: int) -> ProductTile:
        """Return the tile cut to a result of these sizes and this contracted dim."""
        cut = replace(
            self,
            rows=min(self.rows, _power_of_2(rows)),
            columns=min(self.columns, _power_of_2(columns)),
            depth=min(self.depth, _power_of_2(depth)),
        )
        # A thread should have some elements of the result to compute.
        enough = max(4, cut.rows * cut.columns // (32 * 32))
        return replace(cut, warps=min(self.warps, enough))

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}"


@dataclass(frozen=True)
class TileEntry:
    """Hold a line of a table.

    Attributes:
        platform: "cuda", "rocm" or "cpu".
        product: which kernel: a `ProductName`.
        itemsize: bytes of an element, 2 or 4.
        tile: the tile.
        source: where it is from, such as "measured on NVIDIA H100" or "estimate".
        kind: `device_kind` of the device that it was measured on; empty where it is for any.
        shape: where it was measured; None where that does not matter.
        share: of the speed of the device's own large product, where it was measured.
        fuse: of "gated": whether it is faster than two products and an activation.
    """

    platform: str
    product: ProductName
    itemsize: int
    tile: ProductTile
    source: str
    kind: str = ""
    shape: ProductShape | None = None
    share: float | None = None
    fuse: bool = True

    def line(self) -> dict[str, Any]:
        """Return the entry as a line of a table, whose file has the kind of device as its name."""
        extra = {
            "shape": None if self.shape is None else [*self.shape],
            "share": self.share,
            "fuse": None if self.fuse else False,
        }
        return {
            "platform": self.platform,
            "product": self.product,
            "bytes": self.itemsize,
            **asdict(self.tile),
            "from": self.source,
            **{name: value for name, value in extra.items() if value is not None},
        }

    @property
    def shared_bytes(self) -> int:
        """Return the shared memory that a program takes."""
        return self.tile.shared_bytes(self.itemsize, 2 if self.product == "gated" else 1)

    def distance(self, shape: ProductShape) -> float:
        """Return how far a shape is from the measured one: a factor of 2 in one dim is 1."""
        if self.shape is None:
            return 0.0
        mine, other = ((s[1] / s[0], *s[2:]) for s in (self.shape, shape))
        each = zip(mine, other, strict=True)
        return sum(abs(math.log2(max(a, 1) / max(b, 1))) for a, b in each)


@dataclass(frozen=True)
class Tiling:
    """Choose tiles for one device, from a table.

    Attributes:
        entries: what to choose from, best first; none: a tile that fits everywhere.
        itemsize: bytes of an element.
        shared_memory: bytes of it that one program may have.
    """

    entries: tuple[TileEntry, ...] = ()
    itemsize: int = 4
    shared_memory: int = 64 * 1024

    def entry(self, product: ProductName, shape: ProductShape) -> TileEntry:
        """Return the entry for a product of this shape."""
        fitting = [
            entry
            for entry in self.entries
            if entry.product == product and entry.shared_bytes <= self.shared_memory
        ]
        if not fitting:
            return TileEntry("", product, self.itemsize, self._fits_everywhere(product), "estimate")
        kind = fitting[0].kind
        return min((each for each in fitting if each.kind == kind), key=lambda e: e.distance(shape))

    def tile(self, product: ProductName, shape: ProductShape, block: int) -> ProductTile:
        """Return the tile for a product of this shape, cut to its dims and to blocks of rows.

        Args:
            product: which kernel.
            shape: of the forward product, for its gradients too.
            block: rows of a block, within which all are of one group.
        """
        tile = self.entry(product, shape).tile
        _, _, into, out = shape
        match product:
            case "forward" | "gated":
                return tile.within(block, out, into)
            case "dx":
                return tile.within(block, into, out)
            case "dw":
                return tile.within(into, out, block)

    def words(self, shape: ProductShape) -> str:
        """Return the tiles for a shape and where they are from, for a record."""
        by_source: dict[str, list[str]] = {}
        for product in TILED_PRODUCTS:
            entry = self.entry(product, shape)
            by_source.setdefault(entry.source, []).append(f"{product} {entry.tile}")
        parts = (f"{', '.join(each)} ({source})" for source, each in by_source.items())
        return f"tiles {', '.join(parts)}"

    def _fits_everywhere(self, product: ProductName) -> ProductTile:
        columns = 64 if product == "gated" else 128
        return ProductTile(128, columns, max(SMALLEST_TILE, 128 // self.itemsize), 4, 2)


ESTIMATED = Tiling()
"""A tile that fits every device."""


def tiling(platform: str, itemsize: int, device: jax.Device | None) -> Tiling:
    """Return the choice of tiles for a device.

    Args:
        platform: "cuda", "rocm" or, for the interpreter, "cpu"; of another one small tile.
        itemsize: bytes of an element: 1 counts as 2.
        device: the device, there or compiled for; None where it is not known.

    Raises:
        UserError: the user's own table for the device is damaged.
    """
    least = _LEAST_SHARED.get(platform)
    if least is None:
        return Tiling(itemsize=itemsize)
    kind = "" if device is None else device.device_kind
    # The device's own word; a device of an unknown kind may have less than those in the table.
    shared = int(getattr(device, "shared_memory_per_block_optin", None) or least)
    wide = max(itemsize, 2)
    entries = [
        entry
        for entry in (*_of_user(kind), *read_tiles(configs_dir() / "tiles.yml"))
        if (entry.platform, entry.itemsize) == (platform, wide) and entry.kind in ("", kind)
    ]
    entries.sort(key=lambda entry: entry.kind != kind)  # stable: the user's first
    return Tiling(tuple(entries), wide, shared)


def user_tiles(kind: str) -> Path:
    """Return where the table of the user's own for a kind of device is, if there is one.

    Args:
        kind: `jax.Device.device_kind`.

    Raises:
        RuntimeError: the user has no home.
    """
    return cache_folder() / "tiles" / f"{re.sub(r'[^A-Za-z0-9]+', '-', kind).strip('-')}.yml"


def _of_user(kind: str) -> tuple[TileEntry, ...]:
    """Read the user's own table; nothing where there is none.

    Of several processes each might find another file, or none, and they have to compile one
    program: then it is not read.
    """
    try:
        path = user_tiles(kind)
    except RuntimeError:
        return ()
    if not kind or not path.is_file() or jax.process_count() > 1:
        return ()
    return tuple(replace(entry, kind=kind) for entry in read_tiles(path))


def read_tiles(path: Path) -> tuple[TileEntry, ...]:
    """Read a table.

    Raises:
        UserError: it has not the form of `configs/tiles.yml`.
    """
    return _read(path, path.stat().st_mtime_ns)


def add_tiles(path: Path, entries: Sequence[TileEntry]) -> None:
    """Add entries to a user's own table, in place of those for the same products and shapes.

    Without entries nothing is written.

    Raises:
        UserError: what is there is no table.
        OSError: it cannot be written.
    """

    def place(entry: TileEntry) -> tuple[object, ...]:
        return entry.platform, entry.product, entry.itemsize, entry.shape

    if not entries:
        return
    new = {place(entry) for entry in entries}
    kept = [each for each in read_tiles(path) if place(each) not in new] if path.exists() else []
    # JSON is YAML: a line an entry.
    lines = (f"  - {json.dumps(entry.line())}\n" for entry in (*entries, *kept))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(
        path,
        f"# Written by moe-shard bench --tune; see configs/tiles.yml.\ntiles:\n{''.join(lines)}",
    )


@lru_cache(maxsize=8)
def _read(path: Path, changed: int) -> tuple[TileEntry, ...]:
    del changed  # a key of the cache alone
    content = read_mapping(path)
    lines = content.get("tiles")
    if set(content) != {"tiles"} or not isinstance(lines, list):
        raise UserError(f"{path}: not a table of tiles\nfix: as configs/tiles.yml, or remove it")
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            entries.append(_entry(line))
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path}: entry {number}: {error}\nfix: as configs/tiles.yml, or remove the file"
            ) from error
    return tuple(entries)


def _entry(line: Any) -> TileEntry:
    """Read a line of a table.

    Raises:
        ValueError, TypeError, KeyError: it is not one.
    """
    if not isinstance(line, dict):
        raise ValueError("not a mapping")
    given = dict(line)
    sizes = {each.name: given.pop(each.name) for each in fields(ProductTile)}
    for name, size in sizes.items():
        if type(size) is not int or not 1 <= size <= 1024:
            raise ValueError(f"{name}={size!r} is not a number from 1 to 1024")
        least = 1 if name in ("warps", "stages") else SMALLEST_TILE
        if name != "stages" and (size < least or size & (size - 1)):
            raise ValueError(f"{name}={size} is not a power of 2 from {least} on")
    if sizes["warps"] > _MOST_WARPS:
        raise ValueError(f"warps={sizes['warps']} is more than {_MOST_WARPS}")
    platform, product, itemsize = given.pop("platform"), given.pop("product"), given.pop("bytes")
    if platform not in _LEAST_SHARED or product not in TILED_PRODUCTS or itemsize not in (2, 4):
        raise ValueError(f"no platform, product and width {platform!r}, {product!r}, {itemsize!r}")
    source, shape, share = given.pop("from"), given.pop("shape", None), given.pop("share", None)
    fuse = given.pop("fuse", True)
    if given:
        raise ValueError(f"unknown key {next(iter(given))!r}")
    if not isinstance(source, str) or "\n" in source:
        raise ValueError("`from` is not a line of text")
    if shape is not None and not (
        isinstance(shape, list) and len(shape) == 4 and all(type(n) is int and n > 0 for n in shape)
    ):
        raise ValueError("`shape` is not four numbers")
    if share is not None and not isinstance(share, (int, float)):
        raise ValueError("`share` is not a number")
    if type(fuse) is not bool:
        raise ValueError("`fuse` is not true or false")
    place = None if shape is None else tuple(shape)
    tile = ProductTile(**sizes)
    return TileEntry(platform, product, itemsize, tile, source, "", place, share, fuse)


def _power_of_2(dim: int) -> int:
    return max(SMALLEST_TILE, pl.next_power_of_2(dim))
