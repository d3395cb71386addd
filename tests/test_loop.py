"""Training gives the same batches and losses whatever the workers are and whatever befalls them.

A start of Ray Train costs seconds, so one start often serves several runs: a worker trains them
one after the other, each in a folder of its own.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch.distributed as dist

from pipelines.config import RunConfig
from pipelines.data.batches import Step, steps
from pipelines.errors import DataError
from pipelines.pretrain import train
from pipelines.recipes import recipe
from pipelines.run import Run, load_run, locked, open_run
from pipelines.training import loop as training
from pipelines.training.checkpoint import Commit, CommitLog
from pipelines.training.loop import Job, train_worker
from pipelines.training.mlflow_client import open_client
from pipelines.training.spool import read_spool
from pipelines.training.tracking import RUN_KEY_TAG
from pipelines.use.verify import verify
from tests.command import command

NUM_STEPS = 20
KILLED_BEFORE_STEP = 13
NUM_MUTATED_STEPS = 8
MUTATED_STEP = 6
WORDS = [a + b + c for a in "bdfgklmprst" for b in "aeiou" for c in "nrstlk"]
GOLDEN = Path(__file__).parent / "golden" / "text_tiny_losses.json"

Records = dict[int, dict[str, float]]
"""Logged metrics by step."""


def draw(*address: int | str) -> int:
    """Return a number that depends on its address alone, in any version of anything."""
    return int.from_bytes(hashlib.sha256(repr(address).encode()).digest()[:6], "big")


def sentence(document: int, number: int) -> str:
    """Return a sentence of words that the document prefers."""
    length = 3 + draw(document, number, "length") % 9
    own = [WORDS[draw(document, "own", i) % len(WORDS)] for i in range(12)]
    words = [own[draw(document, number, i) % len(own)] for i in range(length)]
    return " ".join(words).capitalize() + "."


@pytest.fixture(scope="module")
def golden_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 48 documents in 6 shards: 20 steps of the tiny recipe take more than one epoch."""
    folder = tmp_path_factory.mktemp("golden-corpus")
    for shard in range(6):
        lines = []
        for document in range(shard, 48, 6):
            texts = [sentence(document, i) for i in range(8 + draw(document, "size") % 8)]
            lines.append(json.dumps({"text": " ".join(texts)}) + "\n")
        (folder / f"shard-{shard}.jsonl").write_text("".join(lines))
    return folder


@dataclass(frozen=True)
class Place:
    """Where runs of this module live, and on what."""

    runs: Path
    corpus: Path

    def _config(self, name: str, **changes: Any) -> RunConfig:
        return replace(
            recipe("text-tiny"),
            data=(str(self.corpus),),
            name=name,
            runs=str(self.runs),
            **{"steps": NUM_STEPS, **changes},
        )

    def open(self, name: str, **changes: Any) -> Run:
        """Return a new run of the tiny recipe, with some fields changed."""
        config = self._config(name, **changes)
        with locked(config) as run_dir:
            return open_run(config, run_dir)

    def copy(self, run: Run, name: str) -> Run:
        """Return a run of another name with the same record and nothing trained."""
        folder = self.runs / name
        folder.mkdir()
        for file in ("run.json", "manifest.json", "tokenizer.json"):
            shutil.copy(run.dir / file, folder / file)
        return load_run(folder)


