"""Evaluate on held-out text: the numbers are NumPy's on every mesh, and a kill changes none."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from moe_shard.checkpoints.checkpoint import Checkpointer
from moe_shard.config import Config, DataConfig
from moe_shard.config.eval_config import EvalConfig
from moe_shard.data.documents import find_documents
from moe_shard.data.held_out import HeldOutText, held_out_texts
from moe_shard.data.split import split_documents
from moe_shard.errors import Finding, UserError
from moe_shard.program.step import Program, make_program
from moe_shard.training.held_out_loss import HeldOutLoss
from tests.checkpoints.test_damage import state_of
from tests.checkpoints.test_full_disk import files_of_at_most
from tests.models.build import NO_DROPS, annotator, random_params, small_config

TOKENS = 16  # of a sequence; 8 sequences a batch
KEYS = ("base_num_decoder_layers=1", "vocab_size=320", NO_DROPS)


def write(folder: Path) -> None:
    (folder / "run").mkdir()
    folder = folder / "text"
    folder.mkdir()
    rng = np.random.default_rng(3)
    for name, size in (("a.txt", 200), ("b.txt", 90), ("c.txt", 410)):
        (folder / name).write_bytes(bytes(rng.integers(32, 127, size).tolist()))


def texts(config: Config, program: Program, paths: Sequence[str]) -> tuple[HeldOutText, ...]:
    return held_out_texts(
        DataConfig(eval_dataset_path=tuple(paths)),
        vocab_size=config.model.vocab_size,
        seq_len=TOKENS,
        rows=8,
        most=-1,
        sharding=program.batch_sharding,
    )


def evaluated(folder: Path, mesh: dict[str, int]) -> tuple[list[Any], Any]:
    config = small_config(mesh, *KEYS)
    program = make_program(config, annotator(config))
    params = random_params(config)
    found = texts(config, program, [f"both={folder}/text", str(folder / "text" / "c.txt")])
    run = folder / "run"
    evaluation = HeldOutLoss(
        EvalConfig(eval_interval=2), found, program, run, first=0, say=lambda _: None
    )
    places = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state.params)
    state: Any = SimpleNamespace(params=jax.device_put(params, places))
    assert evaluation.run(state, 2)
    lines = (run / "eval.jsonl").read_text().splitlines()
    (run / "eval.jsonl").unlink()

    def logits(inputs: Any, positions: Any, segments: Any) -> Any:
        return program.model.apply(state.params)(inputs, positions, segments)[0]

    return [json.loads(line) for line in lines], jax.jit(logits)


def test_loss_and_bits_are_those_of_numpy(tmp_path: Path) -> None:
    write(tmp_path)
    records, logits = evaluated(tmp_path, {"data": 8})
    assert [each["dataset"] for each in records] == ["both", "c"]
    # One document: a mark and its bytes, cut by hand. Sequences overlap by a token.
    text = [256, *(tmp_path / "text" / "c.txt").read_bytes()]
    count = (len(text) - 1) // TOKENS // 8 * 8
    rows = np.array([text[i * TOKENS : (i + 1) * TOKENS + 1] for i in range(count)])
    inputs, targets = rows[:, :-1].astype(np.int32), rows[:, 1:]
    positions = np.broadcast_to(np.arange(TOKENS, dtype=np.int32), inputs.shape)
    losses = []
    for at in range(0, count, 8):
        part = slice(at, at + 8)
        out = logits(inputs[part], positions[part], np.ones_like(inputs[part]))
        scores = np.asarray(out, np.float64)
        largest = scores.max(axis=-1)
        normalizer = largest + np.log(np.exp(scores - largest[..., None]).sum(axis=-1))
        chosen = np.take_along_axis(scores, targets[part][..., None], axis=-1)[..., 0]
        losses.append((normalizer - chosen).mean())
    loss = float(np.mean(losses))
    record = records[1]
    assert record["tokens"] == count * TOKENS
    assert record["loss"] == pytest.approx(loss, rel=1e-6)
    assert record["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert record["bits_per_byte"] == pytest.approx(loss / math.log(2) * 411 / 410, rel=1e-6)


def test_the_numbers_do_not_depend_on_the_expert_axis(tmp_path: Path) -> None:
    # Documents packed into a sequence attend to themselves on every mesh.
    write(tmp_path)
    first, *others = [
        evaluated(tmp_path, {"expert": experts, "data": 8 // experts})[0]
        for experts in (1, 2, 4, 8)
    ]
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=2e-6)
            assert a["tokens"] == b["tokens"]


class Scripted(HeldOutLoss):
    """Evaluate to losses that a test writes."""

    losses: tuple[float, ...] = ()

    def _loss(self, state: Any, text: HeldOutText) -> float:
        assert text.name == "t"
        return float(state)


def scripted(
    folder: Path,
    config: EvalConfig,
    losses: Sequence[float],
    first: int = 0,
    saved: Collection[int] = range(100),
    show: Any = len,
) -> Scripted:
    text: Any = SimpleNamespace(name="t", tokens=10, bytes_per_token=1.0)
    checkpointer: Any = SimpleNamespace(complete=lambda: saved, when_saved=[])
    program: Any = SimpleNamespace()
    evaluation = Scripted(
        config, (text,), program, folder, first=first, checkpointer=checkpointer, say=len, show=show
    )
    for at, loss in enumerate(losses, first // 2 + 1):
        state: Any = loss
        evaluation.run(state, 2 * at)
    return evaluation


def test_a_killed_run_has_the_records_and_the_end_of_one_that_was_not(tmp_path: Path) -> None:
    losses = [4.0, 3.0, 3.5, math.nan, 3.2]
    config = EvalConfig(eval_interval=2, eval_patience=3)
    whole = scripted(tmp_path, config, losses)
    files = [(tmp_path / name).read_text() for name in ("eval.jsonl", "best.json")]
    assert json.loads(files[1]) == {"step": 4, "loss": 3.0, "checkpoint": "checkpoints/4"}
    assert whole.end is not None
    assert "after step 4, for 3 evaluations" in whole.end
    for done in range(5):
        scripted(tmp_path, config, [*losses[:done], 1.0])  # and killed: 1.0 is of a later update
        again = scripted(tmp_path, config, losses[done:], first=2 * done)
        assert [(tmp_path / name).read_text() for name in ("eval.jsonl", "best.json")] == files
        assert again.end == whole.end
        (tmp_path / "eval.jsonl").unlink()


def best(folder: Path) -> Any:
    return json.loads((folder / "best.json").read_text())


def test_only_a_complete_checkpoint_is_named_the_best(tmp_path: Path) -> None:
    config = EvalConfig(eval_interval=2)
    saved: set[int] = set()
    evaluation = scripted(tmp_path, config, [4.0], saved=saved)
    checkpointer: Any = evaluation._checkpointer
    assert best(tmp_path) == {"step": 2, "loss": 4.0, "checkpoint": None}
    saved.add(2)
    checkpointer.when_saved[0]()
    assert best(tmp_path) == {"step": 2, "loss": 4.0, "checkpoint": "checkpoints/2"}
    for updates, loss in ((4, 3.0), (6, 3.5)):
        state: Any = loss
        evaluation.run(state, updates)
        # The one that is named stays until the better one is complete, which here it never is.
        assert best(tmp_path)["checkpoint"] == "checkpoints/2"
        assert checkpointer.to_keep() == {2, 4}
    saved.add(6)
    checkpointer.when_saved[0]()
    assert best(tmp_path) == {"step": 6, "loss": 3.5, "checkpoint": "checkpoints/6"}
    # Also by a start that does not evaluate, and finds it set aside as damaged.
    checkpointer.when_saved.clear()
    idle = HeldOutLoss(
        EvalConfig(eval_patience=1), (), SimpleNamespace(), tmp_path,  # type: ignore[arg-type]
        first=6, checkpointer=checkpointer, say=len,
    )  # fmt: skip
    assert checkpointer.to_keep() == {6, 4}
    assert idle.end is None
    saved.remove(6)
    checkpointer.when_saved[0]()
    assert best(tmp_path)["checkpoint"] == "checkpoints/2"


def test_the_best_checkpoint_stays_however_old(tmp_path: Path) -> None:
    state, folder = state_of(1), tmp_path / "checkpoints"
    config = small_config({"data": 8}, "max_num_checkpoints_to_keep=1")
    checkpointer = Checkpointer(folder, config)
    text: Any = SimpleNamespace(name="t", tokens=10, bytes_per_token=1.0)
    program: Any = SimpleNamespace()
    seen = []
    evaluation = Scripted(
        EvalConfig(eval_interval=1), (text,), program, tmp_path,
        first=0, checkpointer=checkpointer, say=len,
    )  # fmt: skip
    for updates, loss in enumerate((4.0, 3.0, 3.5, 3.2, 2.0, 2.5), 1):
        value: Any = loss
        evaluation.run(value, updates)
        checkpointer.save(state, updates=updates)
        assert (tmp_path / (best(tmp_path)["checkpoint"] or "checkpoints")).is_dir()
        checkpointer.finish()
        kept = {int(path.name) for path in folder.iterdir()}
        seen.append((best(tmp_path)["step"], kept))
    # What was named until now goes only with the save after the one that replaced it.
    assert seen == [(1, {1}), (2, {1, 2}), (2, {2, 3}), (2, {2, 4}), (5, {2, 5}), (5, {5, 6})]
    checkpointer.close()


def test_a_disk_that_refuses_is_said_and_written_later(tmp_path: Path) -> None:
    said: list[str] = []
    evaluation = scripted(tmp_path, EvalConfig(eval_interval=2), [4.0])
    evaluation._say = said.append
    whole = (tmp_path / "eval.jsonl").read_text()
    state: Any = 3.0
    with files_of_at_most(10):
        evaluation.run(state, 4)
        evaluation.run(state, 6)
        with pytest.raises(Finding, match=r"eval\.jsonl: File too large"):
            evaluation.finish()
    refusals = [each for each in said if "cannot write" in each]
    assert [len(each.splitlines()) for each in refusals] == [2]
    assert (tmp_path / "eval.jsonl").read_text() == whole
    assert best(tmp_path)["step"] == 2
    evaluation.finish()
    assert len((tmp_path / "eval.jsonl").read_text().splitlines()) == 3
    assert best(tmp_path)["step"] == 4


def test_each_evaluation_is_passed_on(tmp_path: Path) -> None:
    shown: list[Any] = []
    scripted(tmp_path, EvalConfig(eval_interval=2), [4.0, 3.0], show=shown.append)
    assert [[(each["step"], each["loss"]) for each in one] for one in shown] == [
        [(2, 4.0)], [(4, 3.0)],
    ]  # fmt: skip


def test_a_target_ends_the_run(tmp_path: Path) -> None:
    config = EvalConfig(eval_interval=2, target_eval_loss=3.0)
    assert scripted(tmp_path, config, [4.0, 3.1]).end is None
    (tmp_path / "eval.jsonl").unlink()
    assert "has reached target_eval_loss=3" in (scripted(tmp_path, config, [4.0, 3.0]).end or "")


def test_held_out_documents_are_not_trained_on(tmp_path: Path) -> None:
    for name in range(40):
        (tmp_path / f"{name:02}.txt").write_text("text")
    path = (str(tmp_path),)
    split = split_documents(DataConfig(dataset_path=path, eval_holdout_fraction=0.1))
    assert len(split.held_out) == 4
    assert sorted([*split.training, *split.held_out]) == sorted(find_documents(path))
    assert len(split_documents(DataConfig(dataset_path=path)).held_out) == 0
    with pytest.raises(UserError, match="one part is empty"):
        split_documents(DataConfig(dataset_path=path, eval_holdout_fraction=0.001))


def test_what_cannot_be_evaluated_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"eval_holdout_fraction=0\.05 of dataset_path"):
        small_config({"data": 8}, "eval_interval=5")
    config = small_config({"data": 8}, *KEYS)
    program = make_program(config, annotator(config))
    (tmp_path / "short.txt").write_text("x" * 50)
    with pytest.raises(UserError, match="a batch takes 8"):
        texts(config, program, [str(tmp_path / "short.txt")])
    with pytest.raises(UserError, match="two datasets short"):
        texts(config, program, [str(tmp_path / "short.txt")] * 2)


class Running:
    """Stand for a result that a device computes until somebody waits for it."""

    def __init__(self) -> None:
        self.done = False

    def block_until_ready(self) -> Running:
        self.done = True
        return self

    def __float__(self) -> float:
        return 2.0


def test_one_batch_is_evaluated_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Programs that do not wait for each other's results wait for each other's devices.
    started: list[Running] = []

    def evaluate(_params: Any, _batch: Any) -> Running:
        assert all(each.done for each in started)
        started.append(Running())
        return started[-1]

    monkeypatch.setattr(jax, "device_get", lambda tree: tree)
    text: Any = SimpleNamespace(
        name="t",
        tokens=10,
        bytes_per_token=1.0,
        num_batches=5,
        batches=lambda: repeat(None),
        weights=[1.0] * 5,
    )
    program: Any = SimpleNamespace(evaluate=evaluate)
    evaluation = HeldOutLoss(
        EvalConfig(eval_interval=1), (text,), program, tmp_path, first=0, say=len
    )
    state: Any = SimpleNamespace(params=None)
    assert evaluation.run(state, 1)
    assert len(started) == 5
