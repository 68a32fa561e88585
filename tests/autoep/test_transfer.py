"""Import and export weights: each device its own shard, bit for bit, on every mesh."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe_shard.autoep import importing
from moe_shard.autoep.exporting import export_params
from moe_shard.autoep.headers import DTYPE_BYTES
from moe_shard.autoep.importing import import_params
from moe_shard.autoep.tensor_plan import Layout, Piece, TensorPlan
from moe_shard.autoep.tensors import DTYPES
from moe_shard.errors import UserError
from moe_shard.models.params import Params, describe
from tests.autoep.blocks import blocks_of
from tests.autoep.checkpoints import (
    BF16,
    KEYS,
    KINDS,
    Checkpoint,
    headers_of,
    make_checkpoint,
    read_file,
    write_file,
)
from tests.models.build import annotator, label, small_config

MESHES = [
    {"data": 8},
    {"fsdp": 8},
    {"expert": 2, "fsdp": 4},
    {"expert": 4, "tensor": 2},
    {"expert": 8},
    {"expert": 2, "context": 2, "tensor": 2},
]


def specs_on(sizes: dict[str, int], *overrides: str) -> Params:
    config = small_config(sizes, *KEYS, *overrides)
    return describe(config.model, annotator(config)).specs


def read(checkpoint: Checkpoint, specs: Params, **more: Any) -> Params:
    return import_params(checkpoint.plan, checkpoint.headers, specs, **more)


def assert_are(params: Params, expected: dict[str, Any], dtype: Any) -> None:
    """Compare bit for bit, each shard on its device."""

    def check(array: jax.Array, wanted: np.ndarray) -> None:
        wanted = wanted.astype(dtype)
        assert array.dtype == dtype
        assert array.shape == wanted.shape
        for shard in array.addressable_shards:
            assert np.asarray(shard.data).tobytes() == wanted[shard.index].tobytes()

    jax.tree.map(check, params, expected)


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_checkpoint(tmp_path_factory.mktemp("hf") / "model", request.param)


@pytest.mark.parametrize(
    ("sizes", "block"),
    [*((sizes, None) for sizes in MESHES), (MESHES[2], 1), (MESHES[5], 1)],
    ids=lambda value: label(value) if isinstance(value, dict) else f"block-{value}",
)
def test_each_device_gets_its_own_part_of_each_tensor(
    checkpoint: Checkpoint,
    sizes: dict[str, int],
    block: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if block:
        monkeypatch.setattr(importing, "_BLOCK", block)
    specs = specs_on(sizes)
    said: list[str] = []
    told: list[tuple[int, int]] = []
    params = read(checkpoint, specs, say=said.append, progress=lambda *n: told.append(n))
    assert_are(params, checkpoint.params, np.float32)
    places = jax.tree.map(lambda spec: spec.sharding, specs)
    assert jax.tree.map(lambda array: array.sharding, params) == places
    assert said == []
    # Each distinct shard is read once, however many devices hold it.
    size = sum(4 * array.size for array in jax.tree.leaves(checkpoint.params))
    assert told[-1] == (size, size)
    assert [done for done, _ in told] == sorted({done for done, _ in told})


def test_the_experts_are_split_as_the_mesh_says_and_each_has_its_own_values() -> None:
    """Otherwise the tests above would pass even if each half loaded the first half."""
    for ep in (2, 4, 8):
        spec = specs_on({"expert": ep, "data": 8 // ep})["layers"]["mlp"]["experts"]["gate"]
        assert spec.sharding.shard_shape(spec.shape)[1] == 8 // ep


@pytest.mark.parametrize("sizes", MESHES[2::3], ids=label)
def test_an_export_is_the_original_bit_for_bit(
    checkpoint: Checkpoint, sizes: dict[str, int], tmp_path: Path
) -> None:
    params = read(checkpoint, specs_on(sizes))
    zeros = {name: np.zeros_like(tensor) for name, tensor in checkpoint.tensors.items()}
    write_file(tmp_path / "all.safetensors", zeros)
    told: list[tuple[int, int]] = []
    export_params(
        checkpoint.plan,
        headers_of(tmp_path / "all.safetensors"),
        blocks_of(params),
        progress=lambda *n: told.append(n),
    )
    found = read_file(tmp_path / "all.safetensors")
    for name, tensor in checkpoint.tensors.items():
        expected = zeros[name] if name in checkpoint.plan.carried else tensor
        assert found[name].tobytes() == expected.tobytes(), name
    assert told[-1][0] == told[-1][1]


def dtypes() -> list[Any]:
    return [np.dtype(np.float32), np.dtype(np.float16), BF16]


@pytest.mark.parametrize("here", dtypes(), ids=str)
@pytest.mark.parametrize("there", dtypes(), ids=str)
def test_every_dtype_into_every_other(tmp_path: Path, there: Any, here: Any) -> None:
    made = make_checkpoint(tmp_path / "model", "fused", dtype=there)
    said: list[str] = []
    params = read(made, specs_on({"expert": 8}, f"weight_dtype={here.name}"), say=said.append)
    experts = params["layers"]["mlp"]["experts"]["gate"]
    assert experts.dtype == here
    expected = made.params["layers"]["mlp"]["experts"]["gate"].astype(here)
    assert np.asarray(experts).tobytes() == expected.tobytes()
    narrower = {("float32", "float16"), ("float32", "bfloat16"), ("bfloat16", "float16"),
                ("float16", "bfloat16")}  # fmt: skip
    rounded = [line for line in said if f"are {there.name} and rounded to {here.name}" in line]
    assert bool(rounded) == ((there.name, here.name) in narrower)
    assert all(f"weight_dtype={there.name} keeps them" in line for line in rounded)


def one(
    tmp_path: Path, tensors: dict[str, np.ndarray], pieces: list[Piece], shape: tuple[int, ...],
    dtype: Any = np.float32, carried: tuple[str, ...] = (),
) -> jax.Array:  # fmt: skip
    """Import a model of one parameter, `p`, split in two along its first dim."""
    write_file(tmp_path / "one.safetensors", tensors)
    mesh = jax.make_mesh(
        (2,), ("x",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,)
    )
    place = NamedSharding(mesh, PartitionSpec("x"))
    specs = {"p": jax.ShapeDtypeStruct(shape, dtype, sharding=place)}
    headers = headers_of(tmp_path / "one.safetensors")
    array: jax.Array = import_params(TensorPlan(tuple(pieces), carried), headers, specs)["p"]
    return array


def test_a_buffer_in_float32_among_bfloat16_is_kept_and_given_back(tmp_path: Path) -> None:
    """Use e_score_correction_bias: steps of 1e-3 around 10 are lost in bfloat16."""
    bias = (10 + np.arange(8) / 1000).astype(np.float32)
    param = ("layers", "mlp", "router", "correction_bias")
    plan = TensorPlan((Piece("mlp.gate.e_score_correction_bias", param, (0,)),))
    path = tmp_path / "bias.safetensors"
    write_file(path, {"mlp.gate.e_score_correction_bias": bias})
    place = jax.tree.leaves(specs_on({"expert": 8}))[2].sharding
    spec = jax.ShapeDtypeStruct((1, 8), np.float32, sharding=place)
    specs = {"layers": {"mlp": {"router": {"correction_bias": spec}}}}
    params = import_params(plan, headers_of(path), specs)
    found = params["layers"]["mlp"]["router"]["correction_bias"]
    np.testing.assert_array_equal(found, bias[None])
    before = path.read_bytes()
    write_file(path, {"mlp.gate.e_score_correction_bias": bias * 0})
    export_params(plan, headers_of(path), blocks_of(params))
    assert path.read_bytes() == before


def test_nan_payloads_and_signed_zeros_survive(tmp_path: Path) -> None:
    bits = np.array([0x7FC1, 0xFFC1, 0x8000, 0x7F80, 0x0001, 0x7F7F], np.uint16)
    tensor = bits.view(ml_dtypes.bfloat16)
    array = one(tmp_path, {"t": tensor}, [Piece("t", ("p",))], (6,), BF16)
    np.testing.assert_array_equal(np.asarray(array).view(np.uint16), bits)


TENSOR = np.arange(12, dtype=np.float32).reshape(4, 3)
WHOLE = Piece("t", ("p",))


@pytest.mark.parametrize(
    ("tensors", "pieces", "parts"),
    [
        ({"t": TENSOR}, [Piece("u", ("p",))], ("tensor t",)),
        ({}, [WHOLE], ("tensor t", "not there")),
        ({"t": TENSOR, "u": TENSOR}, [WHOLE], ("tensor u", "of no plan")),
        ({"t": TENSOR, "u": TENSOR}, [WHOLE, Piece("u", ("p",))], ("tensor u", "by t")),
        ({"t": TENSOR}, [Piece("t", ("q",))], ("parameter",)),
        ({"t": TENSOR.T.copy()}, [WHOLE], ("tensor t", "[3, 4]", "[4, 3]")),
        ({"t": TENSOR[:2]}, [WHOLE], ("tensor t", "[2, 3]", "[4, 3]")),
        ({"t": TENSOR.ravel()}, [Piece("t", ("p",), (), Layout(split=(5, 3)))], ("tensor t",)),
        ({"t": TENSOR}, [Piece("t", ("p",), (), Layout(order=(0,)))], ("tensor t",)),
        ({"t": TENSOR[0]}, [Piece("t", ("p",), (0,))], ("p,", "lacks part [1]")),
        ({str(n): TENSOR[0] for n in range(5)}, [Piece(str(n), ("p",), (n,)) for n in range(5)],
         ("p,", "has another part [4]")),
        ({"t": TENSOR.astype(np.int64)}, [WHOLE], ("tensor t", "I64")),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said(
    tmp_path: Path, tensors: dict[str, np.ndarray], pieces: list[Piece], parts: tuple[str, ...]
) -> None:
    with pytest.raises(UserError) as caught:
        one(tmp_path, tensors, pieces, (4, 3))
    message = str(caught.value)
    assert len(message.splitlines()) <= 3
    assert "fix: " in message
    for part in parts:
        assert part in message


def test_a_file_cut_short_after_its_header_was_read(tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path / "model")
    headers = made.headers
    file = made.files[1]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"cannot be read(.|\n)*fix: ") as caught:
        import_params(made.plan, headers, specs_on({"expert": 8}))
    assert str(file) in str(caught.value)
    file.unlink()
    with pytest.raises(UserError, match=r"cannot be read(.|\n)*fix: "):
        import_params(made.plan, headers, specs_on({"expert": 8}))


TOO_LARGE = r"too large for float16(.|\n)*fix: weight_dtype"


def test_a_number_too_large_for_float16_is_not_imported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=TOO_LARGE):
        one(tmp_path, {"t": TENSOR * 1e6}, [WHOLE], (4, 3), np.float16)


def test_a_number_too_large_for_float16_is_not_exported(tmp_path: Path) -> None:
    array = one(tmp_path, {"t": TENSOR * 1e6}, [WHOLE], (4, 3))
    write_file(tmp_path / "half.safetensors", {"t": TENSOR.astype(np.float16)})
    headers = headers_of(tmp_path / "half.safetensors")
    with pytest.raises(UserError, match=TOO_LARGE):
        export_params(TensorPlan((WHOLE,)), headers, blocks_of({"p": array}))


def test_a_tensor_of_which_a_part_is_in_no_parameter_is_not_exported(tmp_path: Path) -> None:
    both = np.concatenate([TENSOR, TENSOR])
    half = dataclasses.replace(WHOLE, layout=Layout(take=(slice(4),)))
    array = one(tmp_path, {"t": both}, [half], (4, 3))
    with pytest.raises(UserError, match="12 of its 24 elements"):
        export_params(
            TensorPlan((half,)), headers_of(tmp_path / "one.safetensors"), blocks_of({"p": array})
        )


@pytest.mark.parametrize(
    ("piece", "shape", "parts"),
    [
        (Piece("t", ("q",)), (4, 3), ("parameter p is of no tensor",)),
        (Piece("t", ("p",), (7,)), (4, 3), ("p, of shape (4, 3)", "no tensor has part [0]")),
        (WHOLE, (4, 4), ("tensor t of shape [4, 3]", "should be [4, 4]")),
    ],
)
def test_blocks_that_fit_no_tensor(
    tmp_path: Path, piece: Piece, shape: tuple[int, ...], parts: tuple[str, ...]
) -> None:
    write_file(tmp_path / "one.safetensors", {"t": TENSOR})
    blocks = blocks_of({"p": jax.numpy.zeros(shape)})
    with pytest.raises(UserError) as caught:
        export_params(TensorPlan((piece,)), headers_of(tmp_path / "one.safetensors"), blocks)
    for part in (*parts, "fix: "):
        assert part in str(caught.value)


def test_the_names_of_dtypes() -> None:
    assert {DTYPES[name] for name in ("BF16", "F16", "F32")} == set(dtypes())
    assert {name: dtype.itemsize for name, dtype in DTYPES.items()} == DTYPE_BYTES
