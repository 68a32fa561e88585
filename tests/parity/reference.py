"""Compute a small model's results with transformers: float32, eager attention, on the CPU.

Nothing here is of the package. The module imports torch, so tests reach it through the fixture in
`conftest.py`, which makes each shape's reference once.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from tests.parity import weights
from tests.parity.families import (
    COMMON,
    LEARNING_RATE,
    LENGTH,
    NEW_TOKENS,
    PROMPT_LENGTH,
    PROMPTS,
    UPDATES,
    Shape,
)

# On arrays this small, more than one thread is slower.
torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

RENAMED = {"kimi_k25": ("language_model.model.blocks.", "language_model.model.layers.")}
"""Family -> a part of names that transformers saves -> what it is in published files."""

# The part of a router that computes logits, where the whole returns probabilities alone.
ROUTER_LOGITS_OF = {"gemma4": "proj", "gemma4_text": "proj"}

# The position of the logits in that output, or all of it; the other routers return them first.
ROUTER_LOGITS_AT = {"llama4_text": 1, **dict.fromkeys(ROUTER_LOGITS_OF, ...)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """Hold one shape's numbers.

    Attributes:
        directory: what `save_pretrained` writes, with experts one by one if the family does so.
        fused: the same weights as the model holds them, experts stacked.
        inputs: ids [B, S].
        targets: the token after each.
        logits: [B, S, V].
        router_logits: [L, B, S, E], for the layers that have experts.
        ce_loss: mean cross entropy, in nats a token.
        aux_loss: load-balance loss before its weight; None where the family has none.
        loss: the training loss, which includes the weighted auxiliary loss.
        gradients: of `loss`, by the tensor's name in `directory`.
        losses: the loss before each of some updates of plain SGD.
        greedy: ids [prompts, new tokens].
        greedy_without_cache: the same, recomputed from the start in every step.
        margin: least gap between chosen and not chosen experts, and groups.
        greedy_margin: the same over the generated texts, next tokens included.
    """

    directory: Path
    fused: Path
    inputs: np.ndarray
    targets: np.ndarray
    logits: np.ndarray
    router_logits: np.ndarray
    ce_loss: float
    aux_loss: float | None
    loss: float
    gradients: dict[str, np.ndarray]
    losses: list[float]
    greedy: np.ndarray
    greedy_without_cache: np.ndarray
    margin: float
    greedy_margin: float


def make(shape: Shape, folder: Path) -> Reference:
    """Compute one shape's reference.

    Args:
        shape: the model.
        folder: where the model's directories are written.
    """
    directory, fused = folder / "unfused", folder / "fused"
    write(shape, directory)
    model = load(shape, directory)
    model.save_pretrained(fused, save_original_format=False)
    tokens = shape.tokens()
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    found = forward(shape, model, inputs, targets)
    found["loss"].backward()
    gradients = _gradients(model, folder / "gradients")
    prompts = inputs[:PROMPTS, :PROMPT_LENGTH]
    greedy, without = (generate(model, prompts, use_cache=cache) for cache in (True, False))
    return Reference(
        directory=directory,
        fused=fused,
        inputs=inputs,
        targets=targets,
        logits=found["logits"].detach().numpy(),
        router_logits=found["router_logits"],
        ce_loss=found["ce_loss"].item(),
        aux_loss=None if found["aux_loss"] is None else found["aux_loss"].item(),
        loss=found["loss"].item(),
        gradients=gradients,
        losses=_train(shape, directory, inputs, targets),
        greedy=greedy,
        greedy_without_cache=without,
        margin=margin(shape, model, found["router_logits"]),
        greedy_margin=_greedy_margin(shape, model, prompts, greedy),
    )


def write(shape: Shape, directory: Path) -> None:
    """Write a model whose every tensor has the values of `weights.tensor`."""
    config = transformers.AutoConfig.for_model(shape.family, **shape.config)
    _model(config).save_pretrained(directory)
    (path,) = directory.glob("*.safetensors")
    drawn = {
        name: weights.tensor(name, values.shape, shape.seed, shape.zero_centered)
        for name, values in _published(shape.family, weights.read(directory)).items()
    }
    weights.write(path, drawn)


def _published(family: str, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return tensors by the names of published files, where transformers saves others."""
    old, new = RENAMED.get(family, ("", ""))
    return {name.replace(old, new) if old else name: each for name, each in tensors.items()}


