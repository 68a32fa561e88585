"""Read MaxText's checkpoints into parameters that are sharded over a mesh.

tensorstore reads them, as it does for Orbax. Each device's shard is read separately, a large one in
parts: a whole tensor is never on the host, nor on a device that does not need it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore

from moe_shard.autoep.host_blocks import Bounds, leaves_of
from moe_shard.autoep.sharded_reads import Progress, read_sharded, rounding_lines, size_of
from moe_shard.autoep.tensors import copy, is_exact
from moe_shard.config.model_config import ModelConfig
from moe_shard.errors import UserError, first_line
from moe_shard.maxtext.checkpoint_plan import CheckpointPlan, Part, make_plan
from moe_shard.maxtext.tensor_paths import weight
from moe_shard.models.params import Params

_LARGE = 2**28
"""Bytes of a shard that are read at once, unless its chunks are larger."""
_CACHE = 2**29
"""Bytes of chunks that are cached, because the next device's shard may be in the same ones."""
_FLOATS = frozenset(
    np.dtype(dtype) for dtype in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)
)


def read_params(
    items: Path,
    specs: Params,
    model: ModelConfig,
    *,
    say: Callable[[str], object] = lambda _: None,
    progress: Progress = lambda _done, _all: None,
) -> Params:
    """Read a model's parameters, each device its own shards.

    Args:
        items: the result of `find_items`.
        specs: the parameters' specs, with the experts' gate and up separate: leaves with a shape, a
            dtype and a sharding.
        model: the model that has the parameters.
        say: receives lines for people.
        progress: called as bytes arrive on this process's devices.

    Raises:
        UserError: it belongs to another model, is not a checkpoint, or cannot be read.
    """
    stores = _open(items)
    plan = make_plan({path: _shape(each) for path, each in stores.items()}, model, str(items))
    leaves = dict(leaves_of(specs))
    assert plan.parts.keys() == leaves.keys(), "a plan fills the parameters of the model"
    dtypes = _dtypes(items, plan, stores)
    for line in plan.lines:
        say(line)
    _report_rounding(plan, dtypes, leaves, say)
    return read_sharded(
        specs,
        lambda path, leaf: _Reader(
            leaf,
            plan.parts[path],
            {part.tensor: stores[part.tensor] for part in plan.parts[path]},
            items,
            stacked=path not in plan.outer,
            factor=plan.factors.get(path, 1.0),
        ),
        progress,
    )


