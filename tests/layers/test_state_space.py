"""The chunked state space equals a token-by-token one in float64, and so do its gradients."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_shard.layers.state_space import scan_states
from tests.quick import QUICK

B, G, R, P, D = 2, 2, 2, 3, 5


def forward(
    value: Any, key: Any, query: Any, step: Any, decay: Any, starts: Any, state: Any
) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the states before each token and after the last one, and the outputs; token by token.

    `state` is before the first token.
    """
    states, outputs = [state], []
    for t in range(value.shape[1]):
        before = np.where(starts[:, t, None, None, None, None], 0.0, states[-1])
        added = step[:, t, ..., None, None] * value[:, t, ..., None] * key[:, t, :, None, None]
        states.append(np.exp(decay[:, t])[..., None, None] * before + added)
        outputs.append((states[-1] * query[:, t, :, None, None]).sum(-1))
    return states, np.stack(outputs, 1)


def adjoint(arrays: dict[str, Any], d_output: Any, d_state: Any) -> dict[str, np.ndarray]:
    """Return the gradients by every array of the sum of outputs and last state times these."""
    value, key, query, step, decay, starts, _state = arrays.values()
    states, _ = forward(**arrays)
    of = {name: np.zeros_like(each) for name, each in arrays.items() if name != "starts"}
    back = d_state
    for t in reversed(range(value.shape[1])):
        of["query"][:, t] = (d_output[:, t, ..., None] * states[t + 1]).sum((2, 3))
        back = back + d_output[:, t, ..., None] * query[:, t, :, None, None]
        outer = value[:, t, ..., None] * key[:, t, :, None, None]
        of["step"][:, t] = (back * outer).sum((3, 4))
        scaled = back * step[:, t, ..., None, None]
        of["value"][:, t] = (scaled * key[:, t, :, None, None]).sum(4)
        of["key"][:, t] = (scaled * value[:, t, ..., None]).sum((2, 3))
        first = starts[:, t, None, None, None, None]
        kept = np.exp(decay[:, t])[..., None, None]
        of["decay"][:, t] = (back * kept * np.where(first, 0.0, states[t])).sum((3, 4))
        back = np.where(first, 0.0, back * kept)
    return of | {"state": back}


def arrays_of(seed: int, length: int, starts: tuple[int, ...] = ()) -> dict[str, Any]:
    """Draw arrays in float64; most tokens decay by little and some by all."""
    rng = np.random.default_rng(seed)
    flags = np.zeros((B, length), bool)
    flags[0, list(starts)] = True  # the second sequence is one document
    decay = -np.exp(rng.uniform(-6, 1, (B, length, G, R)))
    decay = np.where(rng.random(decay.shape) < 0.1, decay - 60, decay)
    return {
        "value": rng.standard_normal((B, length, G, R, P)),
        "key": rng.standard_normal((B, length, G, D)),
        "query": rng.standard_normal((B, length, G, D)),
        "step": np.exp(rng.uniform(-3, 1, (B, length, G, R))),
        "decay": decay,
        "starts": flags,
        "state": rng.standard_normal((B, G, R, P, D)),
    }


def narrow(arrays: dict[str, Any]) -> dict[str, Any]:
    return {n: jnp.asarray(a if a.dtype == bool else np.float32(a)) for n, a in arrays.items()}


def assert_near(found: Any, known: Any) -> None:
    assert np.abs(found - known).max() <= 2e-6 * max(np.abs(known).max(), 1)


@pytest.mark.parametrize(
    ("length", "chunk", "starts"),
    [(17, 4, (0, 5, 6, 12)), (8, 8, (3,)), (5, 64, ()), (3, 1, (1,))],
    ids=["several-chunks", "one-chunk", "short", "recurrent"],
)
def test_outputs_and_gradients_equal_those_of_the_recurrence(
    length: int, chunk: int, starts: tuple[int, ...]
) -> None:
    arrays = arrays_of(length, length, starts)
    # What float32 makes of the numbers is where both begin.
    arrays = {n: a if n == "starts" else np.float64(np.float32(a)) for n, a in arrays.items()}
    states, outputs = forward(**arrays)
    rng = np.random.default_rng(1)
    d_output, d_state = (np.float32(rng.standard_normal(a.shape)) for a in (outputs, states[-1]))
    given = narrow(arrays)
    starts_of = given.pop("starts")

    def apply(given: dict[str, Any]) -> Any:
        return scan_states(**given, starts=starts_of, chunk=chunk)

    def both(given: dict[str, Any]) -> Any:
        found, back = jax.vjp(apply, given)
        return found, back((jnp.asarray(d_output), jnp.asarray(d_state)))[0]

    (output, state), gradients = jax.jit(both).lower(given).compile(QUICK)(given)
    assert_near(output, outputs)
    assert_near(state, states[-1])
    known = adjoint(arrays, np.float64(d_output), np.float64(d_state))
    for name, gradient in gradients.items():
        assert_near(gradient, known[name])


def test_documents_run_apart_give_the_same() -> None:
    arrays = arrays_of(3, 11, (4, 9))
    given = narrow(arrays | {"state": np.zeros((B, G, R, P, D))})
    run = jax.jit(scan_states, static_argnames="chunk", compiler_options=QUICK)
    packed, last = run(**given, chunk=4)
    for first, end in ((0, 4), (4, 9), (9, 11)):
        one = {n: a[:1] if n == "state" else a[:1, first:end] for n, a in given.items()}
        alone, state = run(**one, chunk=4)
        np.testing.assert_allclose(alone, packed[:1, first:end], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state, last[:1], rtol=1e-5, atol=1e-6)


def test_a_text_in_two_calls_is_the_text_in_one() -> None:
    given = narrow(arrays_of(4, 9, (2,)))
    run = jax.jit(scan_states, static_argnames="chunk", compiler_options=QUICK)
    whole, last = run(**given, chunk=4)
    state, parts = given["state"], []
    for first, end in ((0, 5), (5, 6), (6, 9)):
        one = {n: a if n == "state" else a[:, first:end] for n, a in given.items()}
        part, state = run(**one | {"state": state}, chunk=4)
        parts.append(part)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state, last, rtol=1e-5, atol=1e-6)


def test_fast_and_slow_decays_in_one_chunk_keep_their_digits() -> None:
    """A plain sum of 300 decays is some thousands, and has three digits after the point."""
    arrays = arrays_of(5, 300)
    arrays["decay"] = np.where(np.arange(300)[:, None, None] % 4 == 0, -70.0, arrays["decay"] / 10)
    arrays = {n: a if n == "starts" else np.float64(np.float32(a)) for n, a in arrays.items()}
    _, outputs = forward(**arrays)
    given = narrow(arrays)
    run = jax.jit(lambda given: scan_states(**given, chunk=300)[0])
    assert_near(run.lower(given).compile(QUICK)(given), outputs)