def load(shape: Shape, directory: Path) -> Any:
    """Load a directory's model in evaluation mode; no tensor may be missing or unused."""
    model, report = _auto(shape.family).from_pretrained(
        directory, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    rope = (COMMON | shape.settings)["rope_parameters"]
    if rope.get("rope_type") == "longrope" and rope["original_max_position_embeddings"] < LENGTH:
        # In 5.24 this family's rotary module computes its frequencies without the sequence length,
        # and so never uses the long factors. The model's authors do.
        rotary = model.model.rotary_emb
        rotary.rope_init_fn = functools.partial(rotary.rope_init_fn, seq_len=LENGTH)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None  # a family that needs such a token has one that is drawn too
    return model.eval()


def forward(shape: Shape, model: Any, inputs: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
    """Compute logits, router logits and losses of a batch."""
    routers = [m for m in model.modules() if type(m).__name__.lower().endswith(("router", "gate"))]
    if shape.family in ROUTER_LOGITS_OF:
        routers = [getattr(router, ROUTER_LOGITS_OF[shape.family]) for router in routers]
    at = ROUTER_LOGITS_AT.get(shape.family, 0)
    seen: list[torch.Tensor] = []
    hooks = [
        router.register_forward_hook(lambda _module, _args, out: seen.append(out[at].detach()))
        for router in routers
    ]
    balanced = "output_router_logits" in inspect.signature(model.forward).parameters
    given = {"output_router_logits": True} if balanced else {}
    answer = model(
        torch.tensor(inputs),
        labels=torch.tensor(inputs),
        shift_labels=torch.tensor(targets),
        **given,
    )
    for hook in hooks:
        hook.remove()
    aux: Any = answer.aux_loss if balanced else None
    weight = model.config.get_text_config().router_aux_loss_coef if balanced else 0.0
    ce_loss = answer.loss - weight * aux if balanced else answer.loss
    if balanced and _correction_biases(model):
        aux = _balance_of_choices(model, answer.router_logits)
    return {
        "logits": answer.logits,
        "router_logits": np.stack([each.reshape(*inputs.shape, -1).numpy() for each in seen]),
        "ce_loss": ce_loss,
        "aux_loss": aux,
        "loss": ce_loss + weight * aux if balanced else ce_loss,
    }


def _correction_biases(model: Any) -> list[torch.Tensor]:
    """Return the correction bias of each layer with experts, if the family has them."""
    state = model.state_dict()
    ends = ("correction_bias", "expert_bias")
    of_text = {name: bias for name, bias in state.items() if "vision" not in name}
    return [bias.reshape(-1) for name, bias in of_text.items() if name.endswith(ends)]


def _balance_of_choices(model: Any, router_logits: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Compute the auxiliary loss from the experts that tokens really go to.

    transformers counts the k most probable experts, though the router adds its correction bias
    first, to sigmoids in most families: with a bias it balances a load that does not occur.
    """
    config, logits = model.config.get_text_config(), torch.stack(router_logits)
    probs = logits.softmax(dim=-1)
    scores = probs if config.model_type.startswith("ernie") else logits.sigmoid()
    biases = torch.stack(_correction_biases(model))
    scores = scores + biases[:, None]
    groups = getattr(config, "n_group", 1)
    if groups > 1:
        split = scores.unflatten(-1, (groups, -1))
        best = split.topk(2, dim=-1).values.sum(-1)
        kept = torch.zeros_like(best).scatter(-1, best.topk(config.topk_group).indices, 1.0)
        scores = torch.where(kept[..., None] > 0, split, -torch.inf).flatten(-2)
    k, experts = config.num_experts_per_tok, probs.shape[-1]
    load = torch.nn.functional.one_hot(scores.topk(k, dim=-1).indices, experts).sum(-2).float()
    return experts * (probs.mean(dim=(0, 1)) * load.mean(dim=(0, 1))).sum()


def generate(model: Any, prompts: np.ndarray, *, use_cache: bool) -> np.ndarray:
    """Generate the most probable token repeatedly."""
    ids = model.generate(
        torch.tensor(prompts),
        attention_mask=torch.ones(prompts.shape, dtype=torch.int64),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=use_cache,
    )
    return ids[:, prompts.shape[1] :].numpy()


def margin(shape: Shape, model: Any, router_logits: np.ndarray) -> float:
    """Return the least gap between chosen and not chosen experts, over layers and tokens.

    The gap is between logits if only the softmax, which keeps their order, is between them and the
    choice; else between scores. A gap far above rounding makes the choice the same everywhere.
    """
    config = model.config.get_text_config()
    biases = _correction_biases(model)
    gaps = []
    for layer, logits in enumerate(router_logits.astype(np.float64)):
        scores = logits
        if biases:
            exp = np.exp(logits)
            soft = shape.family.startswith("ernie")
            scores = exp / exp.sum(-1, keepdims=True) if soft else exp / (1 + exp)
            scores = scores + biases[layer].numpy()
        groups: Any = getattr(config, "n_group", None)
        kept: Any = getattr(config, "topk_group", None)
        if groups and kept < groups and getattr(config, "topk_method", "") != "greedy":
            split = np.sort(scores.reshape(*scores.shape[:-1], groups, -1), axis=-1)
            best = split[..., -2:].sum(-1) if biases else split[..., -1]
            gaps.append(_gap(best, kept))
            allowed = best >= np.sort(best)[..., -kept, None]
            scores = np.where(np.repeat(allowed, split.shape[-1], axis=-1), scores, -100.0)
        chosen = getattr(config, "top_k_experts", None) or config.num_experts_per_tok
        gaps.append(_gap(scores, chosen))
        jitter = getattr(config, "router_jitter_noise", 0)
        if shape.family == "phimoe":
            best, second = np.sort(logits)[..., -1:], np.sort(logits)[..., -2:-1]
            for top in (best, second):
                away = (top - logits) / np.maximum(np.abs(logits), top)
                gaps.append(np.abs(away - 2 * jitter).min())
    return float(min(gaps))


def _gap(scores: np.ndarray, k: int) -> float:
    order = np.sort(scores)
    return float((order[..., -k] - order[..., -k - 1]).min())


def _auto(family: str) -> Any:
    """Return the class that makes a family's models: of text, or of more than text."""
    causal = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    is_causal = family in causal
    return (
        transformers.AutoModelForCausalLM if is_causal else transformers.AutoModelForImageTextToText
    )


def _model(config: Any) -> Any:
    return _auto(config.model_type).from_config(
        config, attn_implementation="eager", dtype=torch.float32
    )


def _gradients(model: Any, folder: Path) -> dict[str, np.ndarray]:
    """Return the gradients by the checkpoint's names: they are saved as if they were weights."""
    config = model.config
    twin = _model(config)
    given = {name: value.grad for name, value in model.named_parameters()}
    with torch.no_grad():
        for name, value in [*twin.named_parameters(), *twin.named_buffers()]:
            gradient = given.get(name)
            value.copy_(torch.zeros_like(value) if gradient is None else gradient)
    twin.save_pretrained(folder)
    return _published(config.model_type, weights.read(folder))


def _train(shape: Shape, directory: Path, inputs: np.ndarray, targets: np.ndarray) -> list[float]:
    model, losses = load(shape, directory), []
    for _ in range(UPDATES):
        loss = forward(shape, model, inputs, targets)["loss"]
        model.zero_grad()
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for value in model.parameters():
                if value.grad is not None:
                    value -= LEARNING_RATE * value.grad
    return losses


def _greedy_margin(shape: Shape, model: Any, prompts: np.ndarray, greedy: np.ndarray) -> float:
    texts = np.concatenate([prompts, greedy], axis=1)
    with torch.no_grad():
        found = forward(shape, model, texts, texts)
    chosen = found["logits"].numpy()[:, prompts.shape[1] - 1 : -1]
    return min(_gap(chosen, 1), margin(shape, model, found["router_logits"]))
