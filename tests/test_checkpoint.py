"""The commit log: what was trained is found again bit for bit, or an older state is, and said."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipelines.data.plan import Cursor
from pipelines.errors import DataError, StorageError
from pipelines.storage import write_json
from pipelines.training.checkpoint import (
    KEPT_CHECKPOINTS,
    START_DIGEST,
    Commit,
    CommitLog,
    Saver,
    restore,
)

FILES = ("model.safetensors", "optim.safetensors", "state.json", "MANIFEST.json")


class Tied(nn.Module):
    """A module that uses one of its parameters under two names, as a BERT does."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.hidden = nn.Linear(3, 3)
        self.output = nn.Linear(3, 5)
        self.output.weight = self.embedding.weight
        self.register_buffer("scale", torch.tensor(1.5))

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits of each id."""
        logits: Tensor = self.output(torch.tanh(self.hidden(self.embedding(ids))))
        return logits


class Training:
    """A model that is trained on a made-up batch a step."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = Tied()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05)

    def advance(self, first: int, last: int) -> None:
        """Make the steps from `first` to before `last`."""
        for step in range(first, last):
            ids = torch.randint(5, (4,), generator=torch.Generator().manual_seed(step))
            self.optimizer.zero_grad()
            torch.autograd.backward(self.model(ids).square().sum())
            self.optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that the next step depends on."""
        found = dict(self.model.state_dict())
        for name, parameter in self.model.named_parameters():
            state = self.optimizer.state[parameter]
            found |= {f"{name} {key}": value for key, value in state.items()}
        return found


def make_commit(step: int, attempt: int = 1, parent: str = "") -> Commit:
    return Commit(
        step=step,
        attempt=attempt,
        parent=parent,
        cursor=Cursor(step, 7, 1),
        digests=("ab" * 32, "cd" * 32),
        fates={"paired": step},
        workers=2,
        manifest_sha256="",
    )


def save(log: CommitLog, step: int, attempt: int = 1, parent: str = "") -> Commit:
    tensors = {"weight": torch.full((300,), float(step))}
    commit = make_commit(step, attempt, parent)
    return log.save(commit, tensors, {"exp_avg/weight": torch.full((200,), float(attempt))})


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(tensor, second[name]) and tensor.dtype == second[name].dtype
        for name, tensor in first.items()
    )


@pytest.fixture
def log(tmp_path: Path) -> CommitLog:
    return CommitLog(tmp_path / "run")


def test_a_first_attempt_starts_from_scratch(log: CommitLog) -> None:
    attempt = log.begin_attempt(3)
    assert (attempt.number, attempt.workers, attempt.commit, attempt.rejected) == (1, 3, "", ())
    assert log.newest() is None
    assert log.begin_attempt(2).number == 2
    assert [found.workers for found in log.attempts()] == [3, 2]


def test_what_was_saved_is_loaded_bit_for_bit(log: CommitLog) -> None:
    training = Training()
    training.advance(0, 3)
    saver = Saver(log)
    saver.save(make_commit(3), training.model, training.optimizer)
    expected = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
    training.advance(3, 5)  # what is written is what it was when it was saved
    saver.wait()

    name = log.begin_attempt(1).commit
    commit = log.commit(name)
    assert commit == log.newest()
    assert replace(commit, manifest_sha256="") == make_commit(3)
    assert commit.digest == commit.digests[-1]
    model, optim = log.load(commit)
    assert equal(model, expected)
    assert set(optim) >= {"exp_avg/hidden.weight", "exp_avg_sq/embedding.weight"}


@pytest.mark.parametrize("stop", [0, 1, 4])
def test_a_restored_training_goes_on_bit_for_bit(log: CommitLog, stop: int) -> None:
    whole = Training()
    whole.advance(0, 8)
    first = Training()
    first.advance(0, stop)
    saver = Saver(log)
    saver.save(make_commit(stop), first.model, first.optimizer)
    saver.wait()

    second = Training(seed=99)
    second.advance(50, 53)
    restore(log.load(log.commit(log.begin_attempt(1).commit)), second.model, second.optimizer)
    assert equal(second.tensors(), first.tensors())
    assert second.model.output.weight is second.model.embedding.weight
    second.advance(stop, 8)
    assert equal(second.tensors(), whole.tensors())


def test_a_restored_training_does_not_share_memory_with_what_was_loaded(log: CommitLog) -> None:
    training = Training()
    training.advance(0, 2)
    saver = Saver(log)
    saver.save(make_commit(2), training.model, training.optimizer)
    saver.wait()
    loaded = log.load(log.commit(log.begin_attempt(1).commit))
    copies = [{name: tensor.clone() for name, tensor in part.items()} for part in loaded]
    restore(loaded, training.model, training.optimizer)
    training.advance(2, 4)
    assert all(equal(part, copy) for part, copy in zip(loaded, copies, strict=True))


# Damage


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("place", [0.0, 0.1, 0.5, 0.9, 0.9999])
def test_a_flipped_byte_makes_the_run_step_back_and_say_so(
    log: CommitLog, file: str, place: float
) -> None:
    older, newer = save(log, 10), save(log, 20)
    path = log.checkpoint_dir(newer) / file
    flip(path, int(place * path.stat().st_size))
    attempt = log.begin_attempt(2)
    assert attempt.commit == older.name
    assert len(attempt.rejected) == 1
    assert attempt.rejected[0].startswith(f"{newer.name}: {newer.checkpoint}/{file} ")
    assert log.attempts()[-1] == attempt
    with pytest.raises(DataError, match=f"{newer.checkpoint}.*{file}"):
        log.load(newer)
    assert log.load(older)[0]["weight"][0] == 10


def test_no_flipped_byte_of_a_commit_is_believed(log: CommitLog) -> None:
    older, newer = save(log, 10), save(log, 20)
    path = log.run_dir / "commits" / f"{newer.name}.json"
    whole = path.read_bytes()
    for place in range(len(whole)):
        flip(path, place)
        assert log.newest_whole()[0] in (older, newer)
        path.write_bytes(whole)
    assert log.begin_attempt(2).commit == newer.name


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("harm", [cut, lengthen, empty, Path.unlink])
def test_a_cut_or_missing_file_makes_the_run_step_back(
    log: CommitLog, file: str, harm: Callable[[Path], None]
) -> None:
    older, newer = save(log, 10), save(log, 20)
    harm(log.checkpoint_dir(newer) / file)
    attempt = log.begin_attempt(2)
    assert attempt.commit == older.name
    assert newer.checkpoint in attempt.rejected[0]


def test_a_missing_checkpoint_makes_the_run_step_back(log: CommitLog) -> None:
    older, newer = save(log, 10), save(log, 20)
    shutil.rmtree(log.checkpoint_dir(newer))
    attempt = log.begin_attempt(2)
    assert attempt.commit == older.name
    assert attempt.rejected == (f"{newer.name}: {newer.checkpoint} is gone",)


def test_a_checkpoint_put_in_the_place_of_another_is_refused(log: CommitLog) -> None:
    older, newer = save(log, 10), save(log, 20)
    shutil.rmtree(log.checkpoint_dir(newer))
    shutil.copytree(log.checkpoint_dir(older), log.checkpoint_dir(newer))
    assert log.begin_attempt(2).commit == older.name


def test_a_run_without_a_whole_checkpoint_is_refused_and_not_started_again(log: CommitLog) -> None:
    for commit in (save(log, 10), save(log, 20)):
        flip(log.checkpoint_dir(commit) / "model.safetensors", 99)
    with pytest.raises(DataError, match=r"no checkpoint is whole \(.*step-.*20.*;.*step-.*10"):
        log.begin_attempt(2)
    assert log.attempts() == []


# Attempts


def test_commits_of_a_superseded_attempt_lose_whatever_their_step(log: CommitLog) -> None:
    first = save(log, 10)
    save(log, 100)
    second = save(log, 20, attempt=2, parent=first.name)
    assert log.begin_attempt(1).commit == second.name
    save(log, 110)  # a worker that did not notice that it had been replaced
    assert log.begin_attempt(1).commit == second.name
    assert log.newest() == second
    assert log.lineage(second) == [first, second]


@pytest.mark.parametrize("steps", [(9, 10), (99_999, 100_000), (999_999, 1_000_000)])
def test_later_steps_are_newer_however_many_digits_they_have(
    log: CommitLog, steps: tuple[int, int]
) -> None:
    for step in steps:
        save(log, step)
    newest = log.newest()
    assert newest is not None
    assert newest.step == steps[1]


@pytest.mark.parametrize("place", ["state.json", "MANIFEST.json", "commits"])
def test_a_kill_before_the_commit_leaves_the_old_state(
    log: CommitLog, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    older = save(log, 10)

    def killed(path: Path, value: object) -> None:
        if place in (path.name, path.parent.name):
            raise SystemExit
        write_json(path, value)

    monkeypatch.setattr("pipelines.training.checkpoint.write_json", killed)
    with pytest.raises(SystemExit):
        save(log, 20)
    monkeypatch.undo()
    assert log.checkpoint_dir(make_commit(20)).exists() == (place == "commits")
    attempt = log.begin_attempt(2)
    assert (attempt.commit, attempt.rejected) == (older.name, ())
    again = save(log, 20, attempt=attempt.number + 1, parent=older.name)
    assert log.begin_attempt(2).commit == again.name
    assert not list((log.run_dir / "checkpoints").glob(".*"))


def test_a_lineage_is_every_commit_that_led_to_one(log: CommitLog) -> None:
    line: list[Commit] = []
    for step in range(1, 7):
        line.append(save(log, step, parent=line[-1].name if line else ""))
    assert log.lineage(line[-1]) == line
    assert log.lineage(line[2]) == line[:3]


def test_an_unknown_or_unreadable_commit_is_refused(log: CommitLog) -> None:
    with pytest.raises(DataError, match="is not a commit"):
        log.commit("000001-000000007")
    name = save(log, 1).name
    (log.run_dir / "commits" / f"{name}.json").write_bytes(b"\xff{")
    with pytest.raises(DataError, match="is not a commit"):
        log.commit(name)


# Pruning


def kept(log: CommitLog) -> set[str]:
    return {path.name for path in (log.run_dir / "checkpoints").iterdir()}


def test_pruning_keeps_the_newest_checkpoints_and_every_commit(log: CommitLog) -> None:
    commits = [save(log, step) for step in range(1, 8)]
    assert KEPT_CHECKPOINTS == 3
    assert kept(log) == {commit.checkpoint for commit in commits[-3:]}
    assert [log.commit(commit.name) for commit in commits] == commits
    assert log.begin_attempt(1).commit == commits[-1].name


@pytest.mark.parametrize("damaged", [1, 2])
def test_nothing_is_pruned_while_a_newer_one_is_damaged(log: CommitLog, damaged: int) -> None:
    commits = [save(log, step) for step in (1, 2, 3)]
    flip(log.checkpoint_dir(commits[2]) / "optim.safetensors", 9)
    commits.append(save(log, 4))
    assert kept(log) == {commit.checkpoint for commit in commits}
    if damaged == 2:
        flip(log.checkpoint_dir(commits[3]) / "optim.safetensors", 9)
    commits.append(save(log, 5))
    expected = commits if damaged == 2 else commits[2:]
    assert kept(log) == {commit.checkpoint for commit in expected}
    whole = {log.commit(log.begin_attempt(1).commit).step}
    assert whole == {5}


def test_an_old_commit_that_cannot_be_read_does_not_stop_the_saving(log: CommitLog) -> None:
    commits = [save(log, step) for step in (1, 2, 3, 4)]
    (log.run_dir / "commits" / f"{commits[0].name}.json").write_bytes(b"{")
    newest = save(log, 5)
    assert log.begin_attempt(1).commit == newest.name


# The saver


def test_a_failed_save_is_raised_where_it_is_waited_for(log: CommitLog) -> None:
    training = Training()
    log.run_dir.mkdir()
    (log.run_dir / "checkpoints").write_text("a file where a folder has to be")
    saver = Saver(log)
    saver.save(make_commit(1), training.model, training.optimizer)
    with pytest.raises(StorageError, match=r"cannot write .*checkpoints/step-000000001"):
        saver.wait()


def test_a_save_waits_for_the_one_before(log: CommitLog) -> None:
    training = Training()
    saver = Saver(log)
    for step in (1, 2, 3):
        training.advance(step, step + 1)
        saver.save(make_commit(step), training.model, training.optimizer)
    saver.wait()
    saver.wait()
    commits = sorted(path.stem for path in (log.run_dir / "commits").glob("*.json"))
    assert [log.commit(name).step for name in commits] == [1, 2, 3]


def test_nothing_of_a_checkpoint_is_a_pickle(log: CommitLog) -> None:
    commit = save(log, 1)
    folder = log.checkpoint_dir(commit)
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    state = json.loads((folder / "state.json").read_text())
    assert state["cursor"] == [1, 7, 1]
    assert START_DIGEST == "0" * 64