@pytest.fixture(scope="module")
def place(
    ray_session: None, golden_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Place:
    del ray_session
    return Place(tmp_path_factory.mktemp("runs"), golden_corpus)


def newest_step(log: CommitLog) -> int:
    commit = log.newest()
    return commit.step if commit else 0


def digest(run: Run) -> str:
    commit = run.log.newest()
    assert commit is not None
    assert commit.step == run.config.steps
    return commit.digest


def commits(run: Run) -> dict[int, Commit]:
    """Return the commits that led to the newest one, by step."""
    newest = run.log.newest()
    assert newest is not None
    return {commit.step: commit for commit in run.log.lineage(newest)}


def logged(run: Run, attempt: int | None = None) -> Records:
    """Return what was logged, of one attempt or with replayed steps overwritten by the later."""
    records = read_spool(run.dir / "spool", {})
    names = {f"{attempt:06d}.jsonl"} if attempt else {record.attempt for record in records}
    return {
        record.step: record.metrics
        for record in records
        if record.attempt in names and "loss" in record.metrics
    }


def losses(records: Records) -> list[float]:
    return [records[step]["loss"] for step in sorted(records)]


def calm_then_killed(run: Run, calm: Path, victim: int, job: Job) -> None:
    """Train a calm run, then the run itself, whose first attempt loses a worker on the way."""
    if run.log.newest() is not None:
        train_worker(job)
        return
    train_worker(replace(job, run_dir=calm))
    killing = partial(kill_before, run.log, training.train_step, victim)
    with patch.object(training, "train_step", killing):
        train_worker(job)


def kill_before(log: CommitLog, train_step: Any, victim: int, *given: Any) -> Any:
    """Make a step, or die like a machine that loses power, once there is a commit to go on from."""
    step = given[-1]
    if step == KILLED_BEFORE_STEP - 1 and dist.get_rank() == victim:
        while newest_step(log) < 10:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return train_step(*given)


@dataclass(frozen=True)
class Pair:
    """The same training twice: once left in peace, once with a worker killed on the way."""

    calm: Run
    killed: Run


@pytest.fixture(scope="module")
def pair_of(place: Place) -> Callable[[int], Pair]:
    @cache
    def trained(workers: int) -> Pair:
        killed = place.open(f"killed-{workers}", workers=workers)
        calm = place.copy(killed, f"calm-{workers}")
        victim = 0 if workers < 3 else 2
        train(killed, worker=partial(calm_then_killed, killed, calm.dir.resolve(), victim))
        return Pair(calm, killed)

    return trained


@pytest.mark.parametrize("workers", [1, 3])
def test_t5_any_number_of_workers_trains_on_the_planned_batches(
    pair_of: Callable[[int], Pair], workers: int
) -> None:
    calm = pair_of(workers).calm
    verdict = verify(calm)
    assert (verdict.status, verdict.steps) == ("PASS", NUM_STEPS)
    assert digest(calm) == digest(pair_of(1).calm)
    assert losses(logged(calm)) == pytest.approx(losses(logged(pair_of(1).calm)), rel=1e-5)


@pytest.mark.parametrize("workers", [1, 3])
def test_t5_a_killed_worker_changes_no_batch_and_no_bit_of_the_losses(
    pair_of: Callable[[int], Pair], workers: int
) -> None:
    calm, killed = pair_of(workers).calm, pair_of(workers).killed
    attempts = killed.log.attempts()
    assert [attempt.commit for attempt in attempts] == ["", commits(killed)[10].name]
    assert [attempt.workers for attempt in attempts] == [workers, workers]
    before, after = logged(killed, 1), logged(killed, 2)
    assert sorted(before) == list(range(1, KILLED_BEFORE_STEP))
    assert sorted(after) == list(range(11, NUM_STEPS + 1))

    assert digest(killed) == digest(calm)
    assert verify(killed).status == "PASS"
    expected = losses(logged(calm))
    assert losses(before | after) == expected
    assert losses(before) == expected[: KILLED_BEFORE_STEP - 1]
    for step in after:
        assert after[step]["gradient_norm"] == logged(calm)[step]["gradient_norm"]
    assert weights(killed) == weights(calm)


def weights(run: Run) -> dict[str, bytes]:
    commit = run.log.newest()
    assert commit is not None
    model, optimizer = run.log.load(commit)
    return {name: tensor.numpy().tobytes() for name, tensor in (model | optimizer).items()}


def test_these_runs_cross_epochs_and_orders(pair_of: Callable[[int], Pair]) -> None:
    calm = pair_of(1).calm
    commit = calm.log.newest()
    assert commit is not None
    assert commit.cursor.order >= calm.source.plan.orders_per_epoch
    assert sum(commit.fates.values()) == NUM_STEPS * calm.config.order.rows_per_step
    assert commits(pair_of(1).killed)[10].cursor.row > 0


def test_the_first_losses_are_golden(pair_of: Callable[[int], Pair]) -> None:
    """Regenerate by hand only with a reason: whoever moves them changes every run there is."""
    found = losses(logged(pair_of(1).calm))
    assert found == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-3)


