"""Save imported models as folders: any mesh reads them, and the export has the same bytes."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from moe_shard.autoep.directory import keep_hf
from moe_shard.checkpoints import imported
from moe_shard.checkpoints.imported import export_model, import_model, load_params, written_aside
from moe_shard.checkpoints.stored import open_stored
from moe_shard.config import Config, load_config
from moe_shard.errors import UserError
from moe_shard.models.params import Params, describe
from tests.autoep.checkpoints import BF16, KEYS, KINDS, Checkpoint, detect, make_checkpoint
from tests.autoep.test_transfer import MESHES, assert_are, specs_on
from tests.models.build import annotator, label, small_config

FUSED = "prefuse_moe_weights=true"


@pytest.fixture(autouse=True)
def _families(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_shard.autoep.detect.detect", detect)


def console() -> Console:
    return Console(width=200, file=io.StringIO())


def import_into(target: Path, source: Path, *overrides: str, ep: int = 8) -> Config:
    config = small_config({"expert": ep, "fsdp": 8 // ep}, *KEYS, *overrides)
    run = dataclasses.replace(config.run, load_parameters_path=str(source))
    config = dataclasses.replace(config, run=run)
    specs = describe(config.model, annotator(config)).specs
    import_model(source, target, config, specs, console=console())
    return config


def files_in(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def fused_by_hand(params: dict[str, Any]) -> dict[str, Any]:
    experts = params["layers"]["mlp"]["experts"]
    both = np.stack([experts["gate"], experts["up"]], axis=-2)
    mlp = params["layers"]["mlp"] | {"experts": {"gate_up": both, "down": experts["down"]}}
    return params | {"layers": params["layers"] | {"mlp": mlp}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return make_checkpoint(tmp_path_factory.mktemp("hf") / "model")


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Import the model on a mesh of its own, with EP 2."""
    target = tmp_path_factory.mktemp("imported") / "deep" / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            sys.modules, "moe_shard.autoep.detect", SimpleNamespace(detect=detect)
        )  # fmt: skip
        import_into(target, checkpoint.directory, ep=2)
    return target


def test_what_is_in_the_folder(model: Path, checkpoint: Checkpoint) -> None:
    assert {path.name for path in model.iterdir()} == {"config.yml", "params", "hf"}
    assert {path.name for path in model.parent.iterdir()} == {"model"}
    assert {path.name for path in (model / "hf").iterdir()} == {
        "config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja",
        "model.safetensors.index.json", "manifest.json", "carried.safetensors",
    }  # fmt: skip
    manifest = json.loads((model / "hf" / "manifest.json").read_text())
    assert manifest["family"] == "one-by-one"
    assert list(manifest["files"]) == [file.name for file in checkpoint.files]


def test_the_folder_is_a_model_that_begins_with_its_own_parameters(
    model: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(model, moved)
    for name in (str(moved), str(moved / "config.yml")):
        config = load_config(name, ["steps=7"])
        assert config.run.load_parameters_path == str(moved)
        assert config.data.tokenizer_path == str(moved / "hf")
        assert config.model == small_config({"expert": 2, "fsdp": 4}, *KEYS).model
        assert config.train.steps == 7
    again = load_config(str(moved), ["load_parameters_path=elsewhere"])
    assert again.run.load_parameters_path == "elsewhere"


@pytest.mark.parametrize("sizes", MESHES, ids=label)
def test_it_is_read_onto_any_mesh_fused_or_not(
    model: Path, checkpoint: Checkpoint, sizes: dict[str, int]
) -> None:
    assert_are(load_params(str(model), specs_on(sizes)), checkpoint.params, np.float32)
    fused = load_params(str(model), specs_on(sizes, FUSED))
    assert_are(fused, fused_by_hand(checkpoint.params), np.float32)


def test_a_hugging_face_directory_is_read_fused_as_well(checkpoint: Checkpoint) -> None:
    fused = load_params(str(checkpoint.directory), specs_on({"expert": 4, "fsdp": 2}, FUSED))
    assert_are(fused, fused_by_hand(checkpoint.params), np.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "overrides"),
    [(BF16, ()), (BF16, ("weight_dtype=bfloat16", FUSED)), (np.dtype(np.float32), (FUSED,))],
    ids=["widened", "as-it-is-fused", "float32-fused"],
)
def test_import_then_export_is_the_same_directory_to_the_byte(
    tmp_path: Path, kind: str, dtype: Any, overrides: tuple[str, ...]
) -> None:
    made = make_checkpoint(tmp_path / "hf", kind, dtype=dtype, files=3)
    import_into(tmp_path / "model", made.directory, *overrides)
    export_model(tmp_path / "model", tmp_path / "again", console=console())
    assert files_in(tmp_path / "again") == files_in(tmp_path / "hf")


