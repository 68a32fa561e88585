"""What is said of a bucket, and how a run's files follow it from machine to machine."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_shard.checkpoints.bucket import Bucket
from moe_shard.checkpoints.checksums import Damage, read_manifest
from moe_shard.checkpoints.in_bucket import InBucket, place_of
from moe_shard.checkpoints.place import InFolder
from moe_shard.checkpoints.run_files import COPIED, address_of, checkpoint_names, fetch, here
from moe_shard.checkpoints.whole import find_whole
from moe_shard.config import load_config
from moe_shard.errors import UserError
from moe_shard.training.copies import Copies, kept_in_bucket
from moe_shard.training.run_folder import open_run, run_path
from tests.checkpoints.emulator import BUCKET, emulator, environment, free_port

ROOT = f"gs://{BUCKET}/runs"


@pytest.fixture(scope="module")
def served() -> Iterator[dict[str, str]]:
    with emulator() as variables:
        yield variables


@pytest.fixture
def bucket(
    served: dict[str, str], request: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> str:
    """Return an address of the test's own; the current folder is a machine's."""
    for name, value in served.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return f"{ROOT}/{request.node.name.partition('[')[0]}"


def refusal(address: str) -> str:
    with pytest.raises(UserError) as caught:
        Bucket(address).reach()
    assert len(str(caught.value).splitlines()) == 2
    return str(caught.value)


@pytest.mark.usefixtures("bucket")
def test_what_a_bucket_lacks_is_said() -> None:
    Bucket(ROOT).reach()
    assert "there is no bucket 'another'" in refusal("gs://another/runs")


def test_one_that_cannot_be_reached_is_said_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment(free_port()).items():
        monkeypatch.setenv(name, value)
    began = time.monotonic()
    assert "cannot be reached" in (said := refusal(ROOT))
    assert "refused" in said
    assert time.monotonic() - began < 12


def test_credentials_and_packages_that_are_missing_are_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "any")
    assert "no credentials" in refusal(ROOT)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert "pip install 'moe_shard[gcs]'" in refusal(ROOT)


def test_no_permission_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from google.api_core.exceptions import Forbidden

    def refuse(*_: object) -> None:
        raise Forbidden("someone does not have storage.objects.create access")

    monkeypatch.setattr(Bucket, "_probe", refuse)
    assert "storage.objects.create" in (said := refusal(ROOT))
    assert "fix: the roles storage.objectUser" in said


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("s3://b/x", ["Orbax 0.12 writes none to Amazon S3", "mounted (Mountpoint or s3fs-fuse)"]),
        ("az://b/x", ["Azure", "blobfuse2"]),
        ("https://b/x", ["no checkpoint is written to https://"]),
        ("gs://", ["is not the name of a bucket", "gs://BUCKET/PATH"]),
        ("gs://B_C/x", ["B_C is not the name of a bucket"]),
        ("gs://bucket/a/../b", [".. cannot be part of an address"]),
        ("gs://bucket/a?b", ["a?b cannot be part"]),
    ],
)
def test_addresses_that_cannot_be_written_are_refused(address: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_config("mixtral-tiny", [f"base_output_directory={address}"])
    assert len(str(caught.value).splitlines()) == 2
    for each in words:
        assert each in str(caught.value)


def test_a_path_names_its_place(tmp_path: Path) -> None:
    assert isinstance(place_of(tmp_path), InFolder)
    place = place_of(f"{ROOT}/first/checkpoints")
    assert isinstance(place, InBucket)
    assert str(place.path / "3") == f"{ROOT}/first/checkpoints/3"


def config_of(address: str) -> Any:
    base, _, name = address.rpartition("/")
    return load_config("mixtral-tiny", [f"base_output_directory={base}", f"run_name={name}"]).run


def test_files_follow_a_run_to_another_machine(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    config = config_of(bucket)
    with (
        open_run(config) as folder,
        kept_in_bucket(folder, writer=True, say=said.append) as follow,
    ):
        assert folder == run_path(config) == tmp_path / "outputs/gs" / bucket.removeprefix("gs://")
        assert address_of(folder) == bucket
        (folder / "metrics.jsonl").write_text("1\n2\n")
        (folder / ".hidden").write_text("")
        (folder / "tensorboard").mkdir()
        (folder / "tensorboard" / "events").write_text("curves")
        follow(None)
    assert said == [
        f"the run's files are in {folder}, and copied to {bucket} with every checkpoint"
    ]
    assert {*Bucket(bucket).listed()[0]} == {"metrics.jsonl", COPIED}
    assert Bucket(bucket).read("tensorboard/events") == b"curves"

    (other := tmp_path / "other").mkdir()
    monkeypatch.chdir(other)
    assert fetch(bucket) == here(bucket)
    written = Bucket(bucket).listed()[0]["metrics.jsonl"].written
    assert abs((here(bucket) / "metrics.jsonl").stat().st_mtime - written) < 0.01
    assert {each.name for each in here(bucket).iterdir()} == {"metrics.jsonl", COPIED}
    # It goes on there, and the first machine comes back behind it.
    with open_run(config) as second, kept_in_bucket(second, writer=True, say=said.append):
        (second / "metrics.jsonl").write_text("1\n2\n3\n")
    monkeypatch.chdir(tmp_path)
    assert (fetch(bucket) / "metrics.jsonl").read_text() == "1\n2\n3\n"


def test_a_name_that_leaves_the_folder_is_refused(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Bucket(bucket).write("x.json", b"{}")
    Bucket(bucket).write(COPIED, b'{"address": "x", "copies": 9}')
    # The emulator takes no such name, which is a file's to it; a bucket does.
    (stored,) = (each for name, each in Bucket(bucket).listed()[0].items() if name == "x.json")
    monkeypatch.setattr(Bucket, "find", lambda *_: {"../../../x.json": stored})
    with pytest.raises(UserError, match=r"hf/\.\./\.\./\.\./x.json.*leaves the run's folder"):
        fetch(bucket)


def test_what_is_ahead_here_stays(bucket: str) -> None:
    with open_run(config_of(bucket)) as folder, kept_in_bucket(folder, writer=True, say=print):
        (folder / "metrics.jsonl").write_text("1\n")
    (folder / "metrics.jsonl").write_text("1\n2\n")  # and was killed before it was copied
    assert (fetch(bucket) / "metrics.jsonl").read_text() == "1\n2\n"


def test_a_copy_that_fails_is_said_and_tried_again(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    with open_run(config_of(bucket)) as folder:
        copies = Copies(folder, bucket, said.append)
        with monkeypatch.context() as broken:
            broken.setattr(Bucket, "write", _refuse_write)
            (folder / "best.json").write_text("{}")
            copies.finish()
        assert len(said) == 1
        assert "not copied" in said[0]
        assert "no route" in said[0]
        copies.finish()
    assert len(said) == 1
    assert Bucket(bucket).read("best.json") == b"{}"


def _refuse_write(*_: object) -> None:
    raise OSError(5, "no route")


def put(place: str, updates: int, *, committed: bool = True) -> None:
    """Put what looks like a checkpoint, without arrays, into the bucket."""
    bucket, where = Bucket(place), InBucket(place)
    bucket.write(f"{updates}/state/d/array", bytes([updates]) * 100)
    bucket.write(f"{updates}/config/metadata", b"{}")
    bucket.write(f"{updates}/_CHECKPOINT_METADATA", b'{"custom": {"checksums": "checksums.json"}}')
    where._write_manifest(str(updates), "a run")
    if committed:
        bucket.write(f"{updates}/commit_success.txt", b"")


HARMS = {
    "other contents": lambda bucket: bucket.write("2/state/d/array", b"?" * 100),
    "99 bytes of 100": lambda bucket: bucket.write("2/state/d/array", b"?" * 99),
    "array is missing": lambda bucket: bucket.remove(["2/state/d/array"]),
    "checksums.json is missing": lambda bucket: bucket.remove(["2/checksums.json"]),
    "checksums.json cannot be read": lambda bucket: bucket.write("2/checksums.json", b"{"),
    "saved after step 1": lambda bucket: bucket.copy([("1/checksums.json", "2/checksums.json")]),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_checkpoint_is_set_aside(bucket: str, harm: str) -> None:
    place = f"{bucket}/{[*HARMS].index(harm)}/checkpoints"
    put(place, 1)
    put(place, 2)
    put(place, 3, committed=False)
    said: list[str] = []
    whole = find_whole(place_of(place), set_aside=True, say=said.append)
    assert whole is not None
    assert (whole.updates, said) == (2, [])
    assert InBucket(place).names() == ["1", "2"]  # what was not finished is gone

    HARMS[harm](Bucket(place))
    harmed = Bucket(place).find("2")
    whole = find_whole(place_of(place), set_aside=True, say=said.append)
    assert whole is not None
    assert whole.updates == 1
    assert len(said) == 1
    assert harm in said[0]
    assert "set aside as 2.damaged" in said[0]
    assert InBucket(place).names() == ["1", "2.damaged"]
    assert Bucket(place).find("2.damaged") == harmed
    put(place, 2)
    HARMS["other contents"](Bucket(place))
    assert find_whole(place_of(place), set_aside=True) == whole
    assert InBucket(place).names() == ["1", "2.damaged", "2.damaged-2"]


def test_only_damaged_ones_are_refused(bucket: str) -> None:
    place = f"{bucket}/checkpoints"
    put(place, 2)
    HARMS["other contents"](Bucket(place))
    with pytest.raises(UserError, match="2 is damaged: state/d/array has other contents"):
        find_whole(place_of(place), set_aside=True)
    assert InBucket(place).names() == ["2"]
    manifest = InBucket(place).manifest("2")
    assert manifest is not None
    with pytest.raises(Damage):
        InBucket(place).compare("2", manifest, verify=True, part=0, parts=2)
    assert InBucket(place).compare("2", manifest, verify=True, part=1, parts=2) == ()


def test_names_of_checkpoints_here_and_there(bucket: str, tmp_path: Path) -> None:
    put(f"{bucket}/checkpoints", 7)
    with open_run(config_of(bucket)) as folder:
        assert checkpoint_names(folder) == ["7"]
    (tmp_path / "checkpoints" / "9").mkdir(parents=True)
    assert checkpoint_names(tmp_path) == ["9"]
    assert checkpoint_names(tmp_path / "none") == []
    place = InBucket(f"{bucket}/checkpoints")
    assert place.kept_text("run") is None
    place.keep_text("run", "a name")
    assert place.kept_text("run") == "a name"
    assert place.names() == ["7"]
    assert read_manifest(tmp_path / "checkpoints" / "9") is None
