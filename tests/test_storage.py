"""Files are whole or not there, and what changed since is named."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import StorageError, UserError
from pipelines.storage import (
    difference,
    held,
    inventory,
    sha256_of,
    write_folder,
    write_json,
    write_text,
)

WRITE_FOR_EVER = """
import sys
from itertools import count
from pathlib import Path
from pipelines.storage import write_json
for number in count():
    write_json(Path(sys.argv[1]), [number] * 50_000)
"""


def fill(folder: Path) -> None:
    (folder / "a.bin").write_bytes(bytes(range(256)) * 40)
    (folder / "b.json").write_text("{}")
    (folder / "empty").touch()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "made"
    write_folder(made, fill)
    return made


def test_a_file_is_replaced_and_its_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "a.json"
    write_json(path, {"a": [1]})
    write_json(path, {"a": [2]})
    assert json.loads(path.read_text()) == {"a": [2]}
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new" * 100_000 + "\ud800")
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for _ in range(4):
        path.unlink(missing_ok=True)
        command = [sys.executable, "-c", WRITE_FOR_EVER, str(path)]
        with subprocess.Popen(command) as writer:
            while not path.exists():
                assert writer.poll() is None
            for _ in range(20):
                assert len(set(json.loads(path.read_text()))) == 1
            writer.kill()
        value = json.loads(path.read_text())
        assert value == [value[0]] * 50_000


def test_a_folder_appears_with_everything_in_it(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["a.bin", "b.json", "empty"]
    assert list(folder.parent.iterdir()) == [folder]


def test_a_folder_that_cannot_be_filled_does_not_appear(tmp_path: Path) -> None:
    def half(aside: Path) -> None:
        fill(aside)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "made", half)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_of_the_same_number_left_is_no_hindrance(tmp_path: Path) -> None:
    aside = tmp_path / f".made.{os.getpid()}.tmp"
    aside.mkdir()
    (aside / "old").touch()
    write_folder(tmp_path / "made", fill)
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == [
        "a.bin",
        "b.json",
        "empty",
    ]
    (tmp_path / f".a.json.{os.getpid()}.tmp").mkdir()
    write_json(tmp_path / "a.json", {})
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "made"}


def test_all_of_a_folder_is_on_the_disk_before_it_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    monkeypatch.setattr(
        os, "fsync", lambda number: synced.append(Path(f"/proc/self/fd/{number}").readlink())
    )

    def nested(aside: Path) -> None:
        (aside / "sub").mkdir()
        fill(aside / "sub")

    write_folder(tmp_path / "made", nested)
    *made, last = synced
    aside = tmp_path / f".made.{os.getpid()}.tmp"
    assert {path.relative_to(aside).as_posix() for path in made} == {
        ".",
        "sub",
        "sub/a.bin",
        "sub/b.json",
        "sub/empty",
    }
    assert last == tmp_path


def test_a_folder_that_is_there_is_not_overwritten(folder: Path) -> None:
    before = inventory(folder)
    with pytest.raises(StorageError, match="not empty"):
        write_folder(folder, lambda aside: (aside / "other").touch())
    assert inventory(folder) == before


def test_a_full_disk_is_named_and_nothing_half_written_stays(tmp_path: Path) -> None:
    def fill(aside: Path) -> None:
        (aside / "whole").write_text("x")
        (aside / "full").symlink_to("/dev/full")
        (aside / "full").write_text("x")

    said = "cannot write .*/made: No space left on device; once that is mended, the same"
    with pytest.raises(StorageError, match=said) as refused:
        write_folder(tmp_path / "made", fill)
    assert refused.value.exit_code == 75
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.raises(UserError, match=r"cannot lock .*: No locks available; choose"),
        held(tmp_path / "run", "busy"),
    ):
        pass


def test_an_inventory_holds_sizes_and_hashes(folder: Path) -> None:
    found = inventory(folder)
    assert {name: entry["bytes"] for name, entry in found.items()} == {
        "a.bin": 10_240,
        "b.json": 2,
        "empty": 0,
    }
    nothing = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert found["empty"]["sha256"] == sha256_of(folder / "empty") == nothing
    assert difference(folder, found) == ""


@pytest.mark.parametrize("place", [0, 1, 5_000, 10_239])
def test_a_changed_byte_is_named(folder: Path, place: int) -> None:
    recorded = inventory(folder)
    data = bytearray((folder / "a.bin").read_bytes())
    data[place] ^= 1
    (folder / "a.bin").write_bytes(data)
    assert difference(folder, recorded) == "a.bin is not what was written: its SHA-256 differs"


def test_a_cut_or_missing_file_is_named(folder: Path) -> None:
    recorded = inventory(folder)
    (folder / "b.json").write_text("{")
    assert difference(folder, recorded) == "b.json has 1 bytes where 2 were written"
    (folder / "b.json").unlink()
    assert difference(folder, recorded) == "b.json is missing"
    (folder / "b.json").mkdir()
    assert difference(folder, recorded) == "b.json is missing"


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "sub/a"])
def test_an_inventory_cannot_point_elsewhere(folder: Path, name: str) -> None:
    (folder / "sub").mkdir()
    for path in (folder / "sub" / "a", folder.parent / "outside"):
        path.write_text("x")
    entry: dict[str, Any] = {"bytes": 1, "sha256": sha256_of(folder / "sub" / "a")}
    assert difference(folder, {name: entry}) == f"{name} is missing"
