"""Generate texts for the command line: load, compile, generate, report the speed."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from moe_shard.config import Config
from moe_shard.data.tokenizer import Tokenizer, find_tokenizer, require_chosen, require_vocabulary
from moe_shard.errors import UserError
from moe_shard.inference.generator import Generator
from moe_shard.inference.loading import ModelSource, load_parameters
from moe_shard.inference.prompts import rows_for
from moe_shard.models.params import describe
from moe_shard.runtime.compile import lay_out, out_of_memory_is_a_finding
from moe_shard.runtime.compile_cache import cache_problems, count_cached, start_compile_cache
from moe_shard.runtime.devices import start_devices
from moe_shard.runtime.team import Team
from moe_shard.terminal import Console

_LESS_MEMORY = "fewer prompts, a smaller max_new_tokens, weight_dtype=bfloat16, or more devices"


@dataclass
class Text:
    """Hold a prompt and the tokens generated after it.

    Attributes:
        prompt: the text given.
        prompt_ids: its tokens.
        ids: generated tokens; the last one is an end token if the text has `ended`.
        ended: whether the model has ended the document.
    """

    prompt: str
    prompt_ids: list[int]
    ids: list[int] = field(default_factory=list)
    ended: bool = False

    def add(self, token: int, ends: frozenset[int]) -> None:
        """Append the next token, unless the text has ended."""
        if not self.ended:
            self.ids.append(token)
            self.ended = token in ends

    def written(self, tokenizer: Tokenizer) -> str:
        """Decode the text after the prompt.

        Both are decoded together: alone, some tokenizers drop the space before a first word.
        """
        ids = self.ids[:-1] if self.ended else self.ids
        before, whole = tokenizer.decode(self.prompt_ids), tokenizer.decode(self.prompt_ids + ids)
        return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(ids)


@dataclass(frozen=True)
class Timings:
    """Hold how long generation took.

    Attributes:
        compile_s: seconds to compile both programs.
        prefill_ms: milliseconds from the prompts to the first token.
        decode_s: seconds for all further tokens.
        tokens_per_s: further tokens of all prompts per second; None if there were none.
    """

    compile_s: float
    prefill_ms: float
    decode_s: float
    tokens_per_s: float | None

    def line(self, texts: int, in_cache: str) -> str:
        """Format the timings as a line, with what the compilation cache did."""
        speed = "" if self.tokens_per_s is None else f", {self.tokens_per_s:,.1f} tokens/s"
        of = "" if texts == 1 else f" of {texts} prompts"
        prefill = f"prefill{of} {self.prefill_ms:,.1f} ms"
        return f"compiled in {self.compile_s:.1f} s{in_cache}, {prefill}{speed}"


def generate(
    source: ModelSource,
    config: Config,
    prompts: Sequence[str],
    *,
    cached: bool,
    as_json: bool,
    team: Team | None = None,
) -> None:
    """Generate after prompts to standard output; everything else goes to standard error.

    Args:
        source: result of `find_source`.
        config: result of `load_generation_config`.
        prompts: at least one prompt.
        cached: see `Generator`.
        as_json: print one JSON object instead of the texts.
        team: the processes that generate; None: those of the environment.

    Raises:
        UserError: the configuration does not fit the devices or the tokenizer, or the parameters
            cannot be read.
        Finding: the model does not fit in memory.
    """
    notes = Console(stderr=True, soft_wrap=True, highlight=False)
    require_chosen(config.data, config.model.vocab_size)
    tokenizer = find_tokenizer(config.data.tokenizer_path)
    require_vocabulary(tokenizer, config.model.vocab_size)
    texts = [Text(prompt, tokenizer.encode_prompt(prompt)) for prompt in prompts]
    device_line = start_devices(config.mesh.num_simulated_devices, team)
    notes.quiet = jax.process_index() > 0
    notes.print(device_line, markup=False)
    cache = start_compile_cache(config.run.jax_cache_dir)

    def note(line: str) -> None:
        notes.print(f"note: {line}", markup=False, style="yellow")

    for line in (*config.warnings, *cache.notes):
        note(line)
    sharding, _ = lay_out(config)
    sizes = dict(sharding.mesh.shape)
    _require_whole_texts(config, sizes)
    model = describe(config.model, sharding)
    sources: list[str] = []

    def say(line: str) -> None:
        sources.append(line)
        style = "yellow" if line.startswith("random") else None
        notes.print(f"parameters: {line}", markup=False, style=style)

    with out_of_memory_is_a_finding(fix=_LESS_MEMORY), cache_problems(note):
        params = load_parameters(source, config, model, say=say, console=notes)
        with notes.status("compiling"), count_cached() as counted:
            generator = Generator(
                model,
                sharding,
                config.generate,
                vocab_size=tokenizer.vocab_size,
                rows=rows_for(config, sizes, len(texts)),
                places=max(len(text.prompt_ids) for text in texts),
                cached=cached,
            )
        shown = _Shown(texts, tokenizer, live=not as_json)
        started = time.perf_counter()
        for tokens in generator(params, [text.prompt_ids for text in texts]):
            for text, token in zip(texts, tokens.tolist(), strict=True):
                text.add(token, tokenizer.ends)
            shown.more()
            if all(text.ended for text in texts):
                break
        seconds = time.perf_counter() - started
    timings = _timings(generator, texts, seconds)
    if jax.process_index() == 0:
        if as_json:
            print(json.dumps(_as_json(texts, tokenizer, sources[-1], timings)))
        else:
            shown.rest()
    notes.print(timings.line(len(texts), cache.words(counted)), markup=False)


def _require_whole_texts(config: Config, sizes: dict[str, int]) -> None:
    """Refuse a mesh that shards the length dim: a step has one token of each text."""
    for name in ("activation_length", "activation_length_moe"):
        splits = [axis for axis in config.mesh.axes_of(name) if sizes[axis] > 1]
        if splits:
            axis = splits[0]
            raise UserError(
                f"the rule of {name} splits texts over {axis}={sizes[axis]}, and a step has one "
                f"token of each\nfix: ici_{axis}_parallelism=1 (ici_fsdp_parallelism=-1 takes the "
                "devices that are left)"
            )


def _timings(generator: Generator, texts: Sequence[Text], seconds: float) -> Timings:
    decode = seconds - generator.seconds_to_first
    further = int(np.sum([len(text.ids) - 1 for text in texts]))
    return Timings(
        compile_s=generator.compile_seconds,
        prefill_ms=generator.seconds_to_first * 1e3,
        decode_s=decode,
        tokens_per_s=further / decode if further else None,
    )


def _as_json(
    texts: Sequence[Text], tokenizer: Tokenizer, parameters: str, timings: Timings
) -> dict[str, Any]:
    return {
        "prompts": [text.prompt for text in texts],
        "texts": [text.written(tokenizer) for text in texts],
        "prompt_token_ids": [text.prompt_ids for text in texts],
        "token_ids": [text.ids for text in texts],
        "ended": [text.ended for text in texts],
        "parameters": parameters,
        "timings": vars(timings),
    }


class _Shown:
    """Print texts to standard output; stream a single text to a terminal."""

    def __init__(self, texts: Sequence[Text], tokenizer: Tokenizer, *, live: bool) -> None:
        self._texts, self._tokenizer = texts, tokenizer
        self._terminal = sys.stdout.isatty()
        self._live = live and self._terminal and len(texts) == 1 and jax.process_index() == 0
        self._done = 0
        if self._live:
            self._put(texts[0].prompt)

    def more(self) -> None:
        """Print what is new, except an incomplete character."""
        if self._live:
            written = self._texts[0].written(self._tokenizer)
            self._put_from(written.rstrip("\N{REPLACEMENT CHARACTER}"))

    def rest(self) -> None:
        """Print everything that has not been printed."""
        if self._live:
            self._put_from(self._texts[0].written(self._tokenizer))
            self._put("\n")
            return
        for number, text in enumerate(self._texts):
            self._put("\n" * (number > 0) + text.prompt + text.written(self._tokenizer) + "\n")

    def _put_from(self, written: str) -> None:
        self._put(written[self._done :])
        self._done = max(self._done, len(written))

    def _put(self, text: str) -> None:
        # A prompt may hold bytes that are not text; a model may generate terminal escapes.
        text = text.encode("utf-8", "replace").decode()
        if self._terminal:
            text = "".join(c if c.isprintable() or c in "\n\t" else " " for c in text)
        sys.stdout.write(text)
        sys.stdout.flush()
