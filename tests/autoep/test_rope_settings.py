"""Check RoPE settings from old and new forms of config.json against numbers worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from moe_shard.autoep.attributes import Attributes
from moe_shard.autoep.family import load_family
from moe_shard.autoep.rope_settings import rope_settings
from moe_shard.errors import UserError

PLAIN = {
    "rope_type": "default",
    "rope_max_timescale": 1000000.0,
    "partial_rotary_factor": 1.0,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"short_factor": [1.0, 2], "long_factor": [3.0, 4.0]}


def settings(*, family: str = "mixtral", latent: bool = False, **written: Any) -> dict[str, Any]:
    attributes = Attributes(written, load_family(family), Path("m/config.json"))
    return rope_settings(attributes, latent=latent)


def test_without_scaling() -> None:
    assert settings() == PLAIN
    assert settings(rope_scaling=None, rope_parameters=None) == PLAIN
    assert settings(rope_theta=5e5)["rope_max_timescale"] == 5e5
    assert settings(rope_parameters={"rope_theta": 7})["rope_max_timescale"] == 7.0
    # A key in the dictionary has priority.
    assert settings(rope_theta=1, rope_parameters={"rope_theta": 7})["rope_max_timescale"] == 7.0


def test_partial() -> None:
    assert settings(family="glm4_moe")["partial_rotary_factor"] == 0.5
    assert settings(family="glm4_moe", partial_rotary_factor=1)["partial_rotary_factor"] == 1.0
    found = settings(family="glm4_moe", rope_parameters={"partial_rotary_factor": 0.25})
    assert found["partial_rotary_factor"] == 0.25


@pytest.mark.parametrize("key", ["type", "rope_type"])
@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_yarn_of_old_and_of_today(name: str, key: str) -> None:
    written: dict[str, Any] = {name: {key: "yarn", **YARN}}
    found = settings(**written, max_position_embeddings=32768)
    assert found == PLAIN | {
        "rope_type": "yarn",
        "rope_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_attention_factor": pytest.approx(1.1386294361119891),  # 0.1 ln 4 + 1
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "rope_truncate": True,
    }


@pytest.mark.parametrize(
    ("changes", "factor", "attention_factor"),
    [
        ({"factor": None}, 4.0, 1.1386294361119891),
        ({"attention_factor": 0.7}, 4.0, 0.7),
        ({"mscale": 0.707, "mscale_all_dim": 0.707}, 4.0, 1.0),
        ({"mscale": 1.0}, 4.0, 1.1386294361119891),
        ({"mscale_all_dim": 1.0}, 4.0, 1.1386294361119891),
        # (0.1 ln 4 + 1) / (0.05 ln 4 + 1)
        ({"mscale": 1.0, "mscale_all_dim": 0.5}, 4.0, 1.0648216253695715),
        ({"factor": 1.0}, 1.0, 1.0),
        ({"attention_factor": None}, 4.0, 1.1386294361119891),
    ],
)
def test_what_yarn_multiplies_cosines_by(
    changes: dict[str, Any], factor: float, attention_factor: float
) -> None:
    found = settings(
        rope_scaling={"type": "yarn", **YARN, **changes}, max_position_embeddings=32768
    )
    assert found["rope_factor"] == factor
    assert found["rope_attention_factor"] == pytest.approx(attention_factor, abs=1e-12)
    assert "mscale" not in found


@pytest.mark.parametrize(("written", "mscale"), [({}, 0.0), ({"mscale_all_dim": 0.707}, 0.707)])
def test_what_latent_attention_multiplies_scores_by(written: dict[str, Any], mscale: float) -> None:
    scaling = {"type": "yarn", **YARN, **written, "truncate": False, "beta_fast": 16}
    found = settings(family="deepseek_v3", latent=True, rope_scaling=scaling)
    assert found["mscale"] == mscale
    assert found["rope_truncate"] is False
    assert found["beta_fast"] == 16.0


def test_yarn_is_what_gpt_oss_has_without_a_word() -> None:
    found = settings(family="gpt_oss")
    assert found["rope_type"] == "yarn"
    assert found["rope_attention_factor"] == pytest.approx(0.1 * math.log(32) + 1)
    assert (found["rope_max_timescale"], found["rope_truncate"]) == (150000.0, False)


def test_llama3() -> None:
    written = {"rope_type": "llama3", **LLAMA, "original_max_position_embeddings": 8192}
    assert settings(rope_scaling=written) == PLAIN | {
        "rope_type": "llama3.1",
        "rope_factor": 8.0,
        "rope_low_freq_factor": 1.0,
        "rope_high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


@pytest.mark.parametrize("name", ["longrope", "su"])
def test_longrope(name: str) -> None:
    found = settings(
        rope_scaling={"type": name, **LONG},
        original_max_position_embeddings=4096,
        max_position_embeddings=131072,
    )
    assert found == PLAIN | {
        "rope_type": "longrope",
        "original_max_position_embeddings": 4096,
        # sqrt(1 + ln 32 / ln 4096)
        "rope_attention_factor": pytest.approx(1.1902380714238083),
        "rope_short_factors": [1.0, 2.0],
        "rope_long_factors": [3.0, 4.0],
    }


def test_longrope_with_factors_of_its_own() -> None:
    of_phi = {"short_mscale": 1.25, "long_mscale": 1.25}
    found = settings(family="phimoe", rope_scaling={"type": "longrope", **LONG, **of_phi})
    assert found["rope_attention_factor"] == 1.25
    found = settings(rope_scaling={"type": "longrope", **LONG, "attention_factor": 2})
    assert found["rope_attention_factor"] == 2.0
    # No scaling.
    found = settings(rope_scaling={"type": "longrope", **LONG})
    assert found["rope_attention_factor"] == 1.0


def test_the_original_length() -> None:
    written = {"rope_type": "llama3", **LLAMA}
    key = "original_max_position_embeddings"
    assert settings(rope_scaling=written, max_position_embeddings=99)[key] == 99
    assert settings(rope_scaling={**written, key: 55}, max_position_embeddings=99)[key] == 55
    # As in transformers: a key outside the dictionary has priority.
    both: dict[str, Any] = {"rope_scaling": {**written, key: 55}, key: 33}
    assert settings(**both)[key] == 33


def test_one_dictionary_for_each_type_of_layer() -> None:
    one = {"rope_type": "llama3", **LLAMA, "rope_theta": 5e5}
    found = settings(rope_parameters={"full_attention": one, "sliding_attention": dict(one)})
    assert (found["rope_type"], found["rope_max_timescale"]) == ("llama3.1", 5e5)
    other = {"rope_type": "default", "rope_theta": 1e4}
    two = {"full_attention": one, "sliding_attention": other}
    found = settings(rope_parameters=two)
    assert (found["rope_max_timescale"], found["local_rope_max_timescale"]) == (5e5, 1e4)
    with pytest.raises(UserError, match="differs between types of layers"):
        settings(rope_parameters={**two, "chunked_attention": other})


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2}}, r'rope_type="linear" is not computed'),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2}},
            r'rope_type="dynamic" is not computed',
        ),
        ({"rope_scaling": {"type": ["yarn"]}}, r'rope_type=\["yarn"\] is not computed'),
        ({"rope_scaling": {"type": "yarn", "mrope_section": [1]}}, "mrope_section is not computed"),
        ({"rope_scaling": "yarn"}, 'rope_scaling="yarn" is not an object'),
        ({"rope_scaling": {"type": "yarn", "factor": "x"}}, 'factor="x" is not a number'),
        ({"rope_scaling": {"type": "yarn", "factor": True}}, "factor=true is not a number"),
        ({"rope_scaling": {"type": "llama3", "factor": 2}}, "low_freq_factor=null is not a num"),
        ({"rope_theta": "x"}, 'json: rope_theta="x" is not a number'),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1]}},
            "long_factor=null is not a l",
        ),
        (
            {"rope_scaling": {"type": "longrope", **LONG, "long_factor": ["x"]}},
            r'long_factor=\["x"',
        ),
        (
            {"rope_scaling": {"type": "longrope", **LONG, "short_mscale": 1, "long_mscale": 2}},
            "short_mscale=1 and long_mscale=2",
        ),
        ({"rope_scaling": {"type": "longrope", **LONG, "short_mscale": 1}}, "long_mscale=null"),
        (
            {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 0}},
            "original_max_position_embeddings=0 is not a length",
        ),
    ],
)
def test_what_is_not_computed(written: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        settings(**written)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("m/config.json: ")
    assert lines[-1].startswith("fix: ")
    assert len(lines) <= 3
