"""Evaluate a run on held-out text: records, the best step, and the end of a run that asks for it.

The records have a file of their own: `metrics.jsonl` has one object a step with the training loss,
and what reads it would take an evaluation for a step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from moe_shard.checkpoints.checkpoint import Checkpointer
from moe_shard.checkpoints.whole import on_first
from moe_shard.config.eval_config import EvalConfig
from moe_shard.data.corpus import Say
from moe_shard.data.held_out import HeldOutText
from moe_shard.errors import Finding
from moe_shard.files import write_text
from moe_shard.program.step import Program, TrainState
from moe_shard.training.metrics import read_metrics

_RECORDS, _BEST = "eval.jsonl", "best.json"


class HeldOutLoss:
    """Evaluate after some of a run's updates; keep `eval.jsonl` and `best.json`.

    A resumed run repeats what came after its checkpoint: records of later updates are removed, and
    the best step, and how long ago it was, follow from those that stay.

    `best.json` names the best of the evaluations whose parameters are in a complete checkpoint, and
    that checkpoint is kept. Where there is none it names the best one, without a checkpoint.

    Args:
        config: when to evaluate, and when to end the run.
        texts: the datasets.
        program: evaluates.
        folder: folder of the run.
        first: updates made before this process.
        checkpointer: saves the parameters; None: nothing does.
        say: receives a line for each evaluation.
        show: receives the records of each evaluation.
    """

    def __init__(
        self,
        config: EvalConfig,
        texts: tuple[HeldOutText, ...],
        program: Program,
        folder: Path,
        *,
        first: int,
        checkpointer: Checkpointer | None = None,
        say: Say,
        show: Callable[[Sequence[dict[str, Any]]], object] = lambda _: None,
    ) -> None:
        self._config, self._texts, self._program, self._say = config, texts, program, say
        self._folder, self._show = folder, show
        self._checkpointer = checkpointer
        self._means: dict[int, float] = {}  # updates -> loss over all tokens
        self._best, self._best_at, self._since = math.inf, 0, 0
        self._named: int | None = None
        self._written: dict[str, str | None] = {}
        self._refused: dict[str, str] = {}
        # The other processes may see another disk, and have to come to the same end.
        kept = on_first(lambda: [dict(each) for each in read_metrics(folder / _RECORDS)])
        self._records: list[dict[str, Any]] = [each for each in kept if each["step"] <= first]
        for updates in sorted({each["step"] for each in self._records}):
            self._weigh(updates)
        if checkpointer:
            checkpointer.to_keep = lambda: {self._best_at, self._named}
            checkpointer.when_saved.insert(0, self._write)  # before these files are copied
        self._write()

    @property
    def end(self) -> str | None:
        """Say why the run ends here; None: it goes on."""
        if not self._texts:
            return None
        target, patience = self._config.target_eval_loss, self._config.eval_patience
        if target > 0 and self._best <= target:
            return f"the held-out loss {self._best:.4f} has reached target_eval_loss={target:g}"
        if 0 < patience <= self._since:
            return (
                f"the held-out loss has not fallen below {self._best:.4f}, that after step "
                f"{self._best_at}, for {self._since} evaluations (eval_patience={patience})"
            )
        return None

    def due(self, updates: int) -> bool:
        """Return whether there is an evaluation after a number of updates."""
        return bool(self._texts) and self._config.due(updates)

    def run(self, state: TrainState, updates: int) -> bool:
        """Evaluate the parameters of a state on every dataset.

        Args:
            state: the state.
            updates: the number of updates made.

        Returns:
            Whether this is the best so far.
        """
        for text in self._texts:
            loss = self._loss(state, text)
            # Conversations are no text whose bytes count: their loss is that of some tokens.
            bits = loss / math.log(2) / text.bytes_per_token if text.bytes_per_token else None
            perplexity = math.exp(min(loss, 700))
            record = {
                "step": updates,
                "dataset": text.name,
                "loss": loss,
                "bits_per_byte": bits,
                "perplexity": perplexity,
                "tokens": text.tokens,
            }
            finite = math.isfinite(loss)
            if not finite:
                record |= {"loss": None, "bits_per_byte": None, "perplexity": None}
            self._records.append(record)
            written = "" if bits is None else f"bits/byte {bits:.4f}  "
            self._say(
                f"after step {updates}, {text.name}: loss {loss:.4f}  {written}"
                f"perplexity {perplexity:.2f}"
            )
        best = self._weigh(updates)
        self._show([each for each in self._records if each["step"] == updates])
        self._write()
        return best

    def finish(self) -> None:
        """Write what the disk has refused so far.

        Raises:
            Finding: it refuses still.
        """
        self._write()
        if self._refused:
            raise Finding(
                f"{next(iter(self._refused.values()))}\n"
                "fix: make room on that disk; the same command continues from the last checkpoint"
            )

    def _loss(self, state: TrainState, text: HeldOutText) -> float:
        """Return the mean cross entropy of a dataset, in nats a token."""
        batches = text.batches()
        losses: list[jax.Array] = []
        for _ in range(text.num_batches):
            batch = next(batches)
            # No program waits for another's result here: all at once, their batches would fill the
            # devices' memory, and simulated devices would wait for each other without end.
            jax.block_until_ready(losses[-1:])
            losses.append(self._program.evaluate(state.params, batch))
        weighted = zip(jax.device_get(losses), text.weights, strict=True)
        return math.fsum(float(loss) * weight for loss, weight in weighted) / text.num_batches

    def _mean(self, updates: int) -> float:
        """Return the loss of an evaluation over all tokens of its datasets."""
        records = [each for each in self._records if each["step"] == updates]
        if any(each["loss"] is None for each in records):
            return math.nan
        tokens = sum(each["tokens"] for each in records)
        return math.fsum(each["loss"] * each["tokens"] for each in records) / tokens

    def _weigh(self, updates: int) -> bool:
        """Count an evaluation; return whether it is the best so far."""
        loss = self._means[updates] = self._mean(updates)
        if loss < self._best:
            self._best, self._best_at, self._since = loss, updates, 0
            return True
        self._since += 1
        return False

    def _write(self) -> None:
        """Write the records, and name the best evaluation that has a checkpoint.

        It is named when its checkpoint is complete, and the one before it is removed after that.
        """
        if not self._texts and not self._records:
            return
        saved = self._checkpointer.complete() if self._checkpointer else set()
        marked = [
            (loss, at) for at, loss in self._means.items() if at in saved and math.isfinite(loss)
        ]
        best, content = min(marked, default=None), None
        if best or math.isfinite(self._best):
            loss, at = best or (self._best, self._best_at)
            checkpoint = f"checkpoints/{at}" if best else None
            content = json.dumps({"step": at, "loss": loss, "checkpoint": checkpoint})
        if jax.process_index() == 0:
            self._put(_RECORDS, "".join(json.dumps(each) + "\n" for each in self._records))
            self._put(_BEST, content)
        if _BEST not in self._refused:
            self._named = best[1] if best else None

    def _put(self, name: str, content: str | None) -> None:
        """Write a file, or remove it; where the disk refuses, say so, and try again with the next.

        Args:
            name: of the file.
            content: of the file; None: it is to be gone.
        """
        path = self._folder / name
        if name in self._written and self._written[name] == content:
            return
        try:
            if content is None:
                path.unlink(missing_ok=True)
            else:
                write_text(path, content)
        except OSError as error:
            if not self._refused:
                self._say(
                    f"cannot write {path}: {error.strerror}; training goes on, and what belongs "
                    "there is held in memory\nfix: make room on that disk, and it is written"
                )
            self._refused[name] = f"cannot write {path}: {error.strerror}"
            return
        self._written[name] = content
        self._refused.pop(name, None)
