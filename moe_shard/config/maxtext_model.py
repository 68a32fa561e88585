"""Translate MaxText's model keys, each together with `decoder_block`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_shard.config.keys import shown
from moe_shard.config.maxtext_blocks import (
    BIASED_CHOICE,
    BLOCKS,
    FOR_LOOKING_AT,
    LLAMA31,
    OPTIONAL,
    OTHER_BLOCKS,
    Block,
)
from moe_shard.config.model_config import GATE_ACTIVATIONS
from moe_shard.errors import UserError


@dataclass
class Translation:
    """Hold the result of translating the model keys.

    Attributes:
        values: our key -> value.
        words: notes on what is expressed by other keys, one phrase each.
        unread: keys that the block ignores.
        unbuilt: MaxText's key -> its value, and what it requests that is not built here.
    """

    values: dict[str, Any] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    unbuilt: dict[str, tuple[Any, str]] = field(default_factory=dict)


def translate_model(
    given: Mapping[str, Any], explicit: frozenset[str], name: str, *, is_named: bool
) -> Translation:
    """Translate a MaxText model to our keys.

    Args:
        given: every translated key, with its default in MaxText where it is not set.
        explicit: keys that a file or the command line sets.
        name: the model's name.
        is_named: whether the name is from `model_name`, rather than from the name of a file.

    Raises:
        UserError: MaxText itself would refuse it, or build fewer layers than it states.
    """
    found = Translation()
    kind = given["decoder_block"]
    if kind not in BLOCKS:
        what = OTHER_BLOCKS.get(kind, f"layers of the kind {shown(kind)}")
        found.unbuilt["decoder_block"] = (kind, what)
        found.values["use_indexer"] = False  # of an attention that is not built
    block = BLOCKS.get(kind, Block(has_experts=True, reads=FOR_LOOKING_AT))
    for key, off in OPTIONAL.items():
        if key in block.reads:
            found.values[key] = given[key]
        else:
            found.values[key] = off
            if key in explicit and given[key] != off:
                found.unread.append(key)
    _experts(found, given, explicit, kind, block)
    _router(found, given, explicit, kind, name, is_named)
    _mlp(found, given, kind)
    _attention(found, given, kind, block)
    _positions(found, given, name, kind)
    _ends(found, given)
    if given["dropout_rate"] and given["enable_dropout"]:
        found.unbuilt["dropout_rate"] = (given["dropout_rate"], "dropout")
    if kind in BLOCKS:
        _layers(found, given, kind)
    return found


def _experts(
    found: Translation,
    given: Mapping[str, Any],
    explicit: frozenset[str],
    kind: str,
    block: Block,
) -> None:
    values, experts = found.values, given["num_experts"]
    if not block.has_experts:
        found.unread += [k for k in ("num_experts",) if k in explicit and experts != 1]
        values.update(num_experts=1, num_experts_per_tok=1, shared_experts=0)
        return
    values["num_experts"] = experts
    dense, own = given["base_mlp_dim"], given["base_moe_mlp_dim"]
    values["base_moe_mlp_dim"] = own
    if experts == 1:
        return
    if kind in {"mixtral", "gpt_oss"}:
        # Their experts have the size of a dense MLP; Mixtral's files have to set it twice.
        if kind == "mixtral" and own not in {-1, dense}:
            raise UserError(
                f"decoder_block=mixtral with base_mlp_dim={shown(dense)} and base_moe_mlp_dim="
                f"{shown(own)}: MaxText wants them equal\nfix: base_moe_mlp_dim={shown(dense)}"
            )
        values["base_moe_mlp_dim"] = dense
    if given["sparse_matmul"]:
        values.update(moe_dispatch="ragged", capacity_factor=-1.0)
        found.words.append("sparse_matmul=true: moe_dispatch=ragged, nothing dropped")
        if given["capacity_factor"] > 0:
            found.unread.append("capacity_factor")
    else:
        factor = given["capacity_factor"]
        values.update(moe_dispatch="gather", capacity_factor=factor)
        found.words.append(f"sparse_matmul=false, capacity_factor={factor:g}: moe_dispatch=gather")


def _router(
    found: Translation,
    given: Mapping[str, Any],
    explicit: frozenset[str],
    kind: str,
    name: str,
    is_named: bool,
) -> None:
    values = found.values
    score, biased = given["routed_score_func"] or "", given["routed_bias"]
    values.update(
        routed_score_func="softmax",
        norm_topk_prob=True,
        routed_bias=False,
        router_bias=biased,
        load_balance_loss_type="sequence",
        n_routing_groups=-1,
        topk_routing_group=-1,
    )
    if values["num_experts"] == 1:
        values.update(router_bias=False, routed_bias_update_rate=0.0)
        return
    if kind == "deepseek":
        _deepseek_router(found, given, explicit, score, name, is_named)
        return
    if score:
        what = f"a {shown(score)} of the logits before the weights' own function"
        found.unbuilt["routed_score_func"] = (score, what)
    if kind == "llama4":
        values.update(
            routed_score_func="sigmoid",
            norm_topk_prob=False,
            routed_score_on_input=True,
            load_balance_probs="logits",
        )
        found.words.append("decoder_block=llama4: sigmoid weights on the experts' input")
    elif "norm_topk_prob" in explicit and not given["norm_topk_prob"]:
        # A softmax over the chosen logits equals the normalised softmax over all, whatever the key.
        found.unread.append("norm_topk_prob")
    if biased:
        found.words.append("routed_bias=true: router_bias=true, a bias in the logits")
    found.unread += [
        key
        for key in ("n_routing_groups", "topk_routing_group")
        if key in explicit and given[key] != -1
    ]


def _deepseek_router(
    found: Translation,
    given: Mapping[str, Any],
    explicit: frozenset[str],
    score: str,
    name: str,
    is_named: bool,
) -> None:
    values, biased = found.values, given["routed_bias"]
    if score not in {"softmax", "sigmoid"}:
        what = f"router weights by {shown(score)}" if score else "logits as router weights"
        found.unbuilt["routed_score_func"] = (score, what)
        score = "softmax"
    normed = score == "sigmoid"
    values.update(
        routed_score_func=score,
        norm_topk_prob=normed,
        routed_bias=biased,
        router_bias=False,
        # MaxText's dense path includes the bias in the loss, its sparse path does not.
        load_balance_probs="ranked" if biased and not given["sparse_matmul"] else "softmax",
    )
    if not biased:
        values["routed_bias_update_rate"] = 0.0
    if "norm_topk_prob" in explicit and given["norm_topk_prob"] != normed:
        found.unread.append("norm_topk_prob")
    groups = given["n_routing_groups"], given["topk_routing_group"]
    if not name.startswith(BIASED_CHOICE):
        asks = biased or groups != (-1, -1)
        if is_named and biased:
            what = "weights with the bias in them, as model_name does not begin with deepseek3"
            found.unbuilt["routed_bias"] = (biased, what)
        if is_named and asks:
            found.unread += [key for key in ("n_routing_groups",) if groups[0] != -1]
            return
        if asks:
            found.words.append(
                "routed by biased scores and groups, as under a model_name of deepseek3 there"
            )
    values.update(n_routing_groups=groups[0], topk_routing_group=groups[1])


def _mlp(found: Translation, given: Mapping[str, Any], kind: str) -> None:
    values, activations = found.values, given["mlp_activations"]
    values.update(mlp_activations=activations, mlp_linear_offset=0.0)
    if kind == "gpt_oss":
        if activations == ["sigmoid", "linear"] and given["mlp_activations_limit"] > 0:
            values.update(mlp_activations=["quick_gelu", "linear"], mlp_linear_offset=1.0)
            found.words.append(
                "decoder_block=gpt_oss, mlp_activations=[sigmoid, linear]: mlp_activations="
                "[quick_gelu, linear], mlp_linear_offset=1"
            )
        else:
            found.unbuilt["mlp_activations"] = (activations, "another gate of gpt_oss")
            values["mlp_activations"] = ["silu", "linear"]
    elif activations not in [[name, "linear"] for name in GATE_ACTIVATIONS]:
        found.unbuilt["mlp_activations"] = (activations, "another MLP")
        values["mlp_activations"] = ["silu", "linear"]
    if not values["mlp_activations_limit"] > 0:
        values["mlp_activations_limit"] = -1.0
    if kind == "deepseek" and values["mlp_activations_limit"] > 0 and _other_mlps(values):
        limit = given["mlp_activations_limit"]
        found.unbuilt["mlp_activations_limit"] = (limit, "a clamp of routed experts alone")
    # In MaxText only routed experts have these biases; here all MLPs of the layer do.
    alone = values["num_experts"] == 1 or _other_mlps(values)
    values["mlp_bias"] = given["mlp_bias"] and not alone
    if given["mlp_bias"] and alone:
        if values["num_experts"] == 1:
            found.unread.append("mlp_bias")
        else:
            found.unbuilt["mlp_bias"] = (True, "biases of routed experts alone")


def _other_mlps(values: Mapping[str, Any]) -> bool:
    """Return whether there are MLPs besides the routed experts: shared or in dense layers."""
    dense = values["first_num_dense_layers"] > 0 or values["interleave_moe_layer_step"] > 1
    return dense or values["shared_experts"] > 0


def _attention(found: Translation, given: Mapping[str, Any], kind: str, block: Block) -> None:
    values, form = found.values, given["attention_type"]
    latent = kind == "deepseek"
    values.update(
        attention_type="mla" if latent else "global",
        attention_pattern=["global"],
        attention_out_bias=kind == "gpt_oss" and given["attention_bias"],
        attention_sink=given["attention_sink"],
        qk_norm_type="head",
        attention_scale=-1.0 if block.scales else 1.0,
    )
    if latent:
        values["latent_norm_epsilon"] = given["normalization_layer_epsilon"]
        if given["attention_sink"]:
            found.unbuilt["attention_sink"] = (True, "attention sinks with latent attention (MLA)")
            values["attention_sink"] = False
    if form != values["attention_type"]:
        if latent or form not in {"local_sliding", "chunk", "full"} or kind not in BLOCKS:
            found.unbuilt["attention_type"] = (form, f"attention_type {shown(form)} in its blocks")
        else:
            found.unread.append("attention_type")
    if kind == "gpt_oss":
        values["attention_pattern"] = ["sliding", "global"]
        found.words.append("decoder_block=gpt_oss: attention_pattern=[sliding, global]")
    if kind == "llama4":
        values["qk_norm_type"] = "l2"
        interval = given["nope_layer_interval"]
        spans = ["chunked"] * (interval - 1) + ["global"] if 0 < interval < 1000 else ["chunked"]
        values.update(attention_pattern=spans, nope_layer_interval=max(interval, 0) or -1)
        found.words.append(f"decoder_block=llama4: attention_pattern={shown(spans)}")
    if not block.scales:
        found.words.append(f"decoder_block={kind}: attention_scale=1, queries begin small")


def _positions(found: Translation, given: Mapping[str, Any], name: str, kind: str) -> None:
    values, form = found.values, given["rope_type"]
    if name.startswith("llama3.1") or form.startswith("llama3.1"):
        scaled = given["rope_use_scale"]
        values.update(rope_type="llama3.1" if scaled else "default", rope_interleave=True)
        if scaled:
            values.update(LLAMA31)
        found.words.append(
            f"rope_type={form}, rope_use_scale={shown(scaled)}: rope_type={values['rope_type']}"
            f"{', rope_factor=8 of 8192 positions' if scaled else ''}, rope_interleave=true"
        )
    elif form == "yarn":
        values.update(
            rope_type="yarn",
            rope_interleave=given["rope_interleave"],
            rope_factor=given["rope_factor"],
            rope_attention_scaling=given["rope_attention_scaling"],
        )
    elif form == "default":
        values.update(rope_type="default", rope_interleave=False)
    else:
        found.unbuilt["rope_type"] = (form, f"rope_type {shown(form)}")
    if kind == "deepseek":
        _latent_scale(found, given)


def _latent_scale(found: Translation, given: Mapping[str, Any]) -> None:
    """Translate the factor of MLA's scores: stretched wherever a key says that positions are."""
    values, factor = found.values, given["rope_factor"]
    is_yarn = values.get("rope_type") == "yarn"
    stretched = given["max_position_embeddings"] > given["original_max_position_embeddings"]
    values["mscale"] = given["mscale"] if stretched and is_yarn else 0.0
    dim = given["qk_nope_head_dim"] + given["qk_rope_head_dim"]
    if stretched and not is_yarn and factor > 0 and dim > 0:
        scale = (0.1 * given["mscale"] * math.log(factor) + 1) ** 2 / math.sqrt(dim)
        values["attention_scale"] = scale
        found.words.append(f"mscale={given['mscale']:g} without yarn: attention_scale={scale:.6g}")


