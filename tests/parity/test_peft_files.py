"""Read an adapter that peft wrote, compute with it, and write it, of experts as gpt_oss has them.

The experts of gpt_oss are one [E in out] tensor whose outputs take turns between gate and up, with
biases; those of other families are compared in `test_fine_tuning.py`.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from moe_shard.autoep.adapter_files import merged_weight, plan_adapters, write_adapters
from moe_shard.autoep.directory import read_hf_source
from moe_shard.autoep.family import load_family
from moe_shard.autoep.host_blocks import leaves_of
from moe_shard.checkpoints.adapters import split_adapters
from moe_shard.checkpoints.resolve import load_model
from moe_shard.models.params import describe
from moe_shard.training.first_params import first_params
from tests.models.build import annotator
from tests.parity import weights
from tests.parity.families import Shape
from tests.parity.package import OVERRIDES, Opened, evaluate

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]

SHAPE = Shape(
    family="gpt_oss", name="adapters", about="adapters", seed=5,
    settings={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "num_local_experts": 4,
              "intermediate_size": 24, "num_experts_per_tok": 2, "sliding_window": 8},
)  # fmt: skip
LORA = ("enable_lora=true", "lora_rank=3", "lora_alpha=6")


def test_interleaved_experts_are_peft_s(tmp_path: Path) -> None:
    peft: Any = importlib.import_module("peft")
    torch: Any = importlib.import_module("torch")
    reference: Any = importlib.import_module("tests.parity.reference")
    base = tmp_path / "model"
    reference.write(SHAPE, base)
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        task_type="CAUSAL_LM",
    )  # fmt: skip
    theirs = peft.get_peft_model(reference.load(SHAPE, base), config).eval()
    for name, value in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.3)
    theirs.save_pretrained(tmp_path / "first")
    tokens = np.random.default_rng(1).integers(0, 64, (8, 16))

    def logits_of(model: Any) -> np.ndarray:
        with torch.no_grad():
            found: np.ndarray = model(torch.tensor(tokens)).logits.numpy()
        return found

    expected = logits_of(theirs)
    given = (*OVERRIDES, *LORA, f"lora_restore_path={tmp_path / 'first'}")
    settings = load_model(str(base), [*given, "ici_expert_parallelism=4"])
    sharding = annotator(settings)
    model = describe(settings.model, sharding)
    params = first_params(settings, model, Console(quiet=True))
    opened = Opened(settings, sharding, model, params)
    assert np.abs(logits_of(reference.load(SHAPE, base).eval()) - expected).max() > 0.1
    found = evaluate(opened, tokens, tokens).logits
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())

    adapters = {
        path: np.asarray(value) for path, value in leaves_of(split_adapters(model).of(params))
    }
    plan = plan_adapters(read_hf_source(base).plan, frozenset(adapters), load_family("gpt_oss"))
    (tmp_path / "ours").mkdir()
    lora = settings.model.lora
    write_adapters(tmp_path / "ours", plan, adapters, lora, base=str(base))
    ours = peft.PeftModel.from_pretrained(reference.load(SHAPE, base), tmp_path / "ours").eval()
    np.testing.assert_array_equal(logits_of(ours), expected)
    first, again = (weights.read(tmp_path / each) for each in ("first", "ours"))
    assert first.keys() == again.keys()

    before = {
        name: value.detach().numpy()
        for name, value in reference.load(SHAPE, base).named_parameters()
    }
    merged = dict(theirs.merge_and_unload().named_parameters())
    name = "model.layers.1.mlp.experts.gate_up_proj"
    delta = merged[name].detach().numpy() - before[name]
    for part, start in (("gate", 0), ("up", 1)):
        of_layer = _delta(adapters, part, delta.shape, lora.scale)
        np.testing.assert_allclose(of_layer, delta[..., start::2], atol=1e-6)


def _delta(adapters: Any, part: str, shape: tuple[int, ...], scale: float) -> np.ndarray:
    """Return what the adapters add to gate or up of the second layer."""
    owner = max(path[:-2] for path in adapters if path[-2] == "inward_lora")
    layers = adapters[(*owner, "inward_lora", "a")].shape[0]
    bounds = ((layers - 1, layers), *((0, size) for size in (*shape[:2], shape[2] // 2)))
    found = merged_weight(adapters, (*owner, part), bounds, scale)
    assert found is not None
    return found[0]
