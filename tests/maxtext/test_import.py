"""Read MaxText's checkpoints without MaxText: what each tensor fills, and what is refused."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

from moe_shard.autoep.host_blocks import leaves_of
from moe_shard.checkpoints.imported import import_model, load_params
from moe_shard.checkpoints.resolve import load_model
from moe_shard.cli import main
from moe_shard.config import Config, load_config
from moe_shard.config.mesh_config import MESH_AXES
from moe_shard.errors import UserError
from moe_shard.maxtext.folders import find_items
from moe_shard.models.params import describe
from tests.maxtext.written import Tree, tree_of, write
from tests.models.build import annotator

_HEADS = "base_num_query_heads=4 base_num_kv_heads=2 head_dim=16 "
_COMMON = (
    "vocab_size=256 base_emb_dim=64 base_mlp_dim=96 per_device_batch_size=1 max_target_length=16 "
    "dtype=float32 num_experts_per_tok=2 "
)
MODELS = {
    "mixtral": _HEADS + "base_num_decoder_layers=2 base_moe_mlp_dim=96 num_experts=8 "
    "attention_scale=1",
    "deepseek3": "base_num_decoder_layers=4 first_num_dense_layers=1 base_moe_mlp_dim=48 "
    "num_experts=8 shared_experts=1 attention_type=mla base_num_query_heads=4 base_num_kv_heads=4 "
    "q_lora_rank=24 kv_lora_rank=32 qk_nope_head_dim=16 qk_rope_head_dim=8 v_head_dim=12 "
    "routed_bias=true routed_score_func=sigmoid",
    "gpt-oss": _HEADS + "base_num_decoder_layers=4 base_moe_mlp_dim=96 num_experts=8 mlp_bias=true "
    'attention_bias=true attention_out_bias=true attention_sink=true router_bias=true '
    'attention_pattern=["sliding","global"] sliding_window_size=8',
    "llama4-128e": _HEADS + "base_num_decoder_layers=8 base_mlp_dim=80 base_moe_mlp_dim=96 "
    "num_experts=16 num_experts_per_tok=1 shared_experts=1 interleave_moe_layer_step=2 "
    'nope_layer_interval=4 attention_pattern=["chunked","chunked","chunked","global"] '
    "chunk_attn_window_size=8",
    "qwen3-dense": _HEADS + "base_num_decoder_layers=2 num_experts=1 num_experts_per_tok=1 "
    "use_qk_norm=true logits_via_embedding=true",
}  # fmt: skip
MESHES = {"expert": 8}, {"fsdp": 2, "expert": 4}, {"tensor": 2, "expert": 2, "fsdp": 2}

# A layer's names, the package's -> MaxText's, written out for each block without a pattern.
_NORMS = {
    "attention_norm.scale": "pre_self_attention_layer_norm/scale",
    "mlp_norm.scale": "post_self_attention_layer_norm/scale",
}
_ATTENTION = {x: f"self_attention/{x}/kernel" for x in ("query", "key", "value", "out")}
_LATENT = {
    "query_down": "wq_a/kernel",
    "query_norm.scale": "q_norm/scale",
    "query_up": "wq_b/kernel",
    "latent_down": "wkv_a/kernel",
    "latent_norm.scale": "kv_norm/scale",
    "latent_up": "wkv_b/kernel",
    "out": "out/kernel",
}
_GPT_OSS = {
    "query": "query/kernel", "key": "key/kernel", "value": "value/kernel", "out": "out/kernel",
    "query_bias": "query/bias", "key_bias": "key/bias", "value_bias": "value/bias",
    "out_bias": "out/bias", "sink": "sinks",
}  # fmt: skip
_EXPERTS = {"router.kernel": "gate/kernel", "experts.gate": "wi_0", "experts.up": "wi_1",
            "experts.down": "wo"}  # fmt: skip
_BIASES = {"router.bias": "gate/bias", "experts.gate_bias": "wi_0_bias",
           "experts.up_bias": "wi_1_bias", "experts.down_bias": "wo_bias"}  # fmt: skip
_DENSE = {"gate": "wi_0/kernel", "up": "wi_1/kernel", "down": "wo/kernel"}


def _under(ours: str, theirs: str, names: dict[str, str]) -> dict[str, str]:
    return {f"{ours}.{a}": f"{theirs}/{b}" for a, b in names.items()}


_PLAIN = _NORMS | {f"attention.{a}": b for a, b in _ATTENTION.items()}
_MLP = _under("mlp", "mlp", _DENSE)
_DEEPSEEK = _NORMS | _under("attention", "self_attention", _LATENT)
_BLOCK = "DeepSeekMoeBlock_0/MoeBlock_0"
LAYERS: dict[str, list[dict[str, str]]] = {
    "mixtral": [_PLAIN | _under("mlp", "MoeBlock_0", _EXPERTS)] * 2,
    "deepseek3": [_DEEPSEEK | _MLP] + [
        _DEEPSEEK | _under("mlp", _BLOCK, _EXPERTS | {"router.correction_bias": "gate/bias"})
        | _under("mlp.shared", "DeepSeekMoeBlock_0/shared_experts", _DENSE)
    ] * 3,
    "gpt-oss": [
        _NORMS | _under("attention", "GptOssAttention", _GPT_OSS)
        | _under("mlp", "GptOssMlp", _EXPERTS | _BIASES)
    ] * 4,
    "llama4-128e": [
        _PLAIN | _MLP,
        _PLAIN | _under("mlp", "Llama4MoEBlock_0/MoeBlock_0", _EXPERTS)
        | _under("mlp.shared", "Llama4MoEBlock_0/shared_experts", _DENSE),
    ] * 4,
    "qwen3-dense": [
        _PLAIN | _MLP | {"attention.query_norm.scale": "self_attention/query_norm/scale",
                         "attention.key_norm.scale": "self_attention/key_norm/scale"}
    ] * 2,
}  # fmt: skip
# Where each layer is: the folder of its tensors, and its index along their dim of layers.
PLACES: dict[str, list[tuple[str, int | None]]] = {
    "mixtral": [("layers", 0), ("layers", 1)],
    "mixtral-flat": [("layers_0", None), ("layers_1", None)],
    "deepseek3": [("dense_layers", 0), *(("moe_layers", i) for i in range(3))],
    "deepseek3-flat": [("dense_layers_0", None), *((f"moe_layers_{i}", None) for i in range(3))],
    "gpt-oss": [(f"layers/layers_{i % 2}", i // 2) for i in range(4)],
    "llama4-128e": [(f"layers/layers_{i % 4}", i // 4) for i in range(8)],
    "qwen3-dense": [("layers", 0), ("layers", 1)],
}
# Stacks of the package -> their layers.
STACKS: dict[str, dict[str, list[int]]] = {
    "mixtral": {"layers": [0, 1]},
    "deepseek3": {"layers_0": [0], "layers_1": [1, 2, 3]},
    "gpt-oss": {"layers_0": [0, 2], "layers_1": [1, 3]},
    "llama4-128e": {f"layers_{i}": [i, i + 4] for i in range(4)},
    "qwen3-dense": {"layers": [0, 1]},
}


def config_of(name: str, sizes: dict[str, int], *overrides: str) -> Config:
    mesh = [f"ici_{axis}_parallelism={sizes.get(axis, 1)}" for axis in MESH_AXES]
    keys = (_COMMON + MODELS[name.removesuffix("-flat")]).split()
    return load_config("mixtral-tiny", [*mesh, "logits_via_embedding=false", *keys, *overrides])


def read(folder: Path, config: Config, say: Callable[[str], object] = lambda _: None) -> Any:
    specs = describe(config.model, annotator(config)).specs
    return load_params(str(folder), specs, model=config.model, say=say)


def expected(tree: Tree, name: str) -> dict[str, np.ndarray]:
    """Return the package's parameters: each layer is sliced from its tensor, then stacked."""
    model = name.removesuffix("-flat")
    found = {
        "embedding.table": tree["params/params/token_embedder/embedding"],
        "final_norm.scale": tree["params/params/decoder/decoder_norm/scale"],
    }
    if "params/params/decoder/logits_dense/kernel" in tree:
        found["embedding.kernel"] = tree["params/params/decoder/logits_dense/kernel"]
    for stack, numbers in STACKS[model].items():
        for ours, theirs in LAYERS[model][numbers[0]].items():
            layers = []
            for number in numbers:
                folder, at = PLACES[name][number]
                array = tree.get(f"params/params/decoder/{folder}/{theirs}")
                axis = 1
                if array is None:  # a variable that is not a parameter
                    array, axis = tree[f"nnx_aux/model/decoder/{folder}/{theirs}"], 0
                layers.append(array if at is None else np.take(array, at, axis))
            found[f"{stack}.{ours}"] = np.stack(layers)
    return found