def test_the_loss_falls_and_rates_are_logged(pair_of: Callable[[int], Pair]) -> None:
    records = logged(pair_of(1).calm)
    found = losses(records)
    assert np.mean(found[-3:]) < np.mean(found[:3]) - 0.1
    for record in records.values():
        assert record["loss"] == pytest.approx(record["mlm_loss"] + record["nsp_loss"], rel=1e-5)
        assert 0 <= record["data_wait_ratio"] <= 1
        assert record["rows_per_second"] > 0
        assert record["tokens_per_second"] > record["rows_per_second"]


def test_a_flipped_byte_in_the_newest_checkpoint_costs_a_commit_and_nothing_else(
    place: Place, pair_of: Callable[[int], Pair]
) -> None:
    calm, killed = pair_of(1).calm, pair_of(1).killed
    run = place.copy(calm, "flipped")
    end_after(NUM_STEPS, calm, run)
    (run.dir / "attempts").mkdir()
    shutil.copy(killed.dir / "attempts" / "000001.json", run.dir / "attempts")
    good, spoilt = commits(calm)[15], commits(calm)[NUM_STEPS]
    flip_a_byte(run.log.checkpoint_dir(spoilt) / "model.safetensors")

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        train(run)

    lines = said.getvalue().splitlines()
    spoilt_file = f"{spoilt.checkpoint}/model.safetensors"
    assert lines[0].startswith(f"not used: {spoilt.name}: {spoilt_file} is not what was written")
    assert lines[1] == f"training from commit {good.name} with 1 worker"
    assert digest(run) == digest(calm)
    assert verify(run).status == "PASS"
    assert losses(logged(run)) == losses(logged(calm))[15:]
    assert weights(run) == weights(calm)


def end_after(step: int, calm: Run, run: Run) -> None:
    """Copy the commits of a run as if everything had died right after a step."""
    for folder in ("checkpoints", "commits"):
        shutil.copytree(calm.dir / folder, run.dir / folder)
    for later, commit in commits(calm).items():
        if later > step:
            shutil.rmtree(run.log.checkpoint_dir(commit))
            (run.dir / "commits" / f"{commit.name}.json").unlink()


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def test_without_a_whole_checkpoint_nothing_is_trained(
    place: Place, pair_of: Callable[[int], Pair]
) -> None:
    calm = pair_of(1).calm
    run = place.copy(calm, "hopeless")
    end_after(15, calm, run)
    for path in (run.dir / "checkpoints").glob("*/optim.safetensors"):
        flip_a_byte(path)

    with pytest.raises(DataError, match="no checkpoint is whole"):
        train(run)
    assert not (run.dir / "attempts").exists()


Mutation = Callable[[list[Step], int], Step]
"""What a faulty stream gives at a place of the true one."""


def as_planned(stream: list[Step], at: int) -> Step:
    return stream[at]


def swapped_slots(stream: list[Step], at: int) -> Step:
    slots = stream[at].slots
    return stream[at]._replace(slots={**slots, 0: slots[1], 1: slots[0]})


def dropped_row(stream: list[Step], at: int) -> Step:
    slots = stream[at].slots
    emptied = {name: array.copy() for name, array in slots[3].items()}
    for array in emptied.values():
        array[-1] = array[0]
    return stream[at]._replace(slots={**slots, 3: emptied})


def reused_mask(stream: list[Step], at: int) -> Step:
    slots, before = stream[at].slots, stream[at - 1].slots
    masks = {name: array for name, array in before[2].items() if name.startswith("masked_")}
    return stream[at]._replace(slots={**slots, 2: {**slots[2], **masks}})


