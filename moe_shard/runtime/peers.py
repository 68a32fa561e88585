"""Prepare the training steps of other packages on the work of a configuration, to compare with.

MaxText runs in this process, under the same XLA: its own functions make the configuration, the
state and the step. transformers runs on torch, on the device that torch has. Neither is needed by
the package: where one is not installed, or does not have the model, a line says so.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import jax

from moe_shard.config import Config
from moe_shard.runtime.step_bench import Contender, StepFacts, facts_of_text, host_batch

_SAME_NAME = (
    *("vocab_size", "head_dim", "base_num_query_heads", "base_num_kv_heads", "base_emb_dim"),
    *("base_mlp_dim", "base_moe_mlp_dim", "base_num_decoder_layers", "num_experts"),
    *("num_experts_per_tok", "capacity_factor", "per_device_batch_size", "max_target_length"),
    *("dtype", "weight_dtype", "ici_data_parallelism", "ici_fsdp_parallelism"),
    *("ici_fsdp_transpose_parallelism", "ici_tensor_parallelism", "ici_context_parallelism"),
    *("ici_expert_parallelism", "rope_max_timescale", "load_balance_loss_weight", "learning_rate"),
    *("adam_b1", "adam_b2", "adam_eps", "adam_weight_decay", "gradient_clipping_threshold"),
)
"""Keys with one name and one meaning here and in MaxText."""
_PLAIN = {
    "attention_type": "global",
    "attention_bias": False,
    "attention_sink": False,
    "attn_logits_soft_cap": 0.0,
    "clip_qkv": -1.0,
    "mlp_bias": False,
    "normalization_type": "rms",
    "norm_placement": "input",
    "rope_type": "default",
    "routed_score_func": "softmax",
    "router_bias": False,
    "routed_bias": False,
    "shared_experts": 0,
    "first_num_dense_layers": 0,
    "interleave_moe_layer_step": 1,
    "logits_via_embedding": False,
    "gradient_accumulation_steps": 1,
    "optimizer": "adamw",
    "enable_lora": False,
    "trainable_parameters_mask": [],
}
"""What a model must be to be one of the peers' Mixtrals: key -> value."""
_FLAG = "moe_dispatch_no_expert_sharding"


def why_not_plain(config: Config, **also: Any) -> str:
    """Return the first key by which a model is not a plain Mixtral; "" where it is one."""
    flat = config.as_flat_dict()
    if config.model.moe is None:
        return "num_experts=1"
    for key, wanted in (_PLAIN | also).items():
        if flat[key] != wanted:
            return f"{key}={flat[key]}"
    return ""


def maxtext_step(config: Config) -> Contender | str:
    """Prepare MaxText's step; return the reason in a line where there is none.

    Its dense path, as only that compiles on every device and has the flag; dropless runs at its
    capacity for all tokens. Remat keeps nothing, or everything where `remat_policy` is none.
    """
    if find_spec("maxtext") is None:
        return "MaxText is not installed"
    if (key := why_not_plain(config, use_qk_norm=False)) != "":
        return f"MaxText is left out: its Mixtral cannot have {key}"
    os.environ.setdefault("DECOUPLE_GCLOUD", "TRUE")
    flat = config.as_flat_dict()
    remat = "minimal" if flat["remat_policy"] == "none" else "full"
    keys = {name: flat[name] for name in _SAME_NAME} | {
        "model_name": "mixtral-8x7b",
        "override_model_config": True,
        "sparse_matmul": False,
        _FLAG: True,
        "remat_policy": remat,
        "hardware": "cpu" if jax.default_backend() == "cpu" else jax.default_backend(),
        "attention": "dot_product" if jax.default_backend() == "cpu" else "autoselected",
        "dataset_type": "synthetic",
        "steps": 1000,
        "run_name": "bench",
    }
    off = ("log_config", "enable_checkpointing", "enable_goodput_recording", "monitor_goodput")
    keys |= dict.fromkeys(off, False) | {"skip_jax_distributed_system": True}
    # What it prints meanwhile is its own, and the command prints one object.
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        written = [f"{key}={_written(value)}" for key, value in keys.items()]
        step, facts = _maxtext_program(config, [*written, f"base_output_directory={folder}"])
    remark = f"remat {remat}, attention {keys['attention']}, flag on"
    return Contender("MaxText", f"maxtext {version('maxtext')}", step, facts, remark)


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _maxtext_program(config: Config, keys: list[str]) -> tuple[Callable[[], float], StepFacts]:
    nnx = importlib.import_module("flax.nnx")
    rules = importlib.import_module("flax.core.spmd").logical_axis_rules
    pyconfig = importlib.import_module("maxtext.configs.pyconfig")
    train = importlib.import_module("maxtext.trainers.pre_train.train")
    sharding = importlib.import_module("maxtext.utils.sharding")
    utils = importlib.import_module("maxtext.utils.train_utils")
    assert pyconfig.__file__ is not None
    base = os.path.join(os.path.dirname(pyconfig.__file__), "base.yml")
    theirs = pyconfig.initialize(["", base, *keys])
    made = utils.setup_train_loop(theirs, None)
    shardings, mesh, train_state = made[2], made[4], made[10]
    graph, state = nnx.split(train_state)
    params, shardings = sharding.maybe_update_params_sharding_with_opt(theirs, shardings)
    own = host_batch(config, jax.device_count())
    batch = {
        "inputs": own["inputs"],
        "targets": own["targets"],
        **dict.fromkeys(("inputs_position", "targets_position"), own["positions"]),
        **dict.fromkeys(("inputs_segmentation", "targets_segmentation"), own["segment_ids"]),
    }
    with jax.set_mesh(mesh), rules(theirs.logical_axis_rules):
        jitted, _ = utils.jit_train_and_eval_step(
            theirs, graph, mesh, state, shardings, train.train_step, params_shardings=params
        )
        started = time.perf_counter()
        compiled = jitted.lower(state, batch).compile()
        seconds = time.perf_counter() - started
        placed = jax.device_put(batch, compiled.input_shardings[0][1])
    states = [jax.device_put(state, compiled.input_shardings[0][0])]

    def step() -> float:
        new, metrics = compiled(states.pop(), dict(placed))
        states.append(jax.block_until_ready(new))
        return float(metrics["scalar"]["learning/loss"])

    return step, facts_of_text(config, compiled, seconds)


