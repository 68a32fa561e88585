"""Train a run and generate from it on the command line: texts, JSON, errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moe_shard.checkpoints.run_params import restore_params
from moe_shard.cli.generate import main as generate
from moe_shard.config import load_config
from moe_shard.data.tokenizer import ByteTokenizer
from moe_shard.errors import UserError
from moe_shard.inference import texts as inference
from moe_shard.inference.generator import Generator
from moe_shard.inference.texts import Text
from moe_shard.program.step import make_program
from moe_shard.runtime.compile import lay_out
from tests.data.test_tokenizer import byte_level, short
from tests.quick import FLAGS
from tests.quick import QUICK as COMPILER
from tests.test_train import TINY

REPOSITORY = Path(__file__).resolve().parents[1]
TRAINED = (*TINY, "steps=60", "run_name=tiny")
LITTLE = ("enable_tensorboard=false", "async_checkpointing=false")
QUICK = "moe_dispatch=gather"  # compiles in half the time
REPEATED = "abcdefghijklm. "  # each token determines the next, which a few steps can learn


def command(module: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", f"moe_shard.{module}", *arguments],
        cwd=folder,
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": FLAGS,
            "PYTHONPATH": str(REPOSITORY),
        },
        capture_output=True,
        text=True,
        timeout=180,
    )


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "Generator", partial(Generator, options=COMPILER))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that has learned one sentence."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(REPEATED * 400)
    more = ("dataset_path=text.txt", "checkpoint_period=30", "learning_rate=0.02", *LITTLE)
    done = command("train", folder, "mixtral-tiny", *TRAINED, *more)
    assert done.returncode == 0, done.stderr
    return folder / "outputs" / "tiny"


def written(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert generate([*arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_trained_run_writes_what_it_has_learned(trained: Path) -> None:
    done = command("generate", trained.parents[1], "outputs/tiny", "abc", "max_new_tokens=30")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "abc" + (REPEATED * 3)[3:33] + "\n"
    lines = done.stderr.splitlines()
    assert len(lines) == 3, done.stderr
    assert "simulating 8 devices" in lines[0]
    assert lines[1].startswith("parameters: after step 60 of ")
    for part in ("compiled in", "prefill", "ms", "tokens/s"):
        assert part in lines[2]


def test_json_of_several_prompts_and_an_older_checkpoint(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older = str(trained / "checkpoints" / "30")
    found = written(capsys, older, "de f", "max_new_tokens=5", "", QUICK)
    assert set(found) == {
        "prompts", "texts", "prompt_token_ids", "token_ids", "ended", "parameters", "timings",
    }  # fmt: skip
    assert found["prompts"] == ["de f", ""]
    assert found["prompt_token_ids"] == [[256, *b"de f"], [256]]
    assert [len(ids) for ids in found["token_ids"]] == [5, 5]
    assert found["texts"][0] == bytes(found["token_ids"][0]).decode("utf-8", "replace")
    assert found["parameters"].startswith("after step 30 of ")
    assert set(found["timings"]) == {"compile_s", "prefill_ms", "decode_s", "tokens_per_s"}
    assert all(value > 0 for value in found["timings"].values())


def test_expert_parallelism_does_not_change_the_text(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [
        written(
            capsys, str(trained), "c", "max_new_tokens=8", QUICK,
            f"ici_expert_parallelism={size}", "ici_fsdp_parallelism=-1",
        )["token_ids"]
        for size in (1, 8)
    ]  # fmt: skip
    assert texts[0] == texts[1] == [list(REPEATED[3:11].encode())]


def test_a_text_ends_at_the_end_of_the_document() -> None:
    text = Text("a", [256, 97])
    for token in (98, 256, 99):
        text.add(token, frozenset({256}))
    assert (text.ids, text.ended, text.written(ByteTokenizer())) == ([98, 256], True, "b")


def test_writing_stops_when_every_text_has_ended(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    full_stop = ord(".")
    monkeypatch.setattr(ByteTokenizer, "ends", frozenset({full_stop}))
    steps: list[np.ndarray] = []

    class Counting(Generator):
        def __call__(self, *arguments: Any) -> Any:
            for tokens in super().__call__(*arguments):
                steps.append(tokens)
                yield tokens

    monkeypatch.setattr(inference, "Generator", partial(Counting, options=COMPILER))
    found = written(capsys, str(trained), "abcdefghij", "cd", "max_new_tokens=40", QUICK)
    assert found["texts"] == ["klm", "efghijklm"]
    assert found["ended"] == [True, True]
    assert [ids[-1] for ids in found["token_ids"]] == [full_stop] * 2
    assert len(steps) == len("efghijklm.")


def test_random_parameters_say_so_and_a_tokenizer_of_a_file_has_its_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = byte_level(tmp_path / "model")
    arguments = ["mixtral-tiny", *TINY, QUICK, f"tokenizer_path={model}", "max_new_tokens=3"]
    assert generate([*arguments, "the cat", " sat"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("the cat")
    assert "\n sat" in out
    assert "random, drawn from seed=0: mixtral-tiny names no checkpoint" in err
    assert "prefill of 2 prompts" in err
    with pytest.raises(UserError) as caught:
        generate([*arguments, "the cat", "vocab_size=32"])
    short(caught.value, "vocab_size=32", "tokens of tokenizer_path=")


def test_a_watched_text_comes_piece_by_piece(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    text = Text("caf", [256, *b"caf"])
    shown = inference._Shown([text], ByteTokenizer(), live=True)
    seen = [capsys.readouterr().out]
    for token in (*"é".encode(), 0x1B, *b"x\n"):
        text.add(token, frozenset({256}))
        shown.more()
        seen.append(capsys.readouterr().out)
    shown.rest()
    seen.append(capsys.readouterr().out)
    assert seen == ["caf", "", "é", " ", "x", "\n", "\n"]  # and no terminal control characters


def test_parameters_alone_equal_those_of_the_state_in_both_layouts(trained: Path) -> None:
    for fused in ("false", "true"):
        key = f"prefuse_moe_weights={fused}"
        config = load_config(str(trained / "config.yml"), [key, "ici_expert_parallelism=8"])
        program = make_program(config, lay_out(config)[0])
        wanted = program.abstract_state.params
        found = restore_params(trained / "checkpoints", wanted)
        places = jax.tree.map(lambda a, w: a.sharding == w.sharding, found, wanted)
        assert all(jax.tree.leaves(places))
        experts = jax.device_get(found["layers"]["mlp"]["experts"])
        if fused == "false":
            apart = experts
    pair = np.stack([apart["gate"], apart["up"]], axis=-2)
    np.testing.assert_array_equal(experts["gate_up"], pair)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["mixtral-tiny"], ["no prompt", "a text to continue"]),
        (["mixtral-tiny", "max_new_tokens=3"], ["no prompt"]),
        ([], ["required", "--help"]),
        (["mixtral-tiny", "a", "--jsn"], ["--jsn", "--help"]),
        (["mixtral-tin", "a"], ["mixtral-tin", "did you mean"]),
        (["mixtral-tiny", "a", "max_tokens=3"], ["unknown key max_tokens"]),
        (
            ["mixtral-tiny", "a", "capacity_factor=1.25"],
            ["capacity_factor=1.25", "generation drops nothing"],
        ),
        (["mixtral-tiny", "a", "ragged_buffer_factor=2"], ["ragged_buffer_factor=2 drops"]),
        (
            ["mixtral-tiny", "a", "ici_expert_parallelism=4", "ici_context_parallelism=2"],
            ["splits texts over context=2", "ici_context_parallelism=1"],
        ),
        (["mixtral-tiny", "a", "tokenizer_path=nowhere"], ["tokenizer_path", "nowhere"]),
        (["mixtral-tiny", "a", "vocab_size=200"], ["vocab_size=200", "257"]),
        (["mixtral-tiny", "a", "load_parameters_path=none"], ["none holds no parameters"]),
        (["RUN/nothing", "a"], ["RUN/nothing", ".yml"]),
        (["RUN/checkpoints/40", "a"], ["no checkpoint 40"]),
        (["RUN/..", "a"], ["holds no model"]),
        (["RUN", "a", "base_emb_dim=64"], ["another model", "has shape", "config.yml"]),
    ],
)
def test_wrong_usage_is_a_short_error(
    trained: Path, arguments: list[str], parts: list[str]
) -> None:
    given = [argument.replace("RUN", str(trained)) for argument in arguments]
    with pytest.raises(UserError) as caught:
        generate(given)
    assert len(str(caught.value).splitlines()) <= 3
    for part in parts:
        assert part.replace("RUN", str(trained)) in str(caught.value)


def test_a_run_without_checkpoints_is_a_short_error(tmp_path: Path) -> None:
    (tmp_path / "config.yml").write_text(load_config("mixtral-tiny").to_yaml())
    with pytest.raises(UserError) as caught:
        generate([str(tmp_path), "a"])
    short(caught.value, "a run without checkpoints", "enable_checkpointing=true")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError) as caught:
        generate([str(tmp_path), "a"])
    short(caught.value, "holds no whole checkpoint")