@pytest.mark.parametrize("overrides", [(), (FUSED,)], ids=["apart", "fused"])
def test_an_export_reads_chunks_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...]
) -> None:
    monkeypatch.setattr(imported, "_CHUNK", 512)
    made = make_checkpoint(tmp_path / "hf", "interleaved")
    import_into(tmp_path / "model", made.directory, *overrides, ep=2)
    blocks = list(open_stored(tmp_path / "model" / "params").blocks())
    assert max(block.values.nbytes for block in blocks) <= 512
    assert {block.param[-1] for block in blocks} >= {"gate", "up", "down"}
    export_model(tmp_path / "model", tmp_path / "again", console=console())
    assert files_in(tmp_path / "again") == files_in(tmp_path / "hf")


def test_one_file_without_an_index_and_a_header_spelt_otherwise(tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path / "hf", files=1)
    (made.directory / "model.safetensors.index.json").unlink()
    file = made.files[0].rename(made.directory / "model.safetensors")
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["__metadata__"] = {"format": "pt", "note": "Erklärung"}
    turned = dict(reversed(header.items()))
    text = json.dumps(turned, indent=1, ensure_ascii=False).encode() + b" " * 17
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    import_into(tmp_path / "model", made.directory)
    export_model(tmp_path / "model", tmp_path / "again", console=console())
    assert files_in(tmp_path / "again") == files_in(tmp_path / "hf")


# Failures, and what they leave behind.


def assert_short(error: UserError, *parts: str) -> None:
    message = str(error)
    assert len(message.splitlines()) <= 3
    assert "fix: " in message
    for part in parts:
        assert part in message


def test_a_target_that_is_there_is_not_touched(tmp_path: Path, checkpoint: Checkpoint) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "mine").write_text("x")
    with pytest.raises(UserError) as caught:
        import_into(target, checkpoint.directory)
    assert_short(caught.value, str(target))
    assert files_in(tmp_path) == {"model/mine": b"x"}
    (target / "mine").unlink()
    with written_aside(target) as folder:
        (folder / "new").write_text("y")
    assert files_in(tmp_path) == {"model/new": b"y"}


def test_what_a_kill_has_left_is_named(tmp_path: Path, checkpoint: Checkpoint) -> None:
    (tmp_path / "model.partial").mkdir()
    with pytest.raises(UserError) as caught:
        import_into(tmp_path / "model", checkpoint.directory)
    assert_short(caught.value, "model.partial")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
