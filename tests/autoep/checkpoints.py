"""Write Hugging Face directories in NumPy, with plans and parameters defined by hand."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np

from moe_shard.autoep.headers import TensorHeader, read_headers
from moe_shard.autoep.tensor_plan import Layout, Piece, TensorPlan

# The sizes of tests.models.build.SMALL, with a vocabulary that has room for all bytes.
KEYS = ("vocab_size=320",)
LAYERS, E, M, H, N, J, D, V = 3, 8, 16, 32, 8, 4, 8, 320
NAMES = {np.dtype(ml_dtypes.bfloat16): "BF16", np.dtype(np.float16): "F16",
         np.dtype(np.float32): "F32", np.dtype(np.float64): "F64",
         np.dtype(np.int64): "I64", np.dtype(np.uint8): "U8",
         np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3"}  # fmt: skip
BF16 = np.dtype(ml_dtypes.bfloat16)
CARRIED = "model.layers.3.eh_proj.weight", "model.rotary.steps"

Tensors = dict[str, np.ndarray]


def write_file(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write in the safetensors library's order: widest dtypes, then names; padded to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, tensor in sorted(tensors.items(), key=lambda kv: (-kv[1].itemsize, kv[0])):
        offsets = [len(data), len(data) + tensor.nbytes]
        shape = list(tensor.shape)
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": shape, "data_offsets": offsets}
        data += tensor.tobytes()
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def read_file(path: Path) -> Tensors:
    """Read all tensors of a safetensors file."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    dtypes = {name: dtype for dtype, name in NAMES.items()}
    found = {}
    for name, tensor in json.loads(raw[8 : 8 + length]).items():
        if name != "__metadata__":
            begin, end = (8 + length + offset for offset in tensor["data_offsets"])
            flat = np.frombuffer(raw[begin:end], dtypes[tensor["dtype"]])
            found[name] = flat.reshape(tensor["shape"])
    return found


def headers_of(*files: Path) -> dict[str, TensorHeader]:
    """Return the position of each tensor in its file."""
    found = {}
    for path in files:
        raw = path.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        for name, tensor in json.loads(raw[8 : 8 + length]).items():
            if name != "__metadata__":
                begin, end = (8 + length + offset for offset in tensor["data_offsets"])
                shape = tuple(tensor["shape"])
                found[name] = TensorHeader(path, tensor["dtype"], shape, begin, end)
    return found


@dataclass(frozen=True)
class Checkpoint:
    """Hold a Hugging Face directory and its expected contents.

    Attributes:
        directory: path of the files.
        tensors: all tensors by name.
        plan: the plan, written by hand.
        params: the parameters as nested dicts, by hand, in the checkpoint's dtype.
    """

    directory: Path
    tensors: Tensors
    plan: TensorPlan
    params: dict[str, Any]

    @property
    def files(self) -> list[Path]:
        return sorted(self.directory.glob("*.safetensors"))

    @property
    def headers(self) -> dict[str, TensorHeader]:
        return headers_of(*self.files)


