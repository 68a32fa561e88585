"""Evaluate a run on held-out text: records, the best step, and the end of a run that asks for it.

The records have a file of their own: `metrics.jsonl` has one object a step with the training loss,
and what reads it would take an evaluation for a step.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from moe_shard.config.eval_config import EvalConfig
from moe_shard.data.corpus import Say
from moe_shard.data.held_out import HeldOutText
from moe_shard.files import write_text
from moe_shard.program.step import Program, TrainState
from moe_shard.training.metrics import read_metrics


class HeldOutLoss:
    """Evaluate after some of a run's updates; keep `eval.jsonl` and `best.json`.

    A resumed run repeats what came after its checkpoint: records of later updates are removed, and
    the best step, and how long ago it was, follow from those that stay.

    Args:
        config: when to evaluate, and when to end the run.
        texts: the datasets.
        program: evaluates.
        folder: folder of the run.
        first: updates made before this process.
        say: receives a line for each evaluation.
    """

    def __init__(
        self,
        config: EvalConfig,
        texts: tuple[HeldOutText, ...],
        program: Program,
        folder: Path,
        *,
        first: int,
        say: Say,
    ) -> None:
        self._config, self._texts, self._program, self._say = config, texts, program, say
        self._folder = folder
        self._writes = jax.process_index() == 0
        self._records: list[dict[str, Any]] = []
        self._best, self._best_at, self._since = math.inf, 0, 0
        if self._writes and texts:
            kept: list[dict[str, Any]] = [dict(each) for each in read_metrics(self._path)]
            self._records = [each for each in kept if each["step"] <= first]
            for updates in sorted({each["step"] for each in self._records}):
                self._weigh(updates, self._mean(updates))
            self._write()
        if jax.process_count() > 1 and texts:
            # The others may see another disk, and have to come to the same end.
            known = np.array([self._best, self._best_at, self._since], np.float64)
            best, at, since = np.asarray(multihost_utils.broadcast_one_to_all(known)).tolist()
            self._best, self._best_at, self._since = best, int(at), int(since)

    @property
    def _path(self) -> Path:
        return self._folder / "eval.jsonl"

    @property
    def end(self) -> str | None:
        """Say why the run ends here; None: it goes on."""
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
            bits = loss / math.log(2) / text.bytes_per_token
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
            self._say(
                f"after step {updates}, {text.name}: loss {loss:.4f}  bits/byte {bits:.4f}  "
                f"perplexity {perplexity:.2f}"
            )
        best = self._weigh(updates, self._mean(updates))
        if self._writes:
            self._write()
        return best

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
        return math.fsum(float(loss) for loss in jax.device_get(losses)) / text.num_batches

    def _mean(self, updates: int) -> float:
        """Return the loss of an evaluation over all tokens of its datasets."""
        records = [each for each in self._records if each["step"] == updates]
        if any(each["loss"] is None for each in records):
            return math.nan
        tokens = sum(each["tokens"] for each in records)
        return math.fsum(each["loss"] * each["tokens"] for each in records) / tokens

    def _weigh(self, updates: int, loss: float) -> bool:
        if loss < self._best:
            self._best, self._best_at, self._since = loss, updates, 0
            return True
        self._since += 1
        return False

    def _write(self) -> None:
        write_text(self._path, "".join(json.dumps(each) + "\n" for each in self._records))
        best = self._folder / "best.json"
        if math.isfinite(self._best):
            content = {"step": self._best_at, "loss": self._best}
            write_text(best, json.dumps(content | {"checkpoint": f"checkpoints/{self._best_at}"}))
        else:
            best.unlink(missing_ok=True)
