"""Make meshes: every factorisation of the devices, and slices in JAX's own layout."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass

import jax
import numpy as np
import pytest
from jax.experimental import mesh_utils
from jax.sharding import AxisType

from moe_shard.config.mesh_config import MESH_AXES, MeshConfig
from moe_shard.errors import UserError
from moe_shard.sharding.mesh import count_slices, mesh_from_config

ONES = dict.fromkeys(MESH_AXES, 1)
EVERY_FACTORISATION = [
    shape
    for shape in itertools.product((1, 2, 4, 8), repeat=len(MESH_AXES))
    if math.prod(shape) == 8
]


def config(ici: dict[str, int], dcn: dict[str, int] | None = None) -> MeshConfig:
    return MeshConfig(
        mesh_axes=MESH_AXES,
        ici=tuple({**ONES, **ici}.values()),
        dcn=tuple({**ONES, **(dcn or {})}.values()),
        logical_axis_rules=(),
        rule_conflicts="warn",
        num_simulated_devices=8,
    )


def ids(devices: np.ndarray) -> list[int]:
    return [device.id for device in devices.flat]


@pytest.mark.parametrize("shape", EVERY_FACTORISATION, ids=str)
def test_every_factorisation_builds(shape: tuple[int, ...]) -> None:
    sizes = dict(zip(MESH_AXES, shape, strict=True))
    mesh = mesh_from_config(config(sizes))
    assert dict(mesh.shape) == sizes
    assert mesh.axis_types == (AxisType.Auto,) * len(MESH_AXES)
    assert sorted(ids(mesh.devices)) == list(range(8))


def test_there_are_as_many_as_ways_to_place_three_twos() -> None:
    assert len(EVERY_FACTORISATION) == math.comb(3 + len(MESH_AXES) - 1, 3)


def test_minus_one_takes_the_devices_that_are_left() -> None:
    assert mesh_from_config(config({"fsdp": -1, "expert": 2})).shape["fsdp"] == 4


def test_devices_can_be_chosen_and_keep_their_order() -> None:
    chosen = list(reversed(jax.devices()))[:4]
    mesh = mesh_from_config(config({"fsdp": 2, "expert": 2}), chosen)
    assert ids(mesh.devices) == [7, 6, 5, 4]


def test_slices_lie_outside_the_devices_of_a_slice() -> None:
    # Two slices of four consecutive devices. On `data` (dcn 2, ici 2) the slice varies slowest.
    mesh = mesh_from_config(config({"data": 2, "expert": 2}, {"data": 2}))
    assert mesh.shape["data"] == 4
    assert mesh.devices.reshape(4, 2)[:, 0].tolist() == [jax.devices()[i] for i in (0, 2, 4, 6)]
    # Slices over another axis than those inside: data inside, fsdp across.
    mesh = mesh_from_config(config({"data": 2, "expert": 2}, {"fsdp": 2}))
    assert ids(mesh.devices) == [0, 1, 4, 5, 2, 3, 6, 7]  # data, fsdp (slice), expert


@dataclass(frozen=True)
class SlicedDevice:
    """Imitate a device of a multi-slice system, with the attributes that JAX's layout reads."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "cpu"
    device_kind: str = "imagined"


@pytest.mark.parametrize(
    ("ici", "dcn"),
    [
        ({"data": 2, "expert": 2}, {"data": 2}),
        ({"data": 2, "expert": 2}, {"fsdp": 2}),
        ({"expert": 2}, {"data": 2, "expert": 2}),
        ({"fsdp": 2}, {"data": 2, "fsdp": 2}),
        ({}, {"data": 4, "tensor": 2}),
    ],
)
def test_simulated_slices_are_laid_out_as_jax_lays_out_real_ones(
    ici: dict[str, int], dcn: dict[str, int]
) -> None:
    within, across = (tuple({**ONES, **sizes}.values()) for sizes in (ici, dcn))
    per_slice = math.prod(within)
    devices = [SlicedDevice(i, i // per_slice) for i in range(8)]
    assert count_slices(devices) == 8 // per_slice
    expected = mesh_utils.create_hybrid_device_mesh(within, across, devices)
    mesh = mesh_from_config(config(ici, dcn))
    assert mesh.devices.shape == expected.shape
    assert ids(mesh.devices) == ids(expected)


def test_sizes_that_do_not_fit_the_devices_are_refused() -> None:
    with pytest.raises(UserError) as raised:
        mesh_from_config(config({"expert": 3}))
    message = str(raised.value)
    assert "ici_expert_parallelism" in message
    assert "8" in message
    assert len(message.splitlines()) <= 3


def test_two_free_sizes_are_refused() -> None:
    with pytest.raises(UserError, match="only one axis"):
        dataclasses.replace(config({}), ici=(-1, -1, 1, 1, 1, 1))