def assert_are(params: Any, wanted: dict[str, np.ndarray], dtype: Any = np.float32) -> None:
    """Compare all arrays bit for bit, each shard on its device, with no array extra or missing."""
    arrays = {".".join(path): array for path, array in leaves_of(params)}
    assert arrays.keys() == wanted.keys()
    for path, array in arrays.items():
        exact = wanted[path].astype(np.float32 if "router" in path else dtype)
        assert (array.shape, array.dtype) == (exact.shape, exact.dtype), path
        for shard in array.addressable_shards:
            assert np.asarray(shard.data).tobytes() == exact[shard.index].tobytes(), path


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tree]:
    folder = tmp_path_factory.mktemp("mixtral") / "run"
    tree = tree_of("mixtral")
    write(folder / "checkpoints", tree)
    return folder, tree


@pytest.mark.parametrize("name", PLACES)
def test_every_layer_is_where_it_belongs(tmp_path: Path, name: str) -> None:
    tree = tree_of(name)
    write(tmp_path, tree)
    told: list[str] = []
    assert_are(read(tmp_path, config_of(name, {"expert": 8}), told.append), expected(tree, name))
    assert any("arrays of the optimizer" in line for line in told)
    assert any("dim 1" in line for line in told) != name.endswith("-flat")


@pytest.mark.parametrize("sizes", MESHES)
def test_on_any_mesh(mixtral: tuple[Path, Tree], sizes: dict[str, int]) -> None:
    folder, tree = mixtral
    assert_are(read(folder, config_of("mixtral", sizes)), expected(tree, "mixtral"))


