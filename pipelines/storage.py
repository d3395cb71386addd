"""Files that are whole or not there: written aside, synced, then renamed; folders that are held."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from pipelines.errors import StorageError, UserError


@contextmanager
def held(folder: Path, busy: str) -> Iterator[None]:
    """Hold a folder, made where there is none; the lock goes with the process, however it ends.

    Raises:
        UserError: With the message `busy` if another process holds it, or if it cannot be written
            or locked.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(busy) from error
        except OSError as error:  # network file systems may have no locks
            raise UserError(
                f"cannot lock {folder}: {error.strerror}; choose one on a file system with locks"
            ) from error
        yield


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say of a failure to write what was to be written, and what to do.

    Raises:
        StorageError: If the disk is full, or does not take it for another reason.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StorageError(
            f"cannot write {path}: {reason}; once that is mended, the same command goes on"
        ) from error


def write_file(path: Path, fill: Callable[[Path], object]) -> None:
    """Write a file that a crash leaves either old or new; `fill` writes the one it is given.

    Raises:
        StorageError: If it cannot be written.
    """
    with _aside(path) as aside:
        fill(aside)


def write_text(path: Path, text: str) -> None:
    """Write a text file that a crash leaves either old or new.

    Raises:
        StorageError: If it cannot be written.
    """
    write_file(path, lambda aside: aside.write_text(text))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that a crash leaves either old or new.

    Raises:
        StorageError: If it cannot be written.
    """
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder that a crash leaves either complete or not there.

    `fill` writes its files into the folder it is given.

    Raises:
        StorageError: If it cannot be written, or is there already.
    """
    with _aside(path) as aside:
        aside.mkdir()
        fill(aside)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def inventory(folder: Path) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of every file of a flat folder, by name."""
    return {
        file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
        for file in sorted(folder.iterdir())
    }


def difference(folder: Path, recorded: dict[str, dict[str, Any]]) -> str:
    """Return how the files of a folder differ from an inventory; empty if they do not."""
    for name, entry in recorded.items():
        file = folder / name
        if Path(name).name != name or not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{name} has {file.stat().st_size} bytes where {entry['bytes']} were written"
        if sha256_of(file) != entry["sha256"]:
            return f"{name} is not what was written: its SHA-256 differs"
    return ""


@contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """Give a name beside a path; what is made there takes its place, or is removed.

    Raises:
        StorageError: If it cannot be written.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(aside)  # of a killed process: in containers they often have the same number
        try:
            yield aside
            for made in (aside, *aside.rglob("*")):
                _sync(made)
            aside.replace(path)
        finally:
            _remove(aside)
        _sync(path.parent)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
