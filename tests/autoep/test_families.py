"""Compare family files with transformers' classes, and check what a family file may contain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_shard.autoep.detect import detect
from moe_shard.autoep.family import choose_family, list_families, load_family
from moe_shard.checkpoints.resolve import load_model
from moe_shard.errors import UserError
from tests.autoep.directory import HERE, small_models, write_model

SMALL = small_models()
Shapes = dict[str, list[int]]
MADE_OF_OTHERS = {
    ("ernie4_5_moe", "moe_layer_end_index"): 27,
    ("qwen2_moe", "sliding_window"): 0,
    ("qwen3_moe", "sliding_window"): None,
}
"""Attributes that a class changes once it has all of them: the last layer, and no windows."""
UNKNOWN_TO_CLASS = {
    ("glm4_moe_lite", "first_k_dense_replace"),
    ("glm4_moe_lite", "num_nextn_predict_layers"),
    *(("glm4v_moe", name) for name in ("use_qk_norm", "num_nextn_predict_layers")),
    *(("sarvam_moe", name) for name in ("use_qkv_bias", "use_bias", "num_experts")),
    ("sarvam_moe", "num_shared_experts"),
    *(
        ("ernie4_5_vl_moe", f"moe_layer_{name}")
        for name in ("start_index", "end_index", "interval")
    ),
    *((name, "full_attention_interval") for name in ("qwen3_next", "qwen3_5_moe")),
    ("qwen3_5_moe_text", "full_attention_interval"),
    *((name, "global_head_dim") for name in ("gemma4", "gemma4_text")),
    *((name, "sliding_window_pattern") for name in ("gemma4", "gemma4_text")),
    *(("deepseek_v32", name) for name in ("rope_interleave", "num_nextn_predict_layers")),
    *(("glm_moe_dsa", name) for name in ("rope_interleave", "num_nextn_predict_layers")),
}
"""Attributes of published files that a class turns into another, or has as a constant."""
RECORDED = sorted((HERE / "classes").glob("*.json"))


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_attributes_that_are_left_out_are_those_of_the_class(path: Path) -> None:
    family, known = load_family(path.stem), json.loads(path.read_text())
    whole = known
    for part in filter(None, family.config_section.split(".")):
        known = known[part]
    aliases = {name: other for other, name in family.aliases.items()}
    for name, value in family.attributes.items():
        if name in ("rope_theta", "partial_rotary_factor"):
            rope = known["rope_parameters"]
            assert rope.get("sliding_attention", rope).get(name) == value, name
        elif name == "rope_parameters":
            assert known[name] in (value, {**value, "rope_theta": 150000.0})
        elif name not in known and name in family.require:
            # Only published files have this key.
            assert family.require[name] == value
        elif name == "tie_word_embeddings" and family.config_section:
            # The model around the decoder has the word.
            assert value in (False, whole.get(name))
        elif (path.stem, name) in UNKNOWN_TO_CLASS or (name not in known and value is None):
            assert name not in known
        elif (path.stem, name) in MADE_OF_OTHERS:
            assert known[name] == MADE_OF_OTHERS[path.stem, name]
        elif isinstance(known.get(name, known.get(aliases.get(name))), list):
            assert value is None or value == known[name], name
        else:
            found = known[name] if name in known else known[aliases[name]]
            assert found == value or value is None, name
    # And the converse: a setting's source has a default here if the class has one.
    rules = [*family.settings.values(), family.num_experts_attr, family.top_k_attr]
    for rule in rules:
        for name in rule.sources:
            if known.get(name) is not None and name not in family.attributes:
                assert name in ("num_key_value_heads", "head_dim", "hidden_act"), name


@pytest.mark.parametrize("name", [name for name in SMALL if "llama4" not in name])
def test_a_config_without_what_its_class_knows(name: str, tmp_path: Path) -> None:
    model = SMALL[name]
    known = json.loads((HERE / "classes" / f"{name[:-2]}.json").read_text())
    short = {key: value for key, value in model["config"].items() if value != known.get(key)}
    short["model_type"] = model["config"]["model_type"]
    assert len(short) < len(model["config"])
    whole = detect(write_model(tmp_path / "whole", model["config"], model["saved"]))
    found = detect(write_model(tmp_path / "short", short, model["saved"]))
    assert found.settings == whole.settings
    assert found.plan == whole.plan


def test_families_match_their_own_types() -> None:
    families = list_families()
    assert len(families) >= 13
    where = Path("config.json")
    for name in families:
        architectures = list(load_family(name).architectures)
        config = {"model_type": name, "architectures": architectures}
        assert choose_family(config, where).name == name
        for architecture in architectures:
            config = {"model_type": "x", "architectures": [architecture]}
            assert choose_family(config, where).name == name


@pytest.mark.parametrize(
    "config",
    [{}, {"model_type": None}, {"model_type": ["mixtral"]}, {"architectures": "Mixtral"}],
)
def test_no_family(config: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"no family of configs/families matches\nfix: .*mixtral"):
        choose_family(config, Path("config.json"))


def test_several_families(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_shard.autoep.family.list_families", lambda: ["mixtral", "mixtral"])
    with pytest.raises(UserError, match="hf_family=mixtral or hf_family=mixtral"):
        choose_family({"model_type": "mixtral"}, Path("config.json"))


OWN = r"""
model_type: my_moe
moe_layer_pattern: transformer\.h\.\d+\.moe
router_pattern: route
expert_pattern: expert_list
expert_w1: win
expert_w2: wout
expert_w3: wup
num_experts_attr: moe.count
top_k_attr: moe.chosen
score_func: sigmoid
route_norm: true
route_scale: 1.5
num_expert_groups: null
layers: transformer.h
tensors:
  embedding.table: transformer.wte.weight
  final_norm.scale: transformer.ln_f.weight
  attention.query: attn.wq.weight
  attention.key: attn.wk.weight
  attention.value: attn.wv.weight
  attention.out: attn.wo.weight
  attention_norm.scale: ln_1.weight
  mlp_norm.scale: ln_2.weight
