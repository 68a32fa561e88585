"""Read a model from its `config.json` alone: what its weights would be, before they are here.

It is for the questions that need no weight, such as what a model's step lowers to on a pod.
Where head and embedding are told apart by the tensors of a whole directory, the file's word is
taken here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_shard.autoep.attributes import Attributes
from moe_shard.autoep.detect import attributes_of_keys, configured_tied, make_model
from moe_shard.autoep.family import choose_family, load_family
from moe_shard.autoep.fewer_layers import with_layers
from moe_shard.autoep.settings import model_settings
from moe_shard.autoep.strict_json import read_object
from moe_shard.units import human_count

_TIED = "logits_via_embedding"
_DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Described:
    """Describe a model without weights.

    Attributes:
        family: the family's name.
        settings: key of `base.yml` -> value.
        line: what was found, for people.
    """

    family: str
    settings: dict[str, Any]
    line: str


def describe_config(
    where: Path, family: str = "", layers: int | None = None, ahead: int | None = None
) -> Described:
    """Read a `config.json`.

    Args:
        where: the file.
        family: a name in `configs/families/` or the path of a YAML file; empty: the family that
            the file names.
        layers: number of layers, if the model is to have fewer than the file says; None: all.
        ahead: layers of multi-token prediction; None: as the family's settings say, else none.

    Raises:
        UserError: something is missing, wrong, or unsupported.
    """
    written = read_object(where)
    known = load_family(family) if family else choose_family(written, where)
    if layers is not None:
        written = with_layers(written, known, layers, where)
    attributes = Attributes(written, known, where)
    settings = model_settings(attributes, known, ahead)
    settings[_TIED] = configured_tied(settings, known, written, has_head=True)
    model = make_model(settings, where, attributes_of_keys(settings, known, attributes))
    many = human_count(model.num_decoder_layers, "layer")
    line = (
        f"family: {known.name}, by {where.name} alone: {many}, {model.num_experts} experts; no "
        "weights are read, and training would begin from random ones"
    )
    settings = {"weight_dtype": "float32", "dtype": _dtype(attributes)} | settings
    return Described(known.name, settings, line)


def _dtype(attributes: Attributes) -> str:
    """Return the dtype that the file names; bfloat16 where it names none that is computed in."""
    named = (attributes.get(key) for key in ("dtype", "torch_dtype"))
    return next((each for each in named if each in _DTYPES), "bfloat16")