class _Reader:
    """Read the shards of one parameter.

    Args:
        leaf: the parameter's spec.
        parts: the parts that fill it.
        stores: the parts' tensors, by path.
        items: the folder of the tensors, for messages.
        stacked: whether its first dim is of layers, each of which has a part.
        factor: factor of its numbers.
    """

    def __init__(
        self,
        leaf: Any,
        parts: tuple[Part, ...],
        stores: Mapping[str, Any],
        items: Path,
        *,
        stacked: bool,
        factor: float,
    ) -> None:
        self.shape, self.dtype = leaf.shape, np.dtype(leaf.dtype)
        self.parts, self.stacked, self.factor = parts, stacked, factor
        self.stores, self.items = stores, items

    def blocks(self, bounds: Bounds) -> Iterator[tuple[Bounds, np.ndarray]]:
        """Read one shard in blocks.

        Args:
            bounds: the shard's bounds in the parameter.
        """
        for cut in self._cuts(bounds):
            yield cut, self._block(cut)

    def _cuts(self, bounds: Bounds) -> Iterator[Bounds]:
        """Cut a shard along its first dim other than that of layers, at the bounds of its chunks.

        All layers are read together: they are often in the same chunks.
        """
        dim = int(self.stacked)
        low, high = bounds[dim]
        each = size_of(bounds) // (high - low) * self.dtype.itemsize
        part = self.parts[0]
        chunk = self.stores[part.tensor].chunk_layout.read_chunk.shape[int(part.axis == 0)]
        step = max(_LARGE // each // chunk * chunk, chunk)
        first = low
        while first < high:
            # Cut at bounds of chunks, so that none is read for two parts.
            last = min((first // step + 1) * step, high)
            yield (*bounds[:dim], (first, last), *bounds[dim + 1 :])
            first = last

    def _block(self, bounds: Bounds) -> np.ndarray:
        """Read a part of the parameter, on the host."""
        block = np.empty(tuple(high - low for low, high in bounds), self.dtype)
        if not self.stacked:
            self._fill(block[None], self.parts[:1], bounds)
            return block
        (low, high), *within = bounds
        done = 0
        for _, group in groupby(self.parts[low:high], lambda part: (part.tensor, part.axis)):
            parts = tuple(group)
            self._fill(block[done : done + len(parts)], parts, tuple(within))
            done += len(parts)
        return block

    def _fill(self, block: np.ndarray, parts: tuple[Part, ...], within: Bounds) -> None:
        """Read layers that share one tensor, or one layer that has its own."""
        part = parts[0]
        kept = iter(within)
        index: list[Any] = []
        for take in part.take or [slice(None)] * len(within):
            if isinstance(take, int):
                index.append(take)
                continue
            low, high = next(kept)
            first = take.start or 0
            index.append(slice(first + low, first + high))
        axis = part.axis
        if axis is not None:
            index.insert(axis, _along([part.at for part in parts]))
        with _reading(self.items, part.tensor):
            values = self.stores[part.tensor].oindex[tuple(index)].read().result()
        if axis is None:
            values = values[None]
        else:
            gone = sum(isinstance(each, int) for each in index[:axis])
            values = np.moveaxis(values, axis - gone, 0)
        if self.factor != 1:
            values = values.astype(np.float32) * np.float32(self.factor)
        try:
            copy(block, values)
        except FloatingPointError as error:
            raise UserError(
                f"{self.items}: a number of {part.tensor} is too large for float16\n"
                "fix: weight_dtype=bfloat16 or float32"
            ) from error


def _along(numbers: list[int]) -> slice | list[int]:
    """Return indices as a slice if they can be one."""
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    if step > 0 and numbers == list(range(numbers[0], numbers[-1] + 1, step)):
        return slice(numbers[0], numbers[-1] + 1, step)
    return numbers


def _open(items: Path) -> dict[str, Any]:
    """Open the tensors of a checkpoint by path, without reading them; None: not a weight.

    `_METADATA` is Orbax's list of what it wrote, and how.
    """
    with _reading(items):
        notes = json.loads((items / "_METADATA").read_text(encoding="utf-8"))
        paths = [
            tuple(str(key["key"]) for key in entry["key_metadata"])
            for entry in notes["tree_metadata"].values()
            if entry["value_metadata"]["value_type"] != "None"
        ]
    driver = "zarr3" if notes.get("use_zarr3") else "zarr"
    base = f"file://{items.absolute()}/"
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": _CACHE}})
    opening: dict[str, Any] = {}
    for path in paths:
        folder = f"{'.'.join(path)}/"
        kvstore: Any = {"driver": "ocdbt", "base": base, "path": folder}
        if not (items / "manifest.ocdbt").is_file():
            kvstore = base + folder
        spec = {"driver": driver, "kvstore": kvstore, "recheck_cached_data": False}
        is_weight = weight("/".join(path)) is not None
        opening["/".join(path)] = (
            tensorstore.open(spec, read=True, context=context) if is_weight else None
        )
    opened = {}
    for name, future in opening.items():
        with _reading(items, name):
            opened[name] = future and future.result()
    return opened


def _shape(store: Any) -> tuple[int, ...]:
    return () if store is None else tuple(store.shape)


def _dtypes(
    items: Path, plan: CheckpointPlan, stores: Mapping[str, Any]
) -> dict[str, np.dtype[Any]]:
    """Return the dtypes of all tensors that are read.

    Raises:
        UserError: one holds integers or narrow floats that need scales.
    """
    used = sorted({part.tensor for parts in plan.parts.values() for part in parts})
    dtypes = {path: np.dtype(stores[path].dtype.numpy_dtype) for path in used}
    for path, dtype in dtypes.items():
        if dtype not in _FLOATS:
            raise UserError(
                f"{items}: {path} is {dtype.name}, quantized numbers\n"
                "fix: a checkpoint of bfloat16 or float32"
            )
    return dtypes


def _report_rounding(
    plan: CheckpointPlan,
    dtypes: Mapping[str, np.dtype[Any]],
    leaves: Mapping[tuple[str, ...], Any],
    say: Callable[[str], object],
) -> None:
    rounded: dict[tuple[str, str], set[str]] = {}
    for path, parts in plan.parts.items():
        here = np.dtype(leaves[path].dtype)
        for part in parts:
            there = dtypes[part.tensor]
            if not is_exact(there, here):
                rounded.setdefault((there.name, here.name), set()).add(part.tensor)
    for line in rounding_lines({dtypes: sorted(names) for dtypes, names in rounded.items()}):
        say(line)


@contextmanager
def _reading(items: Path, path: str = "") -> Iterator[None]:
    """Turn errors of reading in the block into errors that name what is read.

    Raises:
        UserError: the checkpoint cannot be read.
    """
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f": {path}" if path else ""
        raise UserError(
            f"cannot read the MaxText checkpoint {items}{what}: {first_line(error)}\n"
            "fix: a whole one, as Orbax wrote it; copy it again, or take the one before it"
        ) from error