def shifted_by_one(stream: list[Step], at: int) -> Step:
    return stream[at]._replace(slots=stream[at + 1].slots)


MUTATIONS: dict[str, Mutation] = {
    "as-planned": as_planned,
    "swapped-slots": swapped_slots,
    "dropped-row": dropped_row,
    "reused-mask": reused_mask,
    "shifted-by-one": shifted_by_one,
}


def mutated(mutation: Mutation, *given: Any) -> Iterator[Step]:
    """Yield the stream, mutated at one step."""
    stream: list[Step] = []
    true: Iterable[Step] = steps(*given)
    for step in true:
        stream.append(step)
        if len(stream) == NUM_MUTATED_STEPS + 1:
            break
    for at, step in enumerate(stream):
        yield mutation(stream, at) if at == MUTATED_STEP - 1 else step


def train_mutants(folders: dict[str, Path], job: Job) -> None:
    for name, folder in folders.items():
        faulty = partial(mutated, MUTATIONS[name])
        with patch.object(training, "steps", faulty):
            train_worker(replace(job, run_dir=folder))


@pytest.fixture(scope="module")
def mutants(place: Place) -> dict[str, Run]:
    host = place.open("as-planned", steps=NUM_MUTATED_STEPS)
    runs = {name: place.copy(host, name) for name in MUTATIONS if name != "as-planned"}
    runs["as-planned"] = host
    folders = {name: run.dir.resolve() for name, run in runs.items()}
    train(host, worker=partial(train_mutants, folders))
    return runs


@pytest.mark.parametrize("name", MUTATIONS)
def test_t5_verify_finds_the_step_that_was_not_as_planned(
    mutants: dict[str, Run], name: str
) -> None:
    verdict = verify(mutants[name])
    assert verdict.steps == NUM_MUTATED_STEPS
    assert verdict.digest == digest(mutants[name])
    if name == "as-planned":
        assert (verdict.status, verdict.first_different_step) == ("PASS", None)
    else:
        assert (verdict.status, verdict.first_different_step) == ("FAIL", MUTATED_STEP)


@pytest.mark.slow
@pytest.mark.chaos
def test_a_killed_driver_changes_no_batch_either(
    place: Place, golden_corpus: Path, tmp_path: Path
) -> None:
    """Power fails while two workers train; the same command goes on with three."""
    calm = place.open("undisturbed")
    train(calm)
    run_dir = tmp_path / "runs" / "outage"
    order = ["pretrain", "text-tiny", "--data", str(golden_corpus), "--name", "outage"]
    order += ["--checkpoint-every", "1"]  # so that there are steps left after the first commit
    with command(tmp_path, *order, "--workers", "2") as first:
        first.wait_until(lambda: newest_step(CommitLog(run_dir)) >= 2)
        first.kill(signal.SIGKILL)
        assert first.wait() == -signal.SIGKILL
        first.wait_for_session()
    before = load_run(run_dir)
    interrupted = before.log.newest()
    assert interrupted is not None
    assert 2 <= interrupted.step < NUM_STEPS

    with command(tmp_path, *order, "--workers", "3") as second:
        assert second.wait() == 0, second.err
        assert f"training from commit {interrupted.name} with 3 workers" in second.out

    run = load_run(run_dir)
    assert digest(run) == digest(calm)
    assert verify(run).status == "PASS"
    assert [attempt.workers for attempt in run.log.attempts()] == [2, 3]
    expected = losses(logged(calm))
    assert losses(logged(run)) == pytest.approx(expected, rel=1e-5)

    client = open_client(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("rayssl").experiment_id
    (tracked,) = client.search_runs([experiment])
    assert tracked.data.tags[RUN_KEY_TAG] == before.key == run.key
    assert tracked.info.status == "FINISHED"
    history = client.get_metric_history(tracked.info.run_id, "loss")
    assert [point.step for point in history] == list(range(1, NUM_STEPS + 1))
    assert [point.value for point in history] == pytest.approx(expected, rel=1e-5)
