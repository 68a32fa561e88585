"""Where the default table puts the parameters of the models beside this file, written by hand."""

from __future__ import annotations

from typing import Any


def table(expert: int) -> dict[str, tuple[list[str | None], list[int]]]:
    """Name -> mesh axes of the dims (the unsharded last ones left out), shape on a device.

    Args:
        expert: size of the expert axis; all others but data have size 1.
    """
    inward = (["expert"], [8 // expert, 32, 64])
    outward = (["expert"], [8 // expert, 64, 32])
    layer: dict[str, Any] = {"gate": inward, "up": inward, "down": outward}
    return {
        **{f"experts.{name}": place for name, place in layer.items()},
        "router.kernel": ([], [32, 8]),  # replicated: every device routes its own tokens
        "mix": ([None, "expert"], [64, 32 // expert]),  # FSDP over the model dim
        "table": ([None, "expert"], [64, 32 // expert]),
    }


def check(found: dict[str, Any], *, expert: int) -> None:
    """Compare what `placed.run` found with the table, and the verdicts."""
    expected = table(expert)
    moe = [*(f"experts.{name}" for name in ("gate", "up", "down")), "router.kernel"]
    own = {"embed.embedding": "table"}
    own |= {f"blocks.{block}.mix": "mix" for block in range(2)}
    own |= {f"blocks.{block}.moe.{name}": name for block in range(2) for name in moe}
    linen = {"table": "table", **{f"moe.{name}": name for name in moe}}
    moments = {
        f"opt_state.0.{moment}.{name}": kind
        for moment in ("mu", "nu")
        for name, kind in own.items()
    }
    for model, names in (("own", own), ("moments", moments), ("linen", linen)):
        assert set(found[model]) == set(names)
        for name, kind in names.items():
            spec, shape = found[model][name]
            while spec and spec[-1] is None:
                spec = spec[:-1]
            assert (spec, shape) == expected[kind], (model, name)
    assert found["own verdict"] == found["linen verdict"] == "expert-parallel"
    assert found["losses"][1] < found["losses"][0]
