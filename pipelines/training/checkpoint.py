"""The commit log of a run: what has been trained, and where to go on.

    attempts/000002.json                    a start of the worker group: from which commit, W
    checkpoints/step-000000100-000002/      model, optimizer and state, with a hashed manifest
    commits/000002-000000100.json           one small object, written last: the checkpoint counts

A checkpoint exists once its commit does. Commits of an attempt that was superseded lose to those
of a later one, whatever their step. Ray keeps no checkpoint of ours: this log is the truth.
"""

import json
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipelines.data.plan import Cursor
from pipelines.errors import DataError
from pipelines.storage import difference, inventory, sha256_of, write_folder, write_json

START_DIGEST = "0" * 64
KEPT_CHECKPOINTS = 3


@dataclass(frozen=True, kw_only=True)
class Commit:
    """A point of a run that survives everything after it."""

    step: int
    """Steps made so far."""
    attempt: int
    parent: str
    """Name of the commit before it; empty for the first."""
    cursor: Cursor
    digests: tuple[str, ...]
    """The chained digest after each step since the parent."""
    fates: dict[str, int]
    """How many rows so far met each fate."""
    workers: int
    manifest_sha256: str
    """Of the checkpoint's MANIFEST.json, which holds the hashes of its files."""

    @property
    def name(self) -> str:
        """Sorts by attempt, then step."""
        return f"{self.attempt:06d}-{self.step:09d}"

    @property
    def checkpoint(self) -> str:
        """Folder of its checkpoint."""
        return f"step-{self.step:09d}-{self.attempt:06d}"

    @property
    def digest(self) -> str:
        """Digest of everything trained on so far."""
        return self.digests[-1] if self.digests else START_DIGEST


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One start of the worker group."""

    number: int
    workers: int
    commit: str
    """Name of the commit it goes on from; empty for a start from scratch."""
    rejected: tuple[str, ...] = ()
    """Newer commits that could not be used, and why."""


class CommitLog:
    """The commits and checkpoints in the folder of a run."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def begin_attempt(self, workers: int) -> Attempt:
        """Record a start of the worker group from the newest commit that can be trusted.

        Raises:
            DataError: If there are commits, but none whose checkpoint is whole.
        """
        chosen, rejected = self.newest_whole()
        # What a killed process left half-written; a name is never used again.
        for remains in (self.run_dir / "checkpoints").glob(".*.tmp"):
            shutil.rmtree(remains, ignore_errors=True)
        taken = [int(path.stem) for path in (self.run_dir / "attempts").glob("*.json")]
        attempt = Attempt(
            number=max(taken, default=0) + 1,
            workers=workers,
            commit=chosen.name if chosen else "",
            rejected=rejected,
        )
        write_json(self.run_dir / "attempts" / f"{attempt.number:06d}.json", asdict(attempt))
        return attempt

    def attempts(self) -> list[Attempt]:
        """Return the starts of the worker group so far, oldest first."""
        paths = sorted((self.run_dir / "attempts").glob("*.json"))
        return [TypeAdapter(Attempt).validate_json(path.read_bytes()) for path in paths]

    def commit(self, name: str) -> Commit:
        """Return a commit by its name.

        Raises:
            DataError: If there is no such commit, or it cannot be read.
        """
        path = self.run_dir / "commits" / f"{name}.json"
        try:
            return TypeAdapter(Commit).validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise DataError(f"{path} is not a commit: {str(error).splitlines()[0]}") from error

    def newest(self) -> Commit | None:
        """Return the newest commit, whole or not, or None before the first."""
        names = self._names()
        return self.commit(names[0]) if names else None

    def newest_whole(self) -> tuple[Commit | None, tuple[str, ...]]:
        """Return the newest commit whose checkpoint is whole, and why newer ones are not.

        Raises:
            DataError: If there are commits, but none whose checkpoint is whole.
        """
        rejected: list[str] = []
        for name in self._names():
            wrong = self._wrong(name)
            if not wrong:
                return self.commit(name), tuple(rejected)
            rejected.append(f"{name}: {wrong}")
        if rejected:
            raise DataError(
                f"{self.run_dir}: no checkpoint is whole ({'; '.join(rejected)}); "
                "start a run of another name"
            )
        return None, ()

    def lineage(self, commit: Commit) -> list[Commit]:
        """Return the commits that led to one, oldest first, itself last."""
        line = [commit]
        while line[-1].parent:
            line.append(self.commit(line[-1].parent))
        return line[::-1]

    def checkpoint_dir(self, commit: Commit) -> Path:
        """Return the folder of a commit's checkpoint."""
        return self.run_dir / "checkpoints" / commit.checkpoint

    def load(self, commit: Commit) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the tensors of the model and of the optimizer, every hash checked.

        Raises:
            DataError: If a file of the checkpoint is not the one that was committed.
        """
        if wrong := self._wrong(commit.name):
            raise DataError(f"{self.checkpoint_dir(commit)}: {wrong}")
        folder = self.checkpoint_dir(commit)
        return load_file(folder / "model.safetensors"), load_file(folder / "optim.safetensors")

    def save(self, commit: Commit, model: dict[str, Tensor], optim: dict[str, Tensor]) -> Commit:
        """Write a checkpoint, then its commit; return it with its hash."""
        folder = self.checkpoint_dir(commit)

        def fill(aside: Path) -> None:
            save_file(model, aside / "model.safetensors")
            save_file(optim, aside / "optim.safetensors")
            write_json(aside / "state.json", asdict(commit) | {"manifest_sha256": ""})
            write_json(aside / "MANIFEST.json", inventory(aside))

        write_folder(folder, fill)
        whole = replace(commit, manifest_sha256=sha256_of(folder / "MANIFEST.json"))
        write_json(self.run_dir / "commits" / f"{whole.name}.json", asdict(whole))
        self._prune()
        return whole

    def _names(self) -> list[str]:
        """Return the names of all commits, newest first."""
        return sorted(
            (path.stem for path in (self.run_dir / "commits").glob("*.json")), reverse=True
        )

    def _wrong(self, name: str) -> str:
        """Return what is wrong with a commit or its checkpoint; empty if nothing is."""
        try:
            commit = self.commit(name)
        except DataError as error:
            return str(error)
        folder = self.checkpoint_dir(commit)
        listing = folder / "MANIFEST.json"
        if not listing.is_file():
            return f"{folder.name} is gone"
        if sha256_of(listing) != commit.manifest_sha256:
            return f"{folder.name}/MANIFEST.json is not what was written: its SHA-256 differs"
        if wrong := difference(folder, json.loads(listing.read_text())):
            return f"{folder.name}/{wrong}"
        # The commit itself has no hash, but its checkpoint holds a copy that has one.
        state = TypeAdapter(Commit).validate_json((folder / "state.json").read_bytes())
        if state != replace(commit, manifest_sha256=""):
            return f"the commit is not what was written: {folder.name}/state.json differs"
        return ""

    def _prune(self) -> None:
        """Remove old checkpoints, once two newer ones are known to be whole."""
        names = self._names()
        if len(names) > KEPT_CHECKPOINTS and not any(map(self._wrong, names[:2])):
            for name in names[KEPT_CHECKPOINTS:]:
                attempt, step = name.split("-")
                folder = self.run_dir / "checkpoints" / f"step-{step}-{attempt}"
                shutil.rmtree(folder, ignore_errors=True)


class Saver:
    """Saves in a thread, one at a time: training goes on while the last commit is written."""

    def __init__(self, log: CommitLog) -> None:
        self._log = log
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._outstanding: Future[Commit] | None = None

    def save(self, commit: Commit, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Copy the tensors now and write them later; waits for the save before."""
        self.wait()
        weights = {name: _copy(tensor) for name, tensor in model.state_dict().items()}
        moments = {name: _copy(tensor) for name, tensor in _moments(model, optimizer).items()}
        self._outstanding = self._pool.submit(self._log.save, commit, weights, moments)

    def wait(self) -> None:
        """Wait for the outstanding save and raise what went wrong in it."""
        if self._outstanding is not None:
            self._outstanding.result()
            self._outstanding = None


def restore(
    tensors: tuple[dict[str, Tensor], dict[str, Tensor]],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Put the loaded tensors of a checkpoint into a model and its optimizer."""
    weights, moments = tensors
    model.load_state_dict(weights)
    for name, parameter in model.named_parameters():
        optimizer.state[parameter] = {
            key.removesuffix(f"/{name}"): value.to(parameter.device, copy=True)
            for key, value in moments.items()
            if key.endswith(f"/{name}")
        }


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's tensors as `exp_avg/parameter.name`."""
    return {
        f"{key}/{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
