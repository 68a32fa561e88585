"""Read rotary positions from `config.json`: the older `rope_scaling` or `rope_parameters`.

The factors are applied as transformers does: yarn's `attention_factor` multiplies cosines and
sines, and `mscale_all_dim` multiplies the scores of latent attention, twice.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from moe_shard.autoep.attributes import Attributes
from moe_shard.autoep.strict_json import fix_of, in_json
from moe_shard.config.keys import shown

_TYPES = {
    "default": "default",
    "mrope": "default",
    "ernie_3d": "default",
    "llama3": "llama3.1",
    "yarn": "yarn",
    "deepseek_yarn": "yarn",
    "longrope": "longrope",
    "su": "longrope",
    "proportional": "proportional",
}
"""Name in `config.json` -> `rope_type`."""
_AS_IT_IS = "as the model has it"
_FULL, _SLIDING = "full_attention", "sliding_attention"
"""Types of layers that may have parameters of their own."""
_PARAMETERS = (
    *("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor"),
    *("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate"),
    *("mscale", "mscale_all_dim", "low_freq_factor", "high_freq_factor"),
    *("short_factor", "long_factor", "short_mscale", "long_mscale"),
)


def rope_settings(
    attributes: Attributes,
    *,
    latent: bool,
    without_effect: Collection[str] = (),
    alpha: bool = False,
) -> dict[str, Any]:
    """Return the keys of `base.yml` for rotary positions.

    Args:
        attributes: the model's attributes.
        latent: whether its attention is MLA.
        without_effect: parameters that change nothing where all tokens are text.
        alpha: whether `alpha` stretches theta, once for all lengths (NTK-aware), in place of what
            type "dynamic" is elsewhere.

    Raises:
        UserError: positions are stretched in an unsupported way.
    """
    written = _Parameters(attributes, {*without_effect, *(["alpha"] if alpha else [])})
    theta = written.or_attribute("rope_theta")
    if alpha and written.values.get("alpha") is not None:
        theta *= _raised(written.number("alpha"), attributes)
    settings = {
        "rope_type": written.type,
        "rope_max_timescale": theta,
        "partial_rotary_factor": written.or_attribute("partial_rotary_factor", _turned(attributes)),
    }
    if (of_sliding := written.sliding_theta()) is not None:
        settings["local_rope_max_timescale"] = of_sliding
    if written.type == "proportional" and written.number("factor", 1.0) != 1:
        raise attributes.error(
            f"{written.name}.factor={in_json(written.values['factor'])} of rope_type=proportional "
            "is not computed here",
            "a model without it",
        )
    if written.type in ("default", "proportional"):
        return settings
    original = _or(
        attributes.get("original_max_position_embeddings"),
        written.values.get("original_max_position_embeddings"),
    )
    longest = attributes.number("max_position_embeddings", 0)
    original = longest if original is None else original
    if type(original) is not int or not 2 <= original < 2**63:
        raise attributes.error(
            f"original_max_position_embeddings={in_json(original)} is not a length",
            fix_of(original),
        )
    settings["original_max_position_embeddings"] = original
    stretch = {"llama3.1": _llama3, "yarn": _yarn, "longrope": _longrope}[written.type]
    return settings | stretch(written, original, longest / original, latent)


def _turned(attributes: Attributes) -> float:
    """Return the fraction of a head that turns where only `rotary_dim`, if that, says it."""
    elements = attributes.number("rotary_dim", -1)
    of = attributes.number("head_dim", _head_dim(attributes))
    if elements == -1:
        return 1.0
    if not 0 < elements <= of:
        raise attributes.error(
            f"{attributes.as_text('rotary_dim')} of a head of {of} elements",
            "as many as a head has, or fewer",
        )
    return elements / of


def _head_dim(attributes: Attributes) -> int:
    heads = attributes.number("num_attention_heads", 1)
    return attributes.number("hidden_size", 0) // heads if heads > 0 else 0


def _raised(alpha: float, attributes: Attributes) -> float:
    """Return the factor of the time scale that stretches the slowest wave of a head by alpha."""
    size = attributes.number("head_dim", _head_dim(attributes))
    try:
        return math.pow(alpha, size / (size - 2))
    except (ArithmeticError, ValueError):
        raise attributes.error(
            f"alpha={in_json(alpha)} of a head of {size} elements is out of range",
            "as the model has it",
        ) from None


class _Parameters:
    """Read the one dictionary of parameters, whichever form it has."""

    def __init__(self, attributes: Attributes, without_effect: Collection[str]) -> None:
        self.attributes = attributes
        self.name = "rope_scaling" if attributes.get("rope_scaling") else "rope_parameters"
        values = _or(attributes.get(self.name), attributes.usual(self.name), {})
        if not isinstance(values, dict):
            raise attributes.error(f"{attributes.as_text(self.name)} is not an object", "{...}")
        nested = list(values.values())
        self.of_sliding: dict[str, Any] | None = None
        if nested and all(isinstance(each, dict) for each in nested):
            # One dictionary for each type of layer.
            if all(each == nested[0] for each in nested):
                values = nested[0]
            elif values.keys() == {_FULL, _SLIDING}:
                values, self.of_sliding = values[_FULL], values[_SLIDING]
            else:
                raise attributes.error(
                    f"{self.name} differs between types of layers, which is not computed here",
                    f"a model with one RoPE, or with one of {_FULL} and one of {_SLIDING}",
                )
        for key in values:
            if key not in _PARAMETERS and key not in without_effect:
                raise attributes.error(
                    f"{self.name}.{shown(key)} is not computed here",
                    f"parameters among {', '.join(_PARAMETERS[4:])}",
                )
        self.values: dict[str, Any] = values
        kind = _or(values.get("rope_type"), values.get("type"), "default")
        if kind == "dynamic" and "alpha" in without_effect and values.get("alpha"):
            kind = "default"  # with another theta
        if not isinstance(kind, str) or kind not in _TYPES:
            raise attributes.error(
                f"{self.name}.rope_type={in_json(kind)} is not computed here",
                f"one of {', '.join(_TYPES)}",
            )
        self.type = _TYPES[kind]

    def sliding_theta(self) -> float | None:
        """Return theta of sliding layers where it is their own; else None."""
        if self.of_sliding is None:
            return None
        usual = {"rope_type": "default", "partial_rotary_factor": 1.0}
        for key, value in self.of_sliding.items():
            if key != "rope_theta" and value not in (None, usual.get(key)):
                raise self.attributes.error(
                    f"{self.name}.{_SLIDING}.{shown(key)}={in_json(value)} is not computed here",
                    "a model whose sliding layers have another rope_theta alone",
                )
        theta = _or(self.of_sliding.get("rope_theta"), self.attributes.get("rope_theta"))
        if not _is_number(theta):
            raise self.attributes.error(
                f"{self.name}.{_SLIDING}.rope_theta={in_json(theta)} is not a number",
                fix_of(theta),
            )
        return float(theta)

    def number(self, key: str, default: Any = None) -> float:
        """Return a parameter that is a finite number; anything else is an error."""
        value = _or(self.values.get(key), default)
        if not _is_number(value):
            raise self.attributes.error(
                f"{self.name}.{key}={in_json(value)} is not a number", fix_of(value)
            )
        return float(value)

    def or_attribute(self, key: str, default: Any = None) -> float:
        """Return a parameter that is a finite number; by default the attribute of that name."""
        if self.values.get(key) is not None:
            return self.number(key)
        value = _or(self.attributes.get(key), default)
        if not _is_number(value):
            raise self.attributes.error(f"{key}={in_json(value)} is not a number", fix_of(value))
        return float(value)

    def numbers(self, key: str) -> list[float]:
        """Return a parameter that is a list of numbers."""
        values = self.values.get(key)
        if not isinstance(values, list) or not all(map(_is_number, values)):
            raise self.attributes.error(
                f"{self.name}.{key}={in_json(values)} is not a list of numbers", _AS_IT_IS
            )
        return [float(value) for value in values]


def _llama3(written: _Parameters, _original: int, _ratio: float, _latent: bool) -> dict[str, Any]:
    return {
        "rope_factor": written.number("factor"),
        "rope_low_freq_factor": written.number("low_freq_factor"),
        "rope_high_freq_factor": written.number("high_freq_factor"),
    }


def _yarn(written: _Parameters, _original: int, ratio: float, latent: bool) -> dict[str, Any]:
    factor = written.number("factor", ratio)

    def grown(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0

    mscale, of_scores = (written.number(key, 0) for key in ("mscale", "mscale_all_dim"))
    magnitude = grown(mscale) / grown(of_scores) if mscale and of_scores else grown(1)
    settings: dict[str, Any] = {
        "rope_factor": factor,
        "rope_attention_factor": written.number("attention_factor", magnitude),
        "beta_fast": written.number("beta_fast", 0) or 32.0,
        "beta_slow": written.number("beta_slow", 0) or 1.0,
        "rope_truncate": bool(written.values.get("truncate", True)),
    }
    if latent:
        settings["mscale"] = of_scores
    return settings


def _longrope(written: _Parameters, original: int, ratio: float, _latent: bool) -> dict[str, Any]:
    factor = written.number("factor", ratio)
    magnitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    magnitude = written.number("attention_factor", magnitude)
    short, long = (written.values.get(key) for key in ("short_mscale", "long_mscale"))
    if short != long:
        raise written.attributes.error(
            f"{written.name}: short_mscale={in_json(short)} and long_mscale={in_json(long)}",
            "a model where they are equal: cos and sin have one factor here",
        )
    magnitude = written.number("short_mscale", magnitude)
    return {
        "rope_attention_factor": magnitude,
        "rope_short_factors": written.numbers("short_factor"),
        "rope_long_factors": written.numbers("long_factor"),
    }


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 2**63 if isinstance(value, int) else math.isfinite(value)


def _or(*values: Any) -> Any:
    """Return the first value that is not None; None if all are."""
    return next((value for value in values if value is not None), None)