def _ends(found: Translation, given: Mapping[str, Any]) -> None:
    """Translate the keys of the logits; MaxText normalises and caps only those of a tied table."""
    tied, dim = given["logits_via_embedding"], given["base_emb_dim"]
    cap = given["final_logits_soft_cap"]
    found.values["final_logits_soft_cap"] = cap if tied else 0.0
    if cap and not tied:
        found.unread.append("final_logits_soft_cap")
    scaling = math.sqrt(dim) if tied and given["normalize_embedding_logits"] and dim > 0 else 1.0
    found.values["logits_scaling"] = scaling
    if scaling != 1:
        found.words.append(
            f"logits_via_embedding, normalize_embedding_logits: logits_scaling={scaling:.6g}"
        )


def _layers(found: Translation, given: Mapping[str, Any], kind: str) -> None:
    """Refuse a scan in which MaxText would build other layers than the keys state.

    MaxText scans blocks of `inhomogeneous_layer_cycle_interval` layers, numbers the layers of each
    block from 0, and leaves out layers that do not fill a whole block.
    """
    values, cycle = found.values, given["inhomogeneous_layer_cycle_interval"]
    if kind == "deepseek" or not given["scan_layers"]:
        return
    wanted: Callable[..., int] = math.lcm
    period = {
        "gpt_oss": 2,
        "llama4": wanted(
            max(values["nope_layer_interval"], 1), max(values["interleave_moe_layer_step"], 1)
        ),
    }.get(kind, 1)
    key, layers = "inhomogeneous_layer_cycle_interval", given["base_num_decoder_layers"]
    alike = kind not in {"gpt_oss", "llama4"}
    if cycle < 1 or cycle % period or (alike and cycle != 1):
        raise UserError(
            f"{key}={cycle}: MaxText would scan decoder_block={kind} in blocks of {cycle}, and its "
            f"layers repeat every {period}\nfix: {key}={period}, or scan_layers=false"
        )
    if layers % cycle:
        raise UserError(
            f"base_num_decoder_layers={layers} is no multiple of {key}={cycle}: MaxText builds "
            f"{layers // cycle * cycle}\nfix: base_num_decoder_layers={layers // cycle * cycle}"
        )
