"""Generate folders: of runs, of checkpoints, of text with a tokenizer, of Hugging Face models."""

from __future__ import annotations

import functools
import gzip
import json
import math
import random
import struct
from typing import Any

import yaml

from tests.autoep.directory import BYTES, small_models
from tests.hostile.cases import (
    TINY,
    TINY_YML,
    Case,
    Files,
    Harm,
    Special,
    damaged,
    odd,
    other_json,
    setting,
    something,
)

_RUN_FILES = (
    *("config.yml", "lowering.json", "metrics.jsonl", "goodput.json", "eval.jsonl", "best.json"),
    *("layers.jsonl", ".lock", "tensorboard", "checkpoints", "hlo", "profile", "settings.json"),
)
_RECORD = {
    **{"step": 0, "loss": 5.5, "ce_loss": 5.4, "aux_loss": 0.1, "grad_norm": 1.0},
    **{"learning_rate": 1e-3, "step_time_s": 0.1, "tokens_per_sec_per_device": 100.0},
    **{"tflops_per_sec_per_device": 0.1, "mfu": None, "dropped_token_fraction": 0.0},
    **{"expert_load_max_over_mean": 1.5, "update_norm": 0.1, "skipped": 0},
}
_LAYER_RECORD = {
    "memory": {"of": "host", "in_use_bytes": 10**9, "peak_bytes": 2 * 10**9},
    "grad_norm": {"router": 0.1, "experts": 0.4},
    "param_norm": {"router": 2.0, "experts": 9.0},
    "update_norm": {"router": 0.01, "experts": 0.02},
    "layers": [0, 1],
    "expert_load_max_over_mean": [1.5, 2.0],
    "expert_load_min_over_mean": [0.5, 0.0],
    "expert_load_entropy": [0.9, 0.8],
    "dropped_token_fraction": [0.0, None],
    "router_z": [1.0, 2.0],
}


def run_folder(rng: random.Random) -> Case:
    """Make the folder of a run, some of whose files are not what a run wrote."""
    run = "outputs/tiny"
    settings = dict(TINY, run_name="tiny", steps=rng.choice([0, 1, 5]))
    records = [_RECORD | {"step": step} for step in range(3)]
    evaluated = [
        {"step": 2, "dataset": "a", "loss": 5.0, "bits_per_byte": 7.0, "perplexity": 148.0}
    ]
    start = {"started": 1e9, "first_step": 0, "ended": 1e9 + 50, "updates": 3, "seconds": {}}
    goodput = {"starts": [start | {"seconds": {"steps": 30.0, "compile": 20.0}}]}
    files: Files = {
        "tiny.yml": TINY_YML,
        f"{run}/config.yml": yaml.safe_dump(settings).encode(),
        f"{run}/lowering.json": json.dumps({"num_devices": 8, "collectives": []}).encode(),
        f"{run}/metrics.jsonl": _lines(records),
        f"{run}/eval.jsonl": _lines(evaluated),
        f"{run}/layers.jsonl": _lines([_LAYER_RECORD | {"step": step} for step in range(3)]),
        f"{run}/goodput.json": json.dumps(goodput).encode(),
        f"{run}/best.json": b'{"step": 2, "loss": 5.0, "checkpoint": "checkpoints/2"}',
    }
    for _ in range(rng.randint(1, 3)):
        name = f"{run}/{rng.choice(_RUN_FILES)}"
        content = files.get(name)
        text = content if isinstance(content, bytes) else b"{}\n"
        files[name] = rng.choice([something(rng), damaged(text, rng), _other_values(text, rng)])
    if rng.random() < 0.3 and files.get(f"{run}/checkpoints") is None:
        files[f"{run}/checkpoints"] = None
        name = rng.choice(["3", "03", "x", "-1", "3.damaged", "9" * 30, "٣"])
        files[f"{run}/checkpoints/{name}"] = something(rng)
    argv = rng.choice(
        [
            ["train", "tiny.yml", "run_name=tiny"],
            ["train", "tiny.yml", "run_name=tiny", "eval_interval=2", "eval_holdout_fraction=0.1"],
            ["train", "tiny.yml", "run_name=tiny", setting(rng)],
            ["supervise", "--", "train", "tiny.yml", "run_name=tiny"],
            *(["train", run], ["report", run], ["profile", run], ["diff", run, run]),
            *(["status", run], ["status", run, "--json"], ["status", run, "--html", "page.html"]),
            ["diff", run, f"{run}/lowering.json"],
            ["generate", run, "a"],
            ["export", run, "exported"],
            ["import", run, "imported"],
        ]
    )
    return Case("run folder", argv, files)


def _lines(records: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(each) + "\n" for each in records).encode()