def attention_and_norms(random: Any) -> Tensors:
    tensors = {
        "model.embed_tokens.weight": random(V, M),
        "lm_head.weight": random(V, M),
        "model.norm.weight": random(M),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        tensors |= {
            f"{at}.input_layernorm.weight": random(M),
            f"{at}.post_attention_layernorm.weight": random(M),
            f"{at}.self_attn.q_proj.weight": random(N * D, M),
            f"{at}.self_attn.k_proj.weight": random(J * D, M),
            f"{at}.self_attn.v_proj.weight": random(J * D, M),
            f"{at}.self_attn.o_proj.weight": random(M, N * D),
            f"{at}.mlp.gate.weight": random(E, M),
        }
    return tensors


def plan_of_attention_and_norms() -> list[Piece]:
    flip = Layout(order=(1, 0))
    pieces = [
        Piece("model.embed_tokens.weight", ("embedding", "table")),
        Piece("lm_head.weight", ("embedding", "kernel"), layout=flip),
        Piece("model.norm.weight", ("final_norm", "scale")),
    ]
    for layer in range(LAYERS):
        at, index = f"model.layers.{layer}", (layer,)
        heads = [("q_proj", "query", N), ("k_proj", "key", J), ("v_proj", "value", J)]
        pieces += [
            Piece(f"{at}.input_layernorm.weight", ("layers", "attention_norm", "scale"), index),
            Piece(f"{at}.post_attention_layernorm.weight", ("layers", "mlp_norm", "scale"), index),
            *(
                Piece(
                    f"{at}.self_attn.{theirs}.weight",
                    ("layers", "attention", ours),
                    index,
                    Layout(split=(count, D, M), order=(2, 0, 1)),
                )
                for theirs, ours, count in heads
            ),
            Piece(
                f"{at}.self_attn.o_proj.weight",
                ("layers", "attention", "out"),
                index,
                Layout(split=(M, N, D), order=(1, 2, 0)),
            ),
            Piece(f"{at}.mlp.gate.weight", ("layers", "mlp", "router", "kernel"), index, flip),
        ]
    return pieces


def params_of(tensors: Tensors, experts: dict[str, np.ndarray]) -> dict[str, Any]:
    def stack(name: str) -> np.ndarray:
        return np.stack([tensors[f"model.layers.{layer}.{name}.weight"] for layer in range(LAYERS)])

    def heads(name: str, count: int) -> np.ndarray:
        """Reshape [L (H D) M] to [L M H D]."""
        return np.moveaxis(stack(f"self_attn.{name}").reshape(LAYERS, count, D, M), 3, 1)

    out = stack("self_attn.o_proj").reshape(LAYERS, M, N, D)
    return {
        "embedding": {
            "table": tensors["model.embed_tokens.weight"],
            "kernel": tensors["lm_head.weight"].T,
        },
        "final_norm": {"scale": tensors["model.norm.weight"]},
        "layers": {
            "attention": {
                "query": heads("q_proj", N),
                "key": heads("k_proj", J),
                "value": heads("v_proj", J),
                "out": np.moveaxis(out, 1, 3),
            },
            "attention_norm": {"scale": stack("input_layernorm")},
            "mlp": {"experts": experts, "router": {"kernel": stack("mlp.gate").swapaxes(1, 2)}},
            "mlp_norm": {"scale": stack("post_attention_layernorm")},
        },
    }


def one_by_one(random: Any) -> tuple[Tensors, list[Piece], dict[str, np.ndarray]]:
    """Store experts as a list of modules, as in Mixtral's files."""
    tensors: Tensors = {}
    pieces: list[Piece] = []
    experts = {"gate": ("w1", M, H), "up": ("w3", M, H), "down": ("w2", H, M)}
    found = {
        ours: np.empty((LAYERS, E, a, b), random(1).dtype) for ours, (_, a, b) in experts.items()
    }
    for layer in range(LAYERS):
        for expert in range(E):
            for ours, (theirs, a, b) in experts.items():
                name = f"model.layers.{layer}.mlp.experts.{expert}.{theirs}.weight"
                tensors[name] = random(b, a)
                found[ours][layer, expert] = tensors[name].T
                param = ("layers", "mlp", "experts", ours)
                pieces.append(Piece(name, param, (layer, expert), Layout(order=(1, 0))))
    return tensors, pieces, found


def fused(random: Any) -> tuple[Tensors, list[Piece], dict[str, np.ndarray]]:
    """Store experts as 3-D tensors, gate before up."""
    tensors: Tensors = {}
    pieces: list[Piece] = []
    found = {name: np.empty((LAYERS, E, M, H), random(1).dtype) for name in ("gate", "up")}
    found["down"] = np.empty((LAYERS, E, H, M), random(1).dtype)
    everything = slice(None)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}.mlp.experts"
        both, down = random(E, 2 * H, M), random(E, M, H)
        tensors |= {f"{at}.gate_up_proj": both, f"{at}.down_proj": down}
        for expert in range(E):
            found["gate"][layer, expert] = both[expert, :H].T
            found["up"][layer, expert] = both[expert, H:].T
            found["down"][layer, expert] = down[expert].T
        cuts = {"gate": slice(0, H), "up": slice(H, 2 * H)}
        for ours, cut in cuts.items():
            layout = Layout(take=(everything, cut), order=(0, 2, 1))
            param = ("layers", "mlp", "experts", ours)
            pieces.append(Piece(f"{at}.gate_up_proj", param, (layer,), layout))
        param = ("layers", "mlp", "experts", "down")
        pieces.append(Piece(f"{at}.down_proj", param, (layer,), Layout(order=(0, 2, 1))))
    return tensors, pieces, found


