"""Check that the checker of array shapes is on, for arguments, results and dtypes."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import jaxtyping
import pytest
from flax import nnx
from jaxtyping import TypeCheckError

from moe_shard.config.model_config import GatingConfig
from moe_shard.layers.activation import gated
from moe_shard.layers.norm import RMSNorm
from moe_shard.moe.slots import count_experts
from tests.shape_checks import PACKAGE, ROOT, modules_with_shapes

ROOMS = ("layers", "models", "program", "inference", "data")
ARRAYS = {"Array", "jax.Array", "np.ndarray"}


def test_arguments_whose_dims_differ_are_refused() -> None:
    gate, up = jnp.zeros((2, 3, 4)), jnp.zeros((2, 3, 5))
    with pytest.raises(TypeCheckError, match=r"typechecking parameter .up."):
        gated(gate, up, GatingConfig())


def test_a_program_is_checked_while_it_is_traced() -> None:
    two, three = jax.ShapeDtypeStruct((2, 4), "float32"), jax.ShapeDtypeStruct((3, 4), "float32")
    with pytest.raises(TypeCheckError, match=r"parameters of moe_shard.layers.activation.gated"):
        jax.eval_shape(lambda gate, up: gated(gate, up, GatingConfig()), two, three)


def test_a_result_that_was_broadcast_by_mistake_is_refused() -> None:
    norm = RMSNorm(dim=4, epsilon=1e-6, weight_dtype="float32")
    assert norm(jnp.ones((2, 4))).shape == (2, 4)
    norm.scale = nnx.Param(jnp.ones((3, 1, 4)))
    with pytest.raises(TypeCheckError, match=r"return value of moe_shard.layers.norm.RMSNorm"):
        norm(jnp.ones((2, 4)))


def test_dtypes_are_checked() -> None:
    with pytest.raises(TypeCheckError, match=r"Actual value: f32\[1,2\]"):
        count_experts(jnp.zeros((1, 2)), 4)


def test_every_module_that_annotates_arrays_is_checked() -> None:
    """A module that was imported before the hook was installed would not be checked."""
    found = modules_with_shapes()
    assert {"moe_shard.layers.attention", "moe_shard.moe.grouped"} <= set(found)
    loaders = {name: importlib.import_module(name).__loader__ for name in found}
    unchecked = [name for name, at in loaders.items() if type(at).__name__ != "_JaxtypingLoader"]
    assert unchecked == []


def bare_arrays(annotation: ast.expr) -> Iterator[str]:
    """Yield the arrays in an annotation that have no shape: `Array`, not `Float[Array, "B S"]`."""
    if isinstance(annotation, ast.Subscript):
        name = ast.unparse(annotation.value)
        if name == "nnx.Param" or isinstance(getattr(jaxtyping, name, None), type):
            return  # a parameter's shape is stated where it is made
    if ast.unparse(annotation) in ARRAYS:
        yield ast.unparse(annotation)
    for each in ast.iter_child_nodes(annotation):
        if isinstance(each, ast.expr):
            yield from bare_arrays(each)


def test_bare_arrays_are_found() -> None:
    found = {"Array": 1, 'Float[Array, "B"]': 0, "dict[str, list[np.ndarray]]": 1, "int": 0}
    found |= {"Callable[[jax.Array], Array]": 2, "nnx.Param[Array] | None": 0}
    for text, count in found.items():
        assert len(list(bare_arrays(ast.parse(text, mode="eval").body))) == count, text


@pytest.mark.parametrize("room", ROOMS)
def test_every_array_in_a_signature_has_a_shape(room: str) -> None:
    bare = []
    for file in sorted((ROOT / PACKAGE / room).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                arguments = [each for each in ast.walk(node.args) if isinstance(each, ast.arg)]
                for hint in [*(each.annotation for each in arguments), node.returns]:
                    found = bare_arrays(hint) if hint else ()
                    bare += [f"{file.name}:{node.lineno} {node.name}: {name}" for name in found]
    assert bare == []