settings:
  base_emb_dim: n_embd
  base_num_decoder_layers: n_layer
  base_moe_mlp_dim: moe.size
  base_mlp_dim: moe.size
  base_num_query_heads: n_head
  base_num_kv_heads: n_head
  attention_bias: false
  attention_out_bias: false
  normalization_layer_epsilon: 1e-5
  max_position_embeddings: 1024
"""


def own_model() -> tuple[dict[str, Any], dict[str, list[int]]]:
    config = {
        "model_type": "my_moe",
        "n_embd": 8,
        "n_layer": 2,
        "n_head": 2,
        "vocab_size": 300,
        "moe": {"count": 3, "chosen": 2, "size": 6},
    }
    shapes = {
        "transformer.wte.weight": [300, 8],
        "transformer.ln_f.weight": [8],
        "lm_head.weight": [300, 8],
    }
    for layer in range(2):
        at = f"transformer.h.{layer}"
        for name in ("wq", "wk", "wv", "wo"):
            shapes[f"{at}.attn.{name}.weight"] = [8, 8]
        shapes |= {f"{at}.ln_1.weight": [8], f"{at}.ln_2.weight": [8]}
        shapes[f"{at}.moe.route.weight"] = [3, 8]
        for expert in range(3):
            name = f"{at}.moe.expert_list.{expert}"
            shapes |= {f"{name}.{w}.weight": [6, 8] for w in ("win", "wup")}
            shapes[f"{name}.wout.weight"] = [8, 6]
    return config, shapes


def own_family(tmp_path: Path, *changes: tuple[str, str]) -> str:
    text = OWN
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / "my_moe.yml"
    path.write_text(text)
    return str(path)


def test_a_family_of_ones_own_needs_no_code(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "model", *own_model())
    detected = detect(directory, own_family(tmp_path))
    assert detected.family == "my_moe"
    wanted = {
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "routed_score_func": "sigmoid",
        "routed_scaling_factor": 1.5,
        "n_routing_groups": -1,
        "moe_dispatch": "ragged",
        "capacity_factor": -1.0,
        "load_balance_loss_weight": 0.0,
    }
    assert {key: detected.settings[key] for key in wanted} == wanted
    assert len(detected.plan.pieces) == 3 + 2 * (7 + 3 * 3)
    assert "transformer.h.*.moe.expert_list.*.win.weight" in detected.lines[1]


def test_gate_and_up_of_each_expert_in_one_tensor(tmp_path: Path) -> None:
    config, shapes = own_model()
    for name in [name for name in shapes if ".wup." in name]:
        del shapes[name]
        shapes[name.replace("wup", "win")] = [12, 8]
    directory = write_model(tmp_path / "model", config, shapes)
    plan = detect(directory, own_family(tmp_path, ("expert_w3: wup", "expert_w3: null"))).plan
    halves = {
        piece.param[-1]: piece.layout
        for piece in plan.pieces
        if piece.tensor == "transformer.h.1.moe.expert_list.2.win.weight"
    }
    assert halves.keys() == {"gate", "up"}
    assert halves["gate"].take == (slice(0, 6),)
    assert halves["up"].take == (slice(6, 12),)
    assert halves["gate"].order == halves["up"].order == (1, 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("router_pattern:", "router_patern:"), ["unknown key router_patern", "router_pattern?"]),
        (("  base_emb_dim:", "  base_emb_dmi:"), ["settings.base_emb_dmi", "base_emb_dim?"]),
        (("  attention.query:", "  attention.qeury:"), ["tensors.attention.qeury"]),
        (("score_func: sigmoid", "score_func: relu"), ["score_func=relu", "softmax"]),
        (("route_norm: true", "route_norm: {of: x}"), ["route_norm.of"]),
        (("route_norm: true", "route_norm: {else: x}"), ["does not say where its value"]),
        (("router_pattern: route", "router_pattern: (route"), ["not a regular expression"]),
        (("expert_w1: win", "expert_w1: 3"), ["expert_w1=3 is not text"]),
        (("model_type: my_moe", "model_type: {a: b}"), ["model_type=", "a name or a list"]),
        (("settings:", "spans: {windwo: x}\nsettings:"), ["spans.windwo", "window?"]),
        (("settings:", "spans: {every: x}\nsettings:"), ["spans={", "a mapping to attributes"]),
        (("settings:", "has_shared_experts: 1\nsettings:"), ["has_shared_experts=1", "true or"]),
        (("settings:", "attributes: [x]\nsettings:"), ["attributes=[x]", "a mapping"]),
        (("settings:", "based_on: nothing\nsettings:"), ["based_on nothing", "configs/families"]),
        (("settings:", "aliases: {a: 1}\nsettings:"), ["aliases=", "a mapping to names"]),
        ((r"moe_layer_pattern: transformer\.h\.\d+\.moe", ""), ["no moe_layer_pattern"]),
    ],
)
def test_a_family_that_says_what_none_says(
    change: tuple[str, str], words: list[str], tmp_path: Path
) -> None:
    directory = write_model(tmp_path / "model", *own_model())
    with pytest.raises(UserError) as caught:
        detect(directory, own_family(tmp_path, change))
    text = str(caught.value)
    assert "my_moe.yml" in text or "based_on" in text
    assert text.count("\n") <= 2
    for word in words:
        assert word in text


def test_a_family_based_on_itself(tmp_path: Path) -> None:
    path = own_family(tmp_path, ("model_type: my_moe", f"based_on: {tmp_path}/my_moe.yml"))
    with pytest.raises(UserError, match="based_on"):
        load_family(path)


def test_a_pattern_that_fits_too_much(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "model", *own_model())
    path = own_family(tmp_path, ("router_pattern: route", r"router_pattern: .*"))
    with pytest.raises(UserError, match="by the patterns of family my_moe"):
        detect(directory, path)


def test_a_pattern_for_two_tensors(tmp_path: Path) -> None:
    config, shapes = own_model()
    shapes["transformer.h.0.moe.router.weight"] = [3, 8]
    directory = write_model(tmp_path / "model", config, shapes)
    path = own_family(tmp_path, ("router_pattern: route", "router_pattern: router?"))
    with pytest.raises(UserError, match=r"moe\.route\.weight and .*router\.weight have one role"):
        detect(directory, path)


def test_attributes_that_config_json_and_a_family_of_ones_own_do_not_share(tmp_path: Path) -> None:
    config, shapes = own_model()
    assumed = "not in config.json, as family my_moe has it: "
    usual = 'rope_theta=10000.0, tie_word_embeddings=false, hidden_act="silu"'
    notes = detect(write_model(tmp_path / "all", config, shapes), own_family(tmp_path)).notes
    assert notes == (assumed + usual,)
    more = {"sliding_window": 4, "use_cache": True, "rope_scaling": None, "tanh": False}
    directory = write_model(tmp_path / "more", config | more, shapes)
    half = ("settings:", "attributes: {partial_rotary_factor: 0.5}\nsettings:")
    path = own_family(tmp_path, half)
    notes = detect(directory, path).notes
    assert notes == (
        "in config.json, and read by nothing: sliding_window=4",
        f"{assumed}{usual}, partial_rotary_factor=0.5",
    )
    assert set(notes) <= set(load_model(str(directory), [f"hf_family={path}"]).warnings)
    nested = {"rope_parameters": {"rope_theta": 5.0, "partial_rotary_factor": 1.0}}
    directory = write_model(tmp_path / "nested", config | nested, shapes)
    assert detect(directory, path).notes == (assumed + usual.partition(", ")[2],)


def test_the_family_of_the_docs(tmp_path: Path) -> None:
    """Load the file of docs/extending.md on what transformers saves of a small Dots1."""
    page = (HERE.parents[1] / "docs" / "extending.md").read_text()
    path = tmp_path / "dots1.yml"
    path.write_text(
        "model_type: dots1" + page.split("```yaml\nmodel_type: dots1")[1].split("```")[0]
    )
    config = {
        **{"model_type": "dots1", "hidden_size": 12, "num_hidden_layers": 2, "vocab_size": 300},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "n_group": 2},
        **{"intermediate_size": 10, "moe_intermediate_size": 6, "n_shared_experts": 2},
        **{"n_routed_experts": 4, "num_experts_per_tok": 1, "topk_group": 1, "sliding_window": 3},
        **{"first_k_dense_replace": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
        **{"layer_types": ["full_attention", "sliding_attention"], "attention_bias": False},
        **{"rms_norm_eps": 1e-6, "max_position_embeddings": 64, "tie_word_embeddings": False},
        **{"rope_parameters": {"rope_theta": 5e4, "rope_type": "default"}, "hidden_act": "silu"},
    }

    def mlp(at: str, size: int) -> Shapes:
        return {f"{at}.{name}_proj.weight": [size, 12] for name in ("gate", "up")} | {
            f"{at}.down_proj.weight": [12, size]
        }

    shapes: Shapes = {"model.embed_tokens.weight": [300, 12], "lm_head.weight": [300, 12]}
    shapes["model.norm.weight"] = [12]
    for layer in range(2):
        at = f"model.layers.{layer}"
        for name, size in (("q", 8), ("k", 4), ("v", 4)):
            shapes[f"{at}.self_attn.{name}_proj.weight"] = [size, 12]
        shapes[f"{at}.self_attn.o_proj.weight"] = [12, 8]
        shapes |= {f"{at}.self_attn.{name}_norm.weight": [4] for name in "qk"}
        shapes |= {f"{at}.{n}_layernorm.weight": [12] for n in ("input", "post_attention")}
    shapes |= mlp("model.layers.0.mlp", 10) | mlp("model.layers.1.mlp.shared_experts", 12)
    for expert in range(4):
        shapes |= mlp(f"model.layers.1.mlp.experts.{expert}", 6)
    shapes["model.layers.1.mlp.gate.weight"] = [4, 12]
    shapes["model.layers.1.mlp.gate.e_score_correction_bias"] = [4]
    detected = detect(write_model(tmp_path / "model", config, shapes), str(path))
    assert detected.notes == ()
    assert {piece.tensor for piece in detected.plan.pieces} == set(shapes)
    wanted = {
        **{"routed_score_func": "sigmoid", "routed_bias": True, "norm_topk_prob": True},
        **{"routed_scaling_factor": 2.5, "n_routing_groups": 2, "topk_routing_group": 1},
        **{"shared_experts": 2, "use_qk_norm": True, "qk_norm_type": "head"},
        **{"attention_pattern": ["global", "sliding"], "sliding_window_size": 3},
        **{"first_num_dense_layers": 1, "partial_rotary_factor": 1.0, "rope_max_timescale": 5e4},
    }
    assert {key: detected.settings[key] for key in wanted} == wanted


def test_notes_where_a_family_is_given_for_another_model(tmp_path: Path) -> None:
    model = SMALL["mixtral-0"]
    other = model["config"] | {"model_type": "another", "scale": 2}
    directory = write_model(tmp_path / "other", other, model["saved"])
    assert "read by nothing: scale=2" in detect(directory, "mixtral").notes[0]
    directory = write_model(tmp_path / "own", other | {"model_type": "mixtral"}, model["saved"])
    assert detect(directory, "mixtral").notes == detect(directory).notes == ()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([("emb_dim: n_embd", "emb_dim: nembd")], "no nembd, from which base_emb_dim is read"),
        (
            [("settings:", "settings:\n  qk_norm_type: head")],
            r"no head, .*\n.* qk_norm_type as \{value: head\}",
        ),
        (
            [
                ("transformer.h\ntensors:", "model.h\ntensors:"),
                ("moe_layer_pattern: transformer", "moe_layer_pattern: model"),
            ],
            "no tensor is of layer 0\n.*or prefix and layers of family my_moe",
        ),
    ],
)
def test_an_error_names_the_key_of_the_family(
    changes: list[tuple[str, str]], words: str, tmp_path: Path
) -> None:
    directory = write_model(tmp_path / "model", *own_model())
    with pytest.raises(UserError, match=words):
        detect(directory, own_family(tmp_path, *changes))


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        (("router_pattern: route", "router_pattern: gate"), "no router: no tensor matches"),
        (("expert_w3: wup", "expert_w3: up"), r"no tensor for mlp\.experts\.up of layer 0 of exp"),
        (("attn.wq.weight", "attn.q.weight"), r"attention\.query of layer 0, .*\n.*h\.0\.attn\.q"),
    ],
)
def test_patterns_that_fit_nothing(pattern: tuple[str, str], words: str, tmp_path: Path) -> None:
    directory = write_model(tmp_path / "model", *own_model())
    with pytest.raises(UserError, match=words):
        detect(directory, own_family(tmp_path, pattern))