def interleaved(random: Any) -> tuple[Tensors, list[Piece], dict[str, np.ndarray]]:
    """Store experts as 3-D tensors, gate and up alternating along the last dim, not transposed."""
    tensors: Tensors = {}
    pieces: list[Piece] = []
    found = {name: np.empty((LAYERS, E, M, H), random(1).dtype) for name in ("gate", "up")}
    found["down"] = np.empty((LAYERS, E, H, M), random(1).dtype)
    everything = slice(None)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}.mlp.experts"
        both, down = random(E, M, 2 * H), random(E, H, M)
        tensors |= {f"{at}.gate_up_proj": both, f"{at}.down_proj": down}
        for h in range(H):
            found["gate"][layer, :, :, h] = both[:, :, 2 * h]
            found["up"][layer, :, :, h] = both[:, :, 2 * h + 1]
        found["down"][layer] = down
        for first, ours in enumerate(("gate", "up")):
            layout = Layout(take=(everything, everything, slice(first, None, 2)))
            param = ("layers", "mlp", "experts", ours)
            pieces.append(Piece(f"{at}.gate_up_proj", param, (layer,), layout))
        pieces.append(Piece(f"{at}.down_proj", ("layers", "mlp", "experts", "down"), (layer,)))
    return tensors, pieces, found


KINDS = {"one-by-one": one_by_one, "fused": fused, "interleaved": interleaved}


def detect(
    directory: Path,
    family: str = "",
    tied: bool | None = None,
    _layers: int | None = None,
    _outside: bool = False,
    _ahead: int | None = None,
) -> SimpleNamespace:
    """Replace autoep's `detect`: return the plan by hand of the kind that config.json names."""
    kind = json.loads((directory / "config.json").read_text())["model_type"]
    assert family in {"", kind}
    assert not tied
    _, pieces, _ = KINDS[kind](lambda *shape: np.zeros(shape, BF16))
    return SimpleNamespace(
        family=kind,
        plan=TensorPlan((*plan_of_attention_and_norms(), *pieces), CARRIED),
        headers=read_headers(directory),
        settings={},
        cut=None,
    )


def make_checkpoint(
    directory: Path,
    kind: str = "one-by-one",
    *,
    dtype: np.dtype[Any] = BF16,
    files: int = 2,
    seed: int = 0,
) -> Checkpoint:
    """Write a directory: weights in several files, an index, and the small files.

    No two elements of the weights are equal in float32, and few are in bfloat16.
    """
    rng = np.random.default_rng(seed)

    def random(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / math.sqrt(shape[-1])).astype(dtype)

    tensors = attention_and_norms(random)
    experts, pieces, found = KINDS[kind](random)
    carried = {CARRIED[0]: random(M, 3), CARRIED[1]: np.arange(5)}
    tensors |= experts | carried
    directory.mkdir(parents=True)
    names = sorted(tensors)
    for number in range(files):
        file = f"model-{number + 1:05}-of-{files:05}.safetensors"
        write_file(directory / file, {name: tensors[name] for name in names[number::files]})
    places = [f"model-{at % files + 1:05}-of-{files:05}.safetensors" for at in range(len(names))]
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": dict(zip(names, places, strict=True)),
    }
    small = {
        "config.json": json.dumps({"model_type": kind}),
        "model.safetensors.index.json": json.dumps(index, indent=2),
        "generation_config.json": '{"eos_token_id": 2}\n',
        "tokenizer.json": "{}",
        "chat_template.jinja": "{{ messages }}",
    }
    for name, text in small.items():
        (directory / name).write_text(text)
    plan = TensorPlan((*plan_of_attention_and_norms(), *pieces), CARRIED)
    return Checkpoint(directory, tensors, plan, params_of(tensors, found))