@pytest.mark.parametrize("way", ["import", "export"])
def test_nothing_is_left_of_what_was_cut_off(
    tmp_path: Path, checkpoint: Checkpoint, model: Path, monkeypatch: pytest.MonkeyPatch,
    way: str, error: BaseException,
) -> None:  # fmt: skip
    def fail(*_: Any, **__: Any) -> None:
        raise error

    if way == "import":
        monkeypatch.setattr(imported, "load_params", fail)

        def start() -> None:
            import_into(tmp_path / "out", checkpoint.directory)

    else:
        monkeypatch.setattr(imported, "export_params", fail)

        def start() -> None:
            export_model(model, tmp_path / "out", console=console())

    expected = UserError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        start()
    if isinstance(caught.value, UserError):
        assert_short(caught.value, "No space left", str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_cannot_be_written(tmp_path: Path, model: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as caught:
        export_model(model, tmp_path / "file" / "out", console=console())
    assert_short(caught.value, "file/out")


def test_a_disk_without_room(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse before writing: on a full disk a write to mapped memory kills the process."""

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError) as caught:
        export_model(model, tmp_path / "out", console=console())
    assert_short(caught.value, "No space left", str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def break_manifest(folder: Path, change: Any) -> None:
    path = folder / "hf" / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def change_header(change: Any) -> Any:
    """Change the header of the file that holds the last norm."""

    def at(manifest: Any) -> None:
        name = next(n for n, text in manifest["files"].items() if "model.norm.weight" in text)
        header = json.loads(manifest["files"][name])
        change(header)
        manifest["files"][name] = json.dumps(header)

    return at


def set_norm(**values: Any) -> Any:
    return change_header(lambda header: header["model.norm.weight"].update(values))


def rename_file(name: str) -> Any:
    def change(manifest: Any) -> None:
        manifest["files"][name] = manifest["files"].pop(next(iter(manifest["files"])))

    return change


def copy_tensors(manifest: Any) -> None:
    first, second = manifest["files"]
    manifest["files"][second] = manifest["files"][first]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(rename_file("../out.safetensors"), id="above"),
        pytest.param(rename_file("/tmp/out.safetensors"), id="absolute"),
        pytest.param(rename_file("config.json"), id="another-file"),
        pytest.param(copy_tensors, id="twice"),
        pytest.param(lambda m: m.update(version=99), id="version"),
        pytest.param(lambda m: m.pop("files"), id="no-files"),
        pytest.param(lambda m: m["files"].update({"x.safetensors": "{"}), id="no-header"),
        pytest.param(lambda m: m["files"].update({"x.safetensors": "[]"}), id="no-object"),
        pytest.param(lambda m: m["files"].update({"x.safetensors": {}}), id="no-text"),
        pytest.param(change_header(lambda header: header.update(x=[])), id="no-tensor"),
        pytest.param(set_norm(dtype="F4"), id="dtype"),
        pytest.param(set_norm(shape=[-16]), id="shape"),
        pytest.param(set_norm(shape=[10**9]), id="size"),
        pytest.param(set_norm(data_offsets=[0, 2**62]), id="beyond-any-disk"),
        pytest.param(set_norm(data_offsets=[0, 32]), id="overlap"),
        pytest.param(change_header(lambda h: h.pop("model.norm.weight")), id="gap"),
    ],
)
def test_a_strangers_manifest_is_checked(tmp_path: Path, model: Path, change: Any) -> None:
    shutil.copytree(model, tmp_path / "model")
    break_manifest(tmp_path / "model", change)
    with pytest.raises(UserError) as caught:
        export_model(tmp_path / "model", tmp_path / "in" / "out", console=console())
    assert_short(caught.value)
    assert list((tmp_path / "in").iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"model", "in"}


def test_carried_tensors_that_are_gone_or_cut_short(tmp_path: Path, model: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    carried = tmp_path / "model" / "hf" / "carried.safetensors"
    raw = carried.read_bytes()
    for damage in (raw[:-8], raw[:6], b"\xff" * 8 + raw[8:], b"\x80" + raw, None):
        if damage is None:
            carried.unlink()
        else:
            carried.write_bytes(damage)
        with pytest.raises(UserError) as caught:
            export_model(tmp_path / "model", tmp_path / "out", console=console())
        assert_short(caught.value, "carried.safetensors")


@pytest.mark.parametrize("place", ["source", "kept"])
def test_a_link_out_of_the_directory_is_not_followed(
    tmp_path: Path, model: Path, place: str
) -> None:
    (tmp_path / "secret").write_text("secret")
    if place == "source":
        source = make_checkpoint(tmp_path / "hf").directory
        linked = source
    else:
        source = tmp_path / "model"
        shutil.copytree(model, source)
        linked = source / "hf"
    (linked / "merges.txt").symlink_to(tmp_path / "secret")
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError) as caught:
        keep_hf(str(source), tmp_path / "run")
    assert_short(caught.value, "merges.txt", "secret")
    assert not (tmp_path / "run" / "hf").exists()


def test_links_in_it_to_the_hubs_cache_and_to_a_file_of_that_name_are_followed(
    tmp_path: Path,
) -> None:
    hub = tmp_path / "models--a--b"
    made = make_checkpoint(hub / "snapshots" / "abc")
    (hub / "blobs").mkdir()
    (hub / "blobs" / "123").write_text("template")
    (made.directory / "chat_template.jinja").unlink()
    (made.directory / "chat_template.jinja").symlink_to("../../blobs/123")
    (made.directory / "vocab.json").symlink_to("tokenizer.json")
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "merges.txt").write_text("merges")
    (made.directory / "merges.txt").symlink_to(tmp_path / "shared" / "merges.txt")
    (tmp_path / "run").mkdir()
    keep_hf(str(made.directory), tmp_path / "run")
    assert (tmp_path / "run" / "hf" / "chat_template.jinja").read_text() == "template"
    assert (tmp_path / "run" / "hf" / "vocab.json").read_text() == "{}"
    assert (tmp_path / "run" / "hf" / "merges.txt").read_text() == "merges"


def test_hf_is_kept_once_and_from_an_imported_model_too(tmp_path: Path, model: Path) -> None:
    run = tmp_path / "run"
    (run / ".hf.partial").mkdir(parents=True)  # of a process that was killed
    keep_hf(str(model), run)
    assert files_in(run / "hf") == files_in(model / "hf")
    assert [path.name for path in run.iterdir()] == ["hf"]
    keep_hf(str(tmp_path / "gone"), run)
    assert files_in(run / "hf") == files_in(model / "hf")


def test_a_model_of_another_shape_is_refused(model: Path, checkpoint: Checkpoint) -> None:
    for path in (model, checkpoint.directory):
        with pytest.raises(UserError) as caught:
            load_params(str(path), specs_on({"expert": 8}, "base_emb_dim=32"))
        assert_short(caught.value)
    assert "of one model" in str(caught.value)


def test_scores_of_another_factor_are_refused(checkpoint: Checkpoint) -> None:
    specs = specs_on({"expert": 8})
    usual, folded = (
        small_config({"expert": 8}, *KEYS, f"attention_scale={scale}").model for scale in (-1, 1)
    )
    load_params(str(checkpoint.directory), specs, model=usual)
    with pytest.raises(UserError) as caught:
        load_params(str(checkpoint.directory), specs, model=folded)
    assert_short(caught.value, "attention_scale=-1", "this model has 1")


@pytest.mark.parametrize("name", ["params", "checkpoints", "hf"])
def test_a_hugging_face_directory_may_have_any_name(tmp_path: Path, name: str) -> None:
    made = make_checkpoint(tmp_path / name, "fused")
    specs = specs_on({"expert": 8})
    assert_are(load_params(str(made.directory), specs), made.params, np.float32)
    with pytest.raises(UserError) as caught:
        export_model(made.directory, tmp_path / "out", console=console())
    assert_short(caught.value, "no folder hf")


@pytest.mark.parametrize("what", ["nothing", "empty", "run"])
def test_a_path_without_parameters(tmp_path: Path, what: str) -> None:
    folder = tmp_path / what
    if what != "nothing":
        folder.mkdir()
    if what == "run":
        (folder / "checkpoints").mkdir()
    specs: Params = specs_on({"expert": 8})
    with pytest.raises(UserError) as caught:
        load_params(str(folder), specs)
    assert_short(caught.value, str(folder))


def test_what_came_from_no_hugging_face_model_is_not_exported(tmp_path: Path, model: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "hf")
    with pytest.raises(UserError) as caught:
        export_model(tmp_path / "model", tmp_path / "out", console=console())
    assert_short(caught.value, "hf")


def test_arrays_damaged(tmp_path: Path, model: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    for path in (tmp_path / "model" / "params" / "0" / "state").rglob("*"):
        if path.is_file() and path.stat().st_size > 64:
            path.write_bytes(path.read_bytes()[:32])
    with pytest.raises(UserError) as caught:
        load_params(str(tmp_path / "model"), specs_on({"expert": 8}))
    assert_short(caught.value, "import")
    with pytest.raises(UserError) as caught:
        export_model(tmp_path / "model", tmp_path / "out", console=console())
    assert_short(caught.value, "params/0", "import")
    assert not (tmp_path / "out").exists()
    assert jax.device_count() == 8