def _other_values(text: bytes, rng: random.Random) -> bytes:
    """Change values in a text of JSON objects, a line or the whole each."""
    try:
        return json.dumps(other_json(json.loads(text), rng, rng.randint(1, 3))).encode()
    except ValueError:
        pass
    lines = text.splitlines()
    at = rng.randrange(len(lines)) if lines else 0
    try:
        lines[at] = json.dumps(other_json(json.loads(lines[at]), rng)).encode()
    except (ValueError, IndexError):
        return damaged(text, rng)
    return b"\n".join(lines) + b"\n"


def checkpoints(rng: random.Random) -> Case:
    """Make a run with two checkpoints, or an imported model, and harm it."""
    settings = yaml.safe_dump(dict(TINY, run_name="tiny", steps=20)).encode()
    files: Files = {"tiny.yml": TINY_YML}
    if rng.random() < 0.15:
        files["imported-model"] = Special("copy", "imported")
        names = ["text_damaged", "other_types", "replaced", "truncated", "missing", "bit_flipped"]
        harms = [Harm("imported-model", rng.choice(names), rng.randrange(1 << 30))]
        argv = rng.choice(
            [
                ["train", "imported-model", "steps=1"],
                ["train", "imported-model", "load_parameters_path=imported-model", "steps=1"],
                ["generate", "imported-model", "a"],
                ["export", "imported-model", "exported"],
                ["explain", "imported-model"],
            ]
        )
        return Case("checkpoint", argv, files, harms=harms)
    run = "outputs/tiny"
    files[f"{run}/config.yml"] = settings
    files[f"{run}/checkpoints"] = Special("copy", "checkpoints")
    names = [*_of_checkpoints(), "text_damaged", "other_types", "replaced"]
    harms = [
        Harm(f"{run}/checkpoints/{rng.choice(['12', '12', '7'])}", name, rng.randrange(1 << 30))
        for name in rng.choices(names, k=rng.choice([1, 1, 2]))
        # Two of these may leave nothing for the other.
        if name not in {"renamed", "missing"} or rng.random() < 0.5
    ][:1]
    if rng.random() < 0.2:
        odd_one = rng.choice(["14", "9", "012", "12.damaged", "metadata", "x", "1e3"])
        files[f"{run}/checkpoints/{odd_one}"] = something(rng)
    argv = rng.choice(
        [
            ["train", "tiny.yml", "run_name=tiny", "steps=20"],
            ["train", "tiny.yml", "run_name=tiny", "steps=20", "verify_checkpoints=false"],
            ["train", "tiny.yml", "run_name=tiny", "steps=20", "optimizer=sgd"],
            ["generate", run, "a"],
            ["generate", f"{run}/checkpoints/12", "a"],
            ["export", run, "exported"],
            ["status", run],
        ]
    )
    return Case("checkpoint", argv, files, harms=harms)


def _of_checkpoints() -> list[str]:
    from tests.checkpoints.damage import HARMS

    return list(HARMS)


def data(rng: random.Random) -> Case:
    """Make text that is none, or not as it should be, and a tokenizer."""
    text = b"the router sends every token to its experts, and they answer. \n" * 80
    jsonl = "".join(json.dumps({"text": f"line {each}"}) + "\n" for each in range(40)).encode()
    contents: list[bytes | Special | None] = [
        *(b"", b"\x00\x01" * 5000, b"\xff\xfe" * 4000, text, b"x" * 3_000_000, b"\n" * 9000, b"a"),
        *(text[:2000] + b"\xc3", "é模🦊".encode() * 3000, gzip.compress(text), b"\xef\xbb\xbf"),
        *(text[:50] + b"\x00" + text, jsonl, damaged(jsonl, rng), gzip.compress(jsonl)[:40]),
        _other_values(jsonl, rng),
        *(Special("pipe"), Special("link", "nowhere"), Special("link", "."), Special("sparse")),
        *(Special("socket"), Special("deep"), Special("link", "/dev/zero"), None, something(rng)),
    ]
    names = ["a.txt", "a.jsonl", "a.json", "a.jsonl.gz", "a.gz", "a.parquet", "a.arrow", ".hidden"]
    names += ["é.txt", "a b.txt", "[x].txt", "-a.txt", "a=b.txt", "a\nb.txt", "\udcff.txt"]
    files: Files = {"tiny.yml": TINY_YML}
    for _ in range(rng.choice([1, 1, 2, 4])):
        files[f"text/{rng.choice(names)}"] = rng.choice(contents)
    first = next(name for name in files if name.startswith("text/"))
    where = rng.choice(
        [first, first, "text", "text/*", "text/**/*", "text/[", "text/**x", f"[{first},{first}]"]
    )
    where = rng.choice([where] * 6 + [odd(rng), f"{where},{where}", f"{where}/", f"./{where}"])
    keys = [f"dataset_path={where}"]
    if rng.random() < 0.4:
        files |= _tokenizer(rng)
        keys.append(rng.choice(["tokenizer_path=tok"] * 3 + ["tokenizer_path=tok/tokenizer.json"]))
    keys += rng.choice(
        [
            *([], [], [], [setting(rng)], ["eval_interval=2", "eval_holdout_fraction=0.5"]),
            ["eval_interval=2", f"eval_dataset_path={where}"],
            ["eval_interval=2", f"eval_dataset_path=a={where}"],
            ["max_target_length=4096"],
        ]
    )
    argv = ["train", "tiny.yml", *keys]
    return Case("data", argv, files)