def test_chunks_of_a_run_on_many_devices(
    tmp_path: Path, mixtral: tuple[Path, Tree], monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = mixtral[1]
    mesh = annotator(config_of("mixtral", {"expert": 4, "fsdp": 2})).mesh

    def spread(path: str, array: np.ndarray) -> Any:
        if not path.startswith("params/"):
            return array
        axes = ("expert", None, "fsdp") if "MoeBlock_0/w" in path else ("fsdp",)
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*axes)))

    items = write(tmp_path, {path: spread(path, array) for path, array in tree.items()})
    chunks = ocp.PyTreeCheckpointHandler().metadata(items)
    wi = chunks["params"]["params"]["decoder"]["layers"]["MoeBlock_0"]["wi_0"]
    assert wi.storage.chunk_shape == (2, 2, 32, 96)
    assert_are(read(tmp_path, config_of("mixtral", {"expert": 8})), expected(tree, "mixtral"))
    # Only the experts, whose shards are two chunks there.
    monkeypatch.setattr("moe_shard.maxtext.read._LARGE", 100_000)
    cut = read(tmp_path, config_of("mixtral", {"expert": 2, "data": 4}))
    assert_are(cut, expected(tree, "mixtral"))


def test_gate_and_up_as_one_array_here(mixtral: tuple[Path, Tree]) -> None:
    folder, tree = mixtral
    params = read(folder, config_of("mixtral", {"expert": 8}, "prefuse_moe_weights=true"))
    wanted = expected(tree, "mixtral")
    halves = [wanted[f"layers.mlp.experts.{name}"] for name in ("gate", "up")]
    both = params["layers"]["mlp"]["experts"]["gate_up"]
    np.testing.assert_array_equal(both, np.stack(halves, axis=-2))


def _unwrapped(tree: Tree) -> Tree:
    """Convert to MaxText's form of parameters alone: NNX's tree, in bfloat16."""
    start = "params/params/"
    return {
        f"{path.removeprefix(start)}/value": array.astype(ml_dtypes.bfloat16)
        for path, array in tree.items()
        if path.startswith(start)
    }


def _stacked_first(tree: Tree) -> Tree:
    return {
        path: np.moveaxis(array, 1, 0) if "/layers/" in path and "params/" in path else array
        for path, array in tree.items()
    }


def _joined(tree: Tree) -> Tree:
    """Convert to the form of fused_qkv and prefuse_moe_weights."""
    new = dict(tree)
    layer = "params/params/decoder/layers"
    qkv = [new.pop(f"{layer}/self_attention/{x}/kernel") for x in ("query", "key", "value")]
    new[f"{layer}/self_attention/qkv_proj/kernel"] = np.concatenate(qkv, axis=2)
    halves = [new.pop(f"{layer}/MoeBlock_0/wi_{i}") for i in (0, 1)]
    new[f"{layer}/MoeBlock_0/wi"] = np.concatenate(halves, axis=-1)
    return new


