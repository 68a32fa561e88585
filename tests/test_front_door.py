"""Check the library's public names: few, each with an example that runs, all loaded lazily."""

from __future__ import annotations

import doctest
import subprocess
import sys
import warnings
from importlib.resources import files
from pathlib import Path
from typing import Any

import jax
import pytest
from flax import nnx

import moe_shard as ms

NAMES = [name for name in ms.__all__ if name != "lowering"]  # a module, which has its own tests
PLAIN = {"MoEStats", "UserError"}
"""Names that are made by others: what they are like is in the examples of these."""


def run(example: doctest.DocTest) -> None:
    told: list[str] = []
    doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS).run(example, out=told.append)
    assert not told, "".join(told)


@pytest.mark.parametrize("name", NAMES)
def test_its_examples_run(name: str) -> None:
    found = doctest.DocTestFinder().find(getattr(ms, name), name, module=False, globs={})
    examples = [each for each in found if each.examples]
    assert examples or name in PLAIN, f"{name} has no example"
    for example in examples:
        run(example)


def test_the_example_of_the_package_runs() -> None:
    (example,) = doctest.DocTestFinder(recurse=False).find(ms, "moe_shard", globs={})
    assert example.examples
    run(example)


def test_importing_it_loads_nothing_heavy() -> None:
    code = "import sys, moe_shard; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "moe_shard" in loaded
    assert not loaded & {"jax", "jaxlib", "numpy", "flax", "optax", "orbax", "ml_collections"}


def test_every_name_is_listed_and_found() -> None:
    assert ms.__all__ == sorted(ms.__all__)
    assert set(ms.__all__) <= set(dir(ms))
    for name in ms.__all__:
        assert getattr(ms, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'MoeLayer'"):
        _ = ms.MoeLayer
    assert files("moe_shard").joinpath("py.typed").is_file()


def test_mesh_by_keyword() -> None:
    mesh = ms.make_mesh(data=2, expert=-1)
    assert (mesh.shape["data"], mesh.shape["expert"], mesh.size) == (2, 4, 8)
    assert len(mesh.axis_names) == 6
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    explicit = ms.make_mesh(expert=8, explicit=True)
    assert set(explicit.axis_types) == {jax.sharding.AxisType.Explicit}
    four = ms.make_mesh(expert=4, devices=jax.devices()[4:])
    assert [device.id for device in four.devices.flat] == [4, 5, 6, 7]
    # Slices are outermost, as a network joins them.
    slices = ms.make_mesh(expert=4, dcn={"data": 2})
    assert slices.shape["data"] == 2
    assert [device.id for device in slices.devices.reshape(2, 4)[1]] == [4, 5, 6, 7]


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        ({"expert": 3}, ["make_mesh(expert=3)", "multiply to 3", "8 devices", "[:3]"]),
        ({"expert": 4}, ["multiply to 4", "data=2", "devices=jax.devices()[:4]"]),
        ({"data": -1, "expert": -1}, ["only one axis", "give expert a size"]),
        ({"data": -1, "expert": 3}, ["multiply to 3"]),
        ({"expert": 0}, ["make_mesh(expert=0)", "from 1, or -1"]),
        ({"expert": 16}, ["multiply to 16", "product is 8", "device_count=16"]),
        ({"expert": 4, "dcn": {"pod": 2}}, ["'pod'", "one of data"]),
        ({"expert": 4, "dcn": {"data": 3}}, ["slices", "divides the devices"]),
    ],
)
def test_wrong_mesh(sizes: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ms.UserError) as raised:
        ms.make_mesh(**sizes)
    for part in parts:
        assert part in str(raised.value), raised.value
    assert len(str(raised.value).splitlines()) <= 3


@pytest.mark.parametrize(
    "rules", [[("exp",)], [("exp", 3)], ["exp"], [("exp", ("expert", 2))], [(None, ())], [5]]
)
def test_wrong_rule(rules: list[object]) -> None:
    with pytest.raises(ms.UserError, match="is not \\(logical axis, mesh axes\\)"):
        ms.RuleTable(rules)  # type: ignore[arg-type]


