"""Generate tokens after prompts: one program processes the prompts, another makes each token."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Int32

from moe_shard.config.generate_config import GenerateConfig
from moe_shard.inference.prompts import TEXT_SEGMENT, Padded, pad_left
from moe_shard.inference.sampling import next_tokens
from moe_shard.layers.cache import EMPTY
from moe_shard.models.decoder import Cache
from moe_shard.models.params import AbstractModel, Params
from moe_shard.sharding.annotate import Sharding

NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})


class Decoding(Protocol):
    """Process a batch of prompts, then the generated tokens one by one."""

    def first(self, params: Params, prompts: Padded) -> tuple[Int[Array, "B"], Any]:
        """Return the first token after each prompt, and the state that `following` needs."""

    def following(
        self, params: Params, kept: Any, token: Int[Array, "B"], written: int
    ) -> tuple[Int[Array, "B"], Any]:
        """Return the next token, and the state for the call after this one.

        Args:
            params: parameters of the model.
            kept: state from the previous call; this call donates it.
            token: token from the previous call.
            written: number of tokens after the prompts, that one included.
        """


class Generator:
    """Compile a model to generate after prompts of one shape.

    Args:
        model: the decoder; each call brings its parameters.
        sharding: the mesh and its rules.
        config: sampling strategy, and number of tokens.
        vocab_size: vocabulary size of the tokenizer; larger ids are never generated.
        rows: B, sequences.
        places: S, tokens of the longest prompt.
        cached: cache the keys and values of earlier tokens; otherwise each step recomputes them
            all, which is slow and has the same result.
        options: compiler options, in addition to the defaults.
    """

    def __init__(
        self,
        model: AbstractModel,
        sharding: Sharding,
        config: GenerateConfig,
        *,
        vocab_size: int,
        rows: int,
        places: int,
        cached: bool = True,
        options: Mapping[str, Any] = NO_OPTIONS,
    ) -> None:
        self.config = config
        self.rows = rows
        self.seconds_to_first = 0.0
        started = time.perf_counter()
        kind = _Cached if cached else _Recomputed
        self._decoding: Decoding = kind(
            _Choosing(model, sharding, config, vocab_size), rows, places, dict(options)
        )
        self.compile_seconds = time.perf_counter() - started

    def __call__(
        self, params: Params, prompts: Sequence[Sequence[int]]
    ) -> Iterator[Int32[np.ndarray, "prompts"]]:
        """Generate after each prompt; the next step runs while a token is yielded.

        Args:
            params: parameters, sharded as the model's specs.
            prompts: token ids of at most B prompts.

        Yields:
            The next token of each prompt, `max_new_tokens` times; stop iterating to stop early.
        """
        padded = pad_left(prompts, rows=self.rows)
        started = time.perf_counter()
        token, kept = self._decoding.first(params, padded)
        for written in range(1, self.config.max_new_tokens + 1):
            now = token
            if written < self.config.max_new_tokens:
                token, kept = self._decoding.following(params, kept, now, written)
            found = np.asarray(now)[: len(prompts)]
            if written == 1:
                self.seconds_to_first = time.perf_counter() - started
            yield found


class _Choosing:
    """Choose tokens from logits, and hold what both kinds of programs share."""

    def __init__(
        self, model: AbstractModel, sharding: Sharding, config: GenerateConfig, vocab_size: int
    ) -> None:
        self.model, self.config, self.vocab_size = model, config, vocab_size
        self.params = jax.tree.map(lambda spec: spec.abstract(), model.specs)
        self.everywhere = NamedSharding(sharding.mesh, PartitionSpec())

    def token(self, logits: Float[Array, "B V"], written: Int[Array, ""]) -> Int[Array, "B"]:
        with jax.named_scope("sampling"):
            real = jnp.arange(logits.shape[-1]) < self.vocab_size
            key = jax.random.fold_in(jax.random.key(self.config.seed), written)
            return next_tokens(jnp.where(real, logits, -jnp.inf), key, self.config)

    def abstract(self, *shape: int) -> jax.ShapeDtypeStruct:
        """Describe integers that are replicated over all devices."""
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self.everywhere)


class _Cached:
    """Cache the keys and values of earlier tokens; see `Decoding`."""

    def __init__(
        self, choosing: _Choosing, rows: int, places: int, options: dict[str, Any]
    ) -> None:
        model, most = choosing.model, choosing.config.max_new_tokens

        def first(
            params: Params,
            tokens: Int[Array, "B S"],
            positions: Int[Array, "B S"],
            segment_ids: Int[Array, "B S"],
        ) -> tuple[Int[Array, "B"], Cache]:
            decoder = model.apply(params)
            empty = decoder.empty_cache(rows, places + most)
            logits, cache = decoder.extend(tokens, positions, segment_ids, empty)
            return choosing.token(logits, jnp.zeros((), jnp.int32)), cache

        def following(
            params: Params,
            cache: Cache,
            token: Int[Array, "B"],
            position: Int[Array, "B"],
            written: Int[Array, ""],
        ) -> tuple[Int[Array, "B"], Cache]:
            segment_ids = jnp.full((rows, 1), TEXT_SEGMENT, jnp.int32)
            logits, cache = model.apply(params).extend(
                token[:, None], position[:, None], segment_ids, cache
            )
            return choosing.token(logits, written), cache

        everywhere = choosing.everywhere
        prompts = [choosing.abstract(rows, places)] * len(Padded._fields)
        traced = jax.jit(first, out_shardings=(everywhere, None)).trace(choosing.params, *prompts)
        self._first = traced.lower().compile(compiler_options=options)
        # The step keeps the cache sharded as the first program returned it.
        cache_at = self._first.output_shardings[1]
        cache = jax.tree.map(
            lambda each, at: jax.ShapeDtypeStruct(each.shape, each.dtype, sharding=at),
            traced.out_info[1],
            cache_at,
        )
        step = jax.jit(following, donate_argnums=1, out_shardings=(everywhere, cache_at))
        row, number = choosing.abstract(rows), choosing.abstract()
        lowered = step.lower(choosing.params, cache, row, row, number)
        self._following = lowered.compile(compiler_options=options)

    def first(self, params: Params, prompts: Padded) -> tuple[Int[Array, "B"], Any]:
        token, cache = self._first(params, *prompts)
        return token, (cache, prompts.lengths)

    def following(
        self, params: Params, kept: Any, token: Int[Array, "B"], written: int
    ) -> tuple[Int[Array, "B"], Any]:
        cache, position = kept
        token, cache = self._following(params, cache, token, position, np.int32(written))
        return token, (cache, position + 1)


class _Recomputed:
    """Recompute all tokens at each step; see `Decoding`."""

    def __init__(
        self, choosing: _Choosing, rows: int, places: int, options: dict[str, Any]
    ) -> None:
        model, most = choosing.model, choosing.config.max_new_tokens
        self._places, self._most = places, most

        def after(
            params: Params,
            tokens: Int[Array, "B T"],
            positions: Int[Array, "B T"],
            segment_ids: Int[Array, "B T"],
            last: Int[Array, ""],
            written: Int[Array, ""],
        ) -> Int[Array, "B"]:
            # Places that have no token yet belong to no document.
            segment_ids = jnp.where(jnp.arange(places + most) <= last, segment_ids, EMPTY)
            logits, _ = model.apply(params)(tokens, positions, segment_ids)
            at_last = jax.lax.dynamic_index_in_dim(logits, last, axis=1, keepdims=False)
            return choosing.token(at_last, written)

        whole = [choosing.abstract(rows, places + most)] * len(Padded._fields)
        number = choosing.abstract()
        program = jax.jit(after, out_shardings=choosing.everywhere)
        lowered = program.lower(choosing.params, *whole, number, number)
        self._after = lowered.compile(compiler_options=options)

    def first(self, params: Params, prompts: Padded) -> tuple[Int[Array, "B"], Padded]:
        rows = len(prompts.tokens)
        ahead = np.arange(self._most, dtype=np.int32)
        further = Padded(
            tokens=np.zeros((rows, self._most), np.int32),
            positions=prompts.lengths[:, None] + ahead,
            segment_ids=np.full((rows, self._most), TEXT_SEGMENT, np.int32),
        )
        whole = Padded(*map(_joined, prompts, further))
        return self._after(params, *whole, np.int32(self._places - 1), np.int32(0)), whole

    def following(
        self, params: Params, kept: Padded, token: Int[Array, "B"], written: int
    ) -> tuple[Int[Array, "B"], Padded]:
        last = self._places + written - 1
        kept.tokens[:, last] = token
        return self._after(params, *kept, np.int32(last), np.int32(written)), kept


def _joined(
    left: Int32[np.ndarray, "B S"], right: Int32[np.ndarray, "B N"]
) -> Int32[np.ndarray, "B T"]:
    return np.concatenate([left, right], axis=1)