@pytest.mark.parametrize("how", [_unwrapped, _stacked_first, _joined])
def test_other_layouts_of_maxtext(
    tmp_path: Path, mixtral: tuple[Path, Tree], how: Callable[[Tree], Tree]
) -> None:
    tree = mixtral[1]
    write(tmp_path, how(tree))
    wanted = expected(tree, "mixtral")
    if how is _unwrapped:
        wanted = {path: array.astype(ml_dtypes.bfloat16) for path, array in wanted.items()}
    assert_are(read(tmp_path, config_of("mixtral", {"expert": 8})), wanted)


@pytest.mark.parametrize(("zarr3", "ocdbt"), [(False, True), (False, False), (True, False)])
def test_other_formats_of_orbax(
    tmp_path: Path, mixtral: tuple[Path, Tree], zarr3: bool, ocdbt: bool
) -> None:
    tree = mixtral[1]
    items = write(tmp_path, tree, zarr3=zarr3, ocdbt=ocdbt)
    assert (items / "manifest.ocdbt").exists() == ocdbt
    assert_are(read(tmp_path, config_of("mixtral", {"expert": 8})), expected(tree, "mixtral"))


def test_gate_and_up_of_a_dense_mlp_in_one_tensor(tmp_path: Path) -> None:
    tree = tree_of("qwen3-dense")
    layer = "params/params/decoder/layers/mlp"
    joined = dict(tree)
    halves = [joined.pop(f"{layer}/wi_{i}/kernel") for i in (0, 1)]
    joined[f"{layer}/wi/kernel"] = np.stack(halves, axis=-2)
    write(tmp_path, joined)
    config = config_of("qwen3-dense", {"data": 8})
    assert_are(read(tmp_path, config), expected(tree, "qwen3-dense"))


def test_a_narrower_dtype_is_reported(mixtral: tuple[Path, Tree]) -> None:
    folder, tree = mixtral
    told: list[str] = []
    config = config_of("mixtral", {"expert": 8}, "weight_dtype=bfloat16")
    assert_are(read(folder, config, told.append), expected(tree, "mixtral"), ml_dtypes.bfloat16)
    assert any("rounded to bfloat16" in line for line in told)


def test_the_factor_of_the_scores_is_in_the_queries(mixtral: tuple[Path, Tree]) -> None:
    folder, tree = mixtral
    told: list[str] = []
    config = config_of("mixtral", {"expert": 8}, "attention_scale=-1")
    wanted = expected(tree, "mixtral")
    wanted["layers.attention.query"] = 4 * wanted["layers.attention.query"]  # sqrt(16), exactly
    assert_are(read(folder, config, told.append), wanted)
    assert any("read times 4 " in line for line in told)


def test_a_run_its_checkpoints_one_of_them_or_its_items(
    tmp_path: Path, mixtral: tuple[Path, Tree]
) -> None:
    step = mixtral[0] / "checkpoints" / "0"
    for folder in (step.parents[1], step.parent, step, step / "items"):
        assert find_items(folder) == step / "items"
    for newer in ("9", "10", "11.orbax-checkpoint-tmp-1"):
        (tmp_path / newer / "items").mkdir(parents=True)
    assert find_items(tmp_path) == tmp_path / "10" / "items"
    assert find_items(tmp_path / "gone") is None


def test_import_makes_a_folder_that_is_read(tmp_path: Path, mixtral: tuple[Path, Tree]) -> None:
    folder, tree = mixtral
    config = config_of("mixtral", {"expert": 8})
    model = tmp_path / "model"
    console = Console(width=200, file=io.StringIO())
    specs = describe(config.model, annotator(config)).specs
    import_model(folder, model, config, specs, console=console)
    assert {each.name for each in model.iterdir()} == {"config.yml", "params"}
    found = load_model(str(model), ["ici_expert_parallelism=4", "ici_fsdp_parallelism=2"])
    assert found.model == config.model
    assert_are(read(model, found), expected(tree, "mixtral"))


