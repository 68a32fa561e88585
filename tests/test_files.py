"""Check that files and folders are written completely or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_shard.errors import UserError
from moe_shard.files import (
    expanded,
    find_below,
    new_folder,
    pass_over_hole,
    read_small,
    write_bytes,
    write_text,
)


def cut_off(self: Path, content: bytes) -> int:
    with self.open("wb") as file:
        file.write(content[: len(content) // 2])
    raise OSError("no space left on device")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    write_text(path, "new é")
    assert path.read_text(encoding="utf-8") == "new é"
    monkeypatch.setattr(Path, "write_bytes", cut_off)
    with pytest.raises(OSError, match="no space"):
        write_text(path, "newest")
    assert path.read_text(encoding="utf-8") == "new é"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_leaves_nothing_beside_the_file(tmp_path: Path) -> None:
    write_bytes(tmp_path / "file", b"\r\n")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"\r\n"


def test_a_folder_has_its_name_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    with new_folder(target) as folder:
        assert folder.parent == target.parent
        assert not target.exists()
        (folder / "file").write_text("text")
    assert list(target.parent.iterdir()) == [target]
    assert (target / "file").read_text() == "text"


def test_a_folder_whose_block_raises_is_removed(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "file").write_text("text")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "a") as folder:
        fail(folder)
    assert list(tmp_path.iterdir()) == []


def test_of_two_writers_of_a_folder_the_first_to_end_wins(tmp_path: Path) -> None:
    def write(name: str, meanwhile: Callable[[], None] = lambda: None) -> None:
        with new_folder(target) as folder:
            (folder / "file").write_text(name)
            meanwhile()

    target = tmp_path / "a"
    with pytest.raises(OSError, match="not empty"):
        write("slow", lambda: write("fast"))
    assert list(tmp_path.iterdir()) == [target]
    assert (target / "file").read_text() == "fast"


def test_a_folder_with_a_fixed_name_has_one_writer(tmp_path: Path) -> None:
    aside = tmp_path / "a.partial"
    with new_folder(tmp_path / "a", aside):
        with (
            pytest.raises(UserError, match=r"another process writes it.*\nfix: "),
            new_folder(tmp_path / "a", aside),
        ):
            pass
        assert aside.is_dir()
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


def test_a_home_of_nobody_is_refused() -> None:
    with pytest.raises(UserError, match="no home directory"):
        expanded("~no such user/x")


def test_what_never_ends_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    for endless in (path, Path("/dev/zero")):
        with pytest.raises(UserError, match="more than 16 MiB"):
            read_small(endless)
    path.write_bytes(b"a")
    assert read_small(path, 1) == b"a"


def test_a_pipe_is_read_and_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert read_small(pipe) == b""  # nobody writes
    monkeypatch.setattr("moe_shard.files._WAIT_S", 0.05)
    writer = os.open(pipe, os.O_RDWR)
    try:
        with pytest.raises(UserError, match="nothing came through"):
            read_small(pipe)
    finally:
        os.close(writer)


def test_what_is_no_file_is_written_to_and_stays(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="No such device"):  # nobody reads
        write_bytes(pipe, b"text")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_bytes(pipe, b"text")
        assert os.read(reader, 100) == b"text"
    finally:
        os.close(reader)
    (tmp_path / "link").symlink_to(pipe)
    with pytest.raises(OSError, match="No such device"):
        write_bytes(tmp_path / "link", b"text")
    assert {path.name for path in tmp_path.iterdir()} == {"pipe", "link"}
    assert pipe.is_fifo()


def test_a_search_below_a_folder_has_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    for number in range(5):
        (tmp_path / "a" / "b" / f"{number}.pb").touch()
    assert [path.name for path in find_below(tmp_path, "[24].pb")] in (
        ["2.pb", "4.pb"],
        ["4.pb", "2.pb"],
    )
    monkeypatch.setattr("moe_shard.files._MOST_FILES", 7)
    with pytest.raises(UserError, match="more than 7 files are below it"):
        find_below(tmp_path, "*.pb")


def test_a_hole_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.write(b"first\n")
        file.seek(8 << 30)
        file.write(b"last\n")
        file.truncate(16 << 30)
    with path.open("rb") as file:
        assert file.readline() == b"first\n"
        file.seek(1 << 20)
        pass_over_hole(file)
        assert file.read(1 << 20).strip(b"\0") == b"last\n"
        pass_over_hole(file)
        assert not file.read(1)