def _tokenizer(rng: random.Random) -> Files:
    """Make a Hugging Face tokenizer, most often a damaged one."""
    words = {f"w{each}": each + 3 for each in range(20)} | {"<unk>": 0, "<s>": 1, "</s>": 2}
    added = [
        {"id": each, "content": word, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False, "special": True}
        for each, word in enumerate(("<unk>", "<s>", "</s>"))
    ]
    content: dict[str, Any] = {
        **{"version": "1.0", "truncation": None, "padding": None, "added_tokens": added},
        **{"normalizer": None, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None},
        **{"decoder": None, "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}},
    }
    ends = {"eos_token_id": rng.choice([2, 2, [2, 0]])}
    if rng.random() < 0.3:
        ends = other_json(ends, rng)
    text = json.dumps(content).encode()
    made = rng.choice(
        [
            text,
            json.dumps(other_json(content, rng, rng.randint(1, 2))).encode(),
            damaged(text, rng),
            something(rng),
        ]
    )
    files: Files = {"tok/tokenizer.json": made}
    name = rng.choice(["generation_config.json"] * 3 + ["config.json", "tokenizer_config.json"])
    files[f"tok/{name}"] = rng.choice(
        [json.dumps(ends).encode()] * 3 + [damaged(json.dumps(ends).encode(), rng), something(rng)]
    )
    return files


@functools.cache
def _models() -> dict[str, str]:
    return {name: json.dumps(model) for name, model in small_models().items()}


def hugging_face(rng: random.Random) -> Case:
    """Make a Hugging Face directory whose config, header or index is wrong."""
    small = json.loads(_models()[rng.choice(sorted(_models()))])
    config, shapes = small["config"], dict(small[rng.choice(["saved", "stacked"])])
    header: dict[str, Any] = {}
    at = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * BYTES["BF16"]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    what = rng.choice(["config", "config", "header", "file", "index", "beside", "alone"])
    if what in ("config", "alone"):
        config = other_json(config, rng, rng.choice([1, 1, 2, 3]))
    if what == "header":
        header = other_json(header, rng, rng.randint(1, 2))
    settings = json.dumps(config).encode()
    if what in ("config", "alone") and rng.random() < 0.3:
        settings = damaged(settings, rng)
    if what == "alone":
        model = "hf/config.json"
        return Case("Hugging Face", rng.choice(_commands(model, rng)), {model: settings})
    written = json.dumps(header).encode()
    if what == "header" and rng.random() < 0.3:
        written = damaged(written, rng)
    length = len(written)
    if what == "file" and rng.random() < 0.5:
        length = rng.choice([0, 1, length - 1, length + 1, 2**63, 2**64 - 1, 100_000_001])
    weights = struct.pack("<Q", length) + written + bytes(at)
    if what == "file":
        lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
        wheres = [weights[: rng.randrange(len(weights))], weights + b"x", lfs, weights]
        weights = rng.choice(wheres)
    files: Files = {"hf/config.json": settings, "hf/model.safetensors": weights}
    if what == "file" and rng.random() < 0.3:
        files["hf/model.safetensors"] = something(rng)
    if what == "index":
        name = "model-00001-of-00001.safetensors"
        index = {"metadata": {"total_size": at}, "weight_map": dict.fromkeys(shapes, name)}
        files[f"hf/{name}"] = files.pop("hf/model.safetensors")
        text = json.dumps(other_json(index, rng, rng.randint(1, 2))).encode()
        files["hf/model.safetensors.index.json"] = rng.choice(
            [text, damaged(json.dumps(index).encode(), rng), something(rng)]
        )
    if what == "beside":
        name = rng.choice(
            [
                *("generation_config.json", "tokenizer.json", "tokenizer_config.json"),
                *("chat_template.jinja", "tokenizer.model", "config.json", "adapter_config.json"),
                *("model.safetensors.index.json", "other.safetensors", "pytorch_model.bin"),
            ]
        )
        files[f"hf/{name}"] = something(rng)
    return Case("Hugging Face", rng.choice(_commands("hf", rng)), files)


def _commands(model: str, rng: random.Random) -> list[list[str]]:
    return [
        ["train", model, "steps=1"],
        ["train", model, "steps=1", setting(rng)],
        ["import", model, "imported"],
        ["import", model, "imported"],
        ["generate", model, "a"],
        ["explain", model],
        ["detect", model],
        ["compile", model, "h100:8"],
    ]