def broken(tree: Tree) -> Iterator[tuple[Tree, str, str]]:
    layer = "params/params/decoder/layers"
    missing = {path: array for path, array in tree.items() if not path.endswith("wi_1")}
    yield missing, "no tensor for mlp.experts.up of layer 0", "MoeBlock_0/wi_1"
    yield (
        tree | {f"{layer}/self_attention/q_norm/scale": np.ones((16, 2), np.float32)},
        ("q_norm/scale"),
        "is no parameter of this model",
    )
    yield (
        tree | {"params/params/vision_encoder/x": np.ones(3, np.float32)},
        ("vision_encoder/x"),
        "is no parameter of this model",
    )
    wi = tree[f"{layer}/MoeBlock_0/wi_0"]
    yield tree | {f"{layer}/MoeBlock_0/wi_0": wi[..., :-1]}, "[8, 2, 64, 95]", "base_moe_mlp_dim"
    yield tree | {f"{layer}/MoeBlock_0/wi_0": wi[:, :1]}, "has 1 layers along dim 1", "2 there"
    yield tree | {f"{layer}/MoeBlock_0/wi_0": np.moveaxis(wi, 1, 0)}, "along dim 0 in", "dim 1 in"
    yield tree | {f"{layer}/MoeBlock_0/wi_0": wi.astype(np.int8)}, "int8", "quantized"
    key = f"{layer}/pre_self_attention_layer_norm/scale"
    yield (
        tree | {"model/decoder/layers/pre_self_attention_layer_norm/scale": tree[key]},
        ("both "),
        "model/decoder",
    )
    yield {"params/params/other": np.ones(3, np.float32)}, "no tensor for embedding.kernel", ""


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, mixtral: tuple[Path, Tree]) -> None:
    config = config_of("mixtral", {"expert": 8})
    for number, (tree, *parts) in enumerate(broken(mixtral[1])):
        write(tmp_path / str(number), tree)
        refused(tmp_path / str(number), config, *parts)


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("base_num_decoder_layers=3", "has 2 layers along dim 1"),
        ("base_emb_dim=32", "base_emb_dim"),
        ("vocab_size=300", "vocab_size"),
        ("num_experts=4", "num_experts"),
        ("use_qk_norm=true", "key_norm"),
        ("logits_via_embedding=true", "logits_dense"),
        ("first_num_dense_layers=1", "no tensor for mlp.down of layer 0"),
        ("shared_experts=1", "no tensor for mlp.shared.down"),
        ("mtp_num_layers=1", "are not read from MaxText's checkpoints"),
    ],
)
def test_another_model_is_refused(mixtral: tuple[Path, Tree], override: str, part: str) -> None:
    refused(mixtral[0], config_of("mixtral", {"expert": 2, "data": 4}, override), part)


def test_parameters_alone_of_deepseek_lack_the_routers_bias(tmp_path: Path) -> None:
    tree = {path: a for path, a in tree_of("deepseek3").items() if path.startswith("params/")}
    write(tmp_path, tree)
    config = config_of("deepseek3", {"expert": 8})
    refused(tmp_path, config, "mlp.router.correction_bias of layer 1", "whole training state")


@pytest.mark.parametrize("damage", ["cut", "emptied", "no-metadata", "garbage", "not-orbax"])
def test_what_cannot_be_read(tmp_path: Path, mixtral: tuple[Path, Tree], damage: str) -> None:
    items = tmp_path / "0" / "items"
    shutil.copytree(mixtral[0] / "checkpoints" / "0" / "items", items)
    if damage in ("cut", "emptied"):
        for file in items.rglob("d/*"):
            file.write_bytes(file.read_bytes()[: 64 if damage == "cut" else 0])
    elif damage == "no-metadata":
        (items / "_METADATA").unlink()
    elif damage == "garbage":
        (items / "_METADATA").write_text("{]")
    else:
        shutil.rmtree(items)
        items.mkdir()
        (items / "model.bin").write_bytes(b"x")
    refused(tmp_path, config_of("mixtral", {"expert": 8}), "MaxText checkpoint", str(items))


def test_a_checkpoint_does_not_say_its_model(mixtral: tuple[Path, Tree], tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_model(str(mixtral[0]))
    assert "load_parameters_path=" in str(caught.value)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError) as caught:
        main(["import", str(tmp_path), str(tmp_path / "out"), "--model", "mixtral-tiny"])
    assert "leave --model out" in str(caught.value)


def refused(folder: Path, config: Config, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        read(folder, config)
    message = str(caught.value)
    assert len(message.splitlines()) <= 3, message
    assert "fix: " in message
    for part in parts:
        assert part in message, message