def test_rules_compare_by_content() -> None:
    written = ms.RuleTable([("exp", "expert"), ("embed", None), ("mlp", ["tensor", "fsdp"])])
    assert written.rules == (("exp", ("expert",)), ("embed", ()), ("mlp", ("tensor", "fsdp")))
    assert written == ms.RuleTable(written.rules)
    assert hash(written) == hash(ms.RuleTable(written.rules))
    assert written != ms.RuleTable(written.rules[:-1])
    with pytest.raises(ms.UserError, match="twice"):
        ms.RuleTable([("exp", ("expert", "expert"))])


def test_sharding_compares_by_mesh_rules_and_setting() -> None:
    one, two = (ms.Sharding(ms.make_mesh(data=2, expert=4)) for _ in range(2))
    one.named_sharding("x", ("exp",), (8,))  # a record
    assert (one, hash(one)) == (two, hash(two))
    assert one != ms.Sharding(ms.make_mesh(expert=8))
    assert one != ms.Sharding(ms.make_mesh(data=2, expert=4, explicit=True))
    assert one != ms.Sharding(one.mesh, ms.RuleTable([("exp", "expert")]))
    assert one != ms.Sharding(one.mesh, rule_conflicts="error")


def test_a_mesh_that_lacks_axes_of_the_table() -> None:
    table = ms.RuleTable.default()
    small = ms.Sharding(jax.make_mesh((2, 4), ("data", "expert")), table)
    whole = ms.Sharding(ms.make_mesh(data=2, expert=4), table)
    names, shape = ("exp", "embed_moe", "mlp_moe"), (8, 32, 64)
    assert (
        small.named_sharding("w", names, shape).spec == whole.named_sharding("w", names, shape).spec
    )
    other = ms.RuleTable([*table.rules, ("heads", ("model",))])
    with pytest.raises(ms.UserError, match=r"'model'\nthe mesh has data, expert, .*\nfix: "):
        ms.Sharding(jax.make_mesh((2, 4), ("data", "expert")), other)
    with pytest.raises(ms.UserError, match="RuleTable\\(rules\\)"):
        ms.Sharding(whole.mesh, table.rules)  # type: ignore[arg-type]
    with pytest.raises(ms.UserError, match="one of warn, record, error"):
        ms.Sharding(whole.mesh, table, "raise")  # type: ignore[arg-type]


def test_a_conflict_is_a_warning_where_the_library_is_used() -> None:
    sharding = ms.Sharding(ms.make_mesh(data=2, expert=4))
    names = ("activation_exp", "activation_batch_moe")
    with pytest.warns(UserWarning, match="dim 'activation_exp' stays unsharded") as warned:
        sharding.named_sharding("slots", names, (8, 8))
    assert [each.filename for each in warned] == [__file__]
    sharding.named_sharding("more slots", names, (8, 8))  # of one cause: once
    assert len(sharding.conflict_lines()) == 1


def test_a_table_of_maxtexts(tmp_path: Path) -> None:
    path = tmp_path / "rules.yml"
    path.write_text(
        "mesh_axes: [data, stage, expert]\n"
        "logical_axis_rules: [[activation_batch_moe, [data, stage, expert]],\n"
        "  [activation_exp, [expert]], [exp, expert], [layers, stage]]\n"
    )
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        table = ms.RuleTable.from_yaml(path)
    told = "\n".join(str(each.message) for each in warned)
    assert "read as size 1: stage" in told
    assert "no rule, so not sharded, as in MaxText" in told
    assert ("activation_batch_no_exp", ("data",)) in table.rules
    assert ("layers", ()) in table.rules
    config = ms.MoEConfig(
        num_experts=8, num_experts_per_tok=2, moe_mlp_dim=16, moe_dispatch_no_expert_sharding=True
    )
    layer = ms.init_sharded(
        lambda rngs: ms.MoELayer(
            config,
            model_dim=16,
            sharding=ms.Sharding(ms.make_mesh(expert=8), table),
            rngs=rngs,
        ),
        rngs=nnx.Rngs(0),
    )
    assert layer.experts.gate.sharding.spec[0] == "expert"
    path.write_text("rules: []")
    with pytest.raises(ms.UserError, match="no logical_axis_rules"):
        ms.RuleTable.from_yaml(path)
