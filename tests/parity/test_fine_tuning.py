"""Fine-tune with transformers and peft, and here: ten losses, merged weights, adapters in peft.

Conversations are longer than half a sequence, so that each has a sequence of its own and an update
has all of them, whatever the order; two microbatches have unlike numbers of targets.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_shard.checkpoints.imported import export_model
from moe_shard.checkpoints.resolve import load_model
from moe_shard.terminal import Console
from moe_shard.training.run import run
from tests.data.chats import CHATML, chat_tokenizer, said, write_chats
from tests.parity import weights
from tests.parity.families import Shape
from tests.parity.package import evaluate, open_model

pytestmark = [
    pytest.mark.parity,
    # peft 0.21 asks for an attribute by the name that it had before transformers 5.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]

LENGTH, STEPS, RATE, DECAY, AUX = 160, 10, 3e-3, 0.1, 0.5
SHAPES = {
    "mixtral": {"num_local_experts": 8, "intermediate_size": 48, "router_aux_loss_coef": 0.0},
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 24, "intermediate_size": 48,
                  "num_experts_per_tok": 2, "head_dim": 8, "router_aux_loss_coef": 0.0},
}  # fmt: skip
WORDS = ("ok", "the reply", "of nine", "letters and more", "and", "so on")


def shape(family: str) -> Shape:
    common = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "vocab_size": 288}  # fmt: skip
    return Shape(family=family, name="chat", about="chat", settings=common | SHAPES[family], seed=3)


def prepare(folder: Path, family: str) -> list[list[dict[str, Any]]]:
    """Write a model, a tokenizer and conversations; return these."""
    reference = importlib.import_module("tests.parity.reference")
    reference.write(shape(family), folder / "model")
    chat_tokenizer(folder / "tokenizer", CHATML)
    draw = np.random.default_rng(0)
    chats = []
    for _ in range(16):
        turns = [" ".join(draw.choice(WORDS, n)) for n in draw.integers(2, 4, 4)]
        chats.append([said(("user", "assistant")[n % 2], turn) for n, turn in enumerate(turns)])
    write_chats(folder / "chats.jsonl", [{"messages": each} for each in chats])
    return chats


def ours(folder: Path, name: str, *more: str) -> list[float]:
    """Train; return the loss before each update."""
    config = load_model(str(folder / "model"), [
        f"dataset_path={folder / 'chats.jsonl'}", "use_sft=true",
        f"tokenizer_path={folder / 'tokenizer'}", f"max_target_length={LENGTH}", f"steps={STEPS}",
        "gradient_accumulation_steps=2", "ici_expert_parallelism=4", "num_simulated_devices=8",
        "dtype=float32", "weight_dtype=float32", f"learning_rate={RATE}",
        "warmup_steps_fraction=0", "learning_rate_final_fraction=1", "adam_decay_vectors=true",
        "gradient_clipping_threshold=0", f"adam_weight_decay={DECAY}",
        "load_balance_loss_weight=0", "enable_tensorboard=false", "jax_cache_dir=",
        f"base_output_directory={folder}", f"run_name={name}", *more,
    ])  # fmt: skip
    run(config)
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def tokens_and_labels(
    folder: Path, chats: list[list[dict[str, Any]]]
) -> tuple[list[tuple[Any, Any]], int]:
    """Return the tokens [1 S] of each conversation with the labels of all but the last.

    The number is how many are trained on in all.
    """
    torch = importlib.import_module("torch")
    tokenizer = importlib.import_module("transformers").AutoTokenizer.from_pretrained(
        folder / "tokenizer"
    )

    def ids(messages: Any, *, prompt: bool = False) -> list[int]:
        found = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, add_generation_prompt=prompt
        )
        tokens: list[int] = found["input_ids"]
        return tokens

    examples = []
    for chat in chats:
        tokens = ids(chat)
        assert LENGTH / 2 < len(tokens) <= LENGTH, len(tokens)
        labels = [-100] * len(tokens)
        for turn in range(1, len(chat), 2):
            start, end = len(ids(chat[:turn], prompt=True)), len(ids(chat[: turn + 1]))
            labels[start:end] = tokens[start:end]
        examples.append((torch.tensor([tokens]), torch.tensor(labels[1:])))
    return examples, sum(int((labels != -100).sum()) for _, labels in examples)


def theirs(model: Any, folder: Path, chats: list[list[dict[str, Any]]]) -> list[float]:
    """Train the parameters of a torch model that have gradients; return the losses."""
    torch = importlib.import_module("torch")
    examples, total = tokens_and_labels(folder, chats)
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=DECAY)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        sums = 0.0
        for tokens, labels in examples:
            logits = model(tokens).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / total
            loss.backward()
            sums += loss.item()
        losses.append(sums)
        optimizer.step()
    return losses


def load(folder: Path, family: str) -> Any:
    reference = importlib.import_module("tests.parity.reference")
    return reference.load(shape(family), folder / "model").train()


def assert_alike(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5 * np.abs(value).max(), rtol=0,
                                   err_msg=name)  # fmt: skip


FAMILIES = ["mixtral", pytest.param("qwen3_moe", marks=pytest.mark.parity_all)]


@pytest.mark.parametrize("family", FAMILIES)
def test_sft(tmp_path: Path, family: str) -> None:
    chats = prepare(tmp_path, family)
    expected = theirs(load(tmp_path, family), tmp_path, chats)
    assert expected[-1] < expected[0] - 0.5
    found = ours(tmp_path, "sft", "enable_checkpointing=false")
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_balance_of_experts_is_of_tokens_that_are_not_padding(
    tmp_path: Path, family: str
) -> None:
    """Transformers' auxiliary loss of a padded batch, with its attention mask, and its gradient."""
    torch = importlib.import_module("torch")
    chats, model = prepare(tmp_path, family), load(tmp_path, family)
    examples, total = tokens_and_labels(tmp_path, chats)
    rows, labels = (torch.full((len(chats), LENGTH), fill) for fill in (0, -100))
    mask = torch.zeros((len(chats), LENGTH), dtype=torch.long)
    for row, (tokens, aims) in enumerate(examples):
        size = tokens.shape[1]
        rows[row, :size], mask[row, :size], labels[row, : size - 1] = tokens[0], 1, aims
    assert mask.float().mean() < 0.9
    model.router_aux_loss_coef = AUX
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=DECAY
    )
    expected = []
    for _ in range(3):
        optimizer.zero_grad()
        found = model(rows, attention_mask=mask, output_router_logits=True)
        ce = torch.nn.functional.cross_entropy(found.logits.flatten(0, 1), labels.flatten(),
                                               reduction="sum") / total  # fmt: skip
        loss = ce + AUX * found.aux_loss
        loss.backward()
        expected.append((loss.item(), AUX * found.aux_loss.item()))
        optimizer.step()
    ours(tmp_path, "aux", "enable_checkpointing=false", "gradient_accumulation_steps=1",
         "per_device_batch_size=2", "steps=3", f"load_balance_loss_weight={AUX}",
         "load_balance_loss_type=huggingface")  # fmt: skip
    lines = map(json.loads, (tmp_path / "aux" / "metrics.jsonl").read_text().splitlines())
    found = [(line["loss"], line["aux_loss"]) for line in lines]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_lora(tmp_path: Path, family: str) -> None:
    peft: Any = importlib.import_module("peft")
    torch = importlib.import_module("torch")
    chats = prepare(tmp_path, family)
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = peft.get_peft_model(load(tmp_path, family), config)
    model.save_pretrained(tmp_path / "first")
    expected = theirs(model, tmp_path, chats)
    assert expected[-1] < expected[0] - 0.2
    lora = ("enable_lora=true", "lora_rank=4", "lora_alpha=8")
    found = ours(tmp_path, "lora", *lora, f"lora_restore_path={tmp_path / 'first'}")
    np.testing.assert_allclose(found, expected, rtol=1e-4)

    console = Console(quiet=True)
    export_model(tmp_path / "lora", tmp_path / "adapter", console=console)
    export_model(tmp_path / "lora", tmp_path / "merged", console=console, merge=True)
    with_ours = peft.PeftModel.from_pretrained(load(tmp_path, family), tmp_path / "adapter")
    tokens = np.random.default_rng(1).integers(0, 288, (8, 16))
    with torch.no_grad():
        logits = with_ours.eval()(torch.tensor(tokens)).logits.numpy()
    opened = open_model(tmp_path / "merged", 4)
    found_logits = evaluate(opened, tokens, tokens).logits
    np.testing.assert_allclose(found_logits, logits, atol=2e-5 * np.abs(logits).max())
    model.merge_and_unload().save_pretrained(tmp_path / "theirs")
    assert_alike(weights.read(tmp_path / "merged"), weights.read(tmp_path / "theirs"))