def transformers_step(config: Config) -> Contender | str:
    """Prepare a step of transformers on torch; return the reason in a line where there is none.

    Its experts are dropless, and all sequences are on torch's one device.
    """
    try:
        torch: Any = importlib.import_module("torch")
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        return f"transformers on torch is left out: {error}"
    on_gpu = torch.cuda.is_available()
    if on_gpu and jax.device_count() > 1:
        return f"transformers on torch is left out: one device, not {jax.device_count()}"
    moe = config.model.moe
    normalised = config.as_flat_dict()["use_qk_norm"]
    qk_norm = {"use_qk_norm": True, "qk_norm_type": "projection"} if normalised else {}
    key = why_not_plain(config, **qk_norm)
    if key or moe is None:
        return f"transformers on torch is left out: its Mixtral and Olmoe cannot have {key}"
    attention = config.model.attention
    sizes = {
        "vocab_size": config.model.vocab_size,
        "hidden_size": config.model.emb_dim,
        "intermediate_size": moe.moe_mlp_dim,
        "num_hidden_layers": config.model.num_decoder_layers,
        "num_attention_heads": attention.num_query_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "num_experts_per_tok": moe.num_experts_per_tok,
        "max_position_embeddings": config.train.max_target_length,
        "output_router_logits": True,
        "router_aux_loss_coef": moe.load_balance_loss_weight,
        "use_cache": False,
    }
    if normalised:
        family, model = transformers.OlmoeConfig, transformers.OlmoeForCausalLM
        made = family(num_experts=moe.num_experts, **sizes)
    else:
        family, model = transformers.MixtralConfig, transformers.MixtralForCausalLM
        made = family(num_local_experts=moe.num_experts, **sizes)
    made._attn_implementation = "sdpa"
    return _torch_contender(config, torch, model, made, "cuda" if on_gpu else "cpu")


def _torch_contender(config: Config, torch: Any, model: Any, made: Any, device: str) -> Contender:
    with torch.device(device):
        network = model(made)
    experts = "as they come"
    if device == "cuda":  # the grouped kernel is slow on a CPU
        with contextlib.suppress(AttributeError, ValueError, ImportError):
            network.set_experts_implementation("grouped_mm")
            experts = "grouped_mm"
    network.train()
    update = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=device == "cuda")
    own = host_batch(config, jax.device_count())
    ids = torch.tensor(own["inputs"], dtype=torch.long, device=device)
    dtype = getattr(torch, config.model.dtype)

    def step() -> float:
        mixed = dtype != torch.float32
        with torch.autocast(device, dtype=dtype) if mixed else contextlib.nullcontext():
            loss = network(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        update.step()
        update.zero_grad(set_to_none=True)
        return float(loss.detach())  # waits for the device

    try:
        release = f"transformers {version('transformers')}, torch {torch.__version__}"
    except PackageNotFoundError:  # a checkout that is on the path
        release = f"torch {torch.__version__}"
    remark = f"one device, dropless, experts {experts}, nothing recomputed"
    return Contender("transformers", release, step, StepFacts(), remark)
