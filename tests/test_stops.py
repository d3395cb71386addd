"""How a run stops: what is not worth another attempt ends it at once, in one line."""

import dataclasses
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipelines.data.batches import RowSource
from pipelines.errors import DataError, TrainingError
from pipelines.pretrain import train
from pipelines.recipes import recipe
from pipelines.run import Run, load_run, locked, open_run
from pipelines.training.checkpoint import CommitLog
from pipelines.training.mlflow_client import open_client
from pipelines.use.verify import verify
from tests.command import Command, command, process
from tests.corpus import write_corpus

NUM_STEPS = 24
GOES_ON = "rayssl: interrupted; the same command goes on from the newest commit"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write so little that a work order holds the rows of a few steps."""
    folder = tmp_path_factory.mktemp("stops")
    write_corpus(folder, num_documents=36, num_shards=12, num_sentences=8)
    return folder


@pytest.fixture
def open_tiny(ray_session: None, corpus: Path, tmp_path: Path) -> Callable[..., Run]:
    """Return a function that opens a run in which no failure is forgiven."""
    del ray_session

    def opened(**changes: Any) -> Run:
        fixed = {"data": (str(corpus),), "name": "run", "runs": str(tmp_path), "max_restarts": 0}
        config = replace(recipe("text-tiny"), **{"steps": NUM_STEPS, **fixed, **changes})
        with locked(config) as run_dir:
            return open_run(config, run_dir)

    return opened


class Boastful(RowSource):
    """Promises many more rows than there are."""

    def rows_per_order(self) -> float:
        """Return fifty times the estimate."""
        return 50 * super().rows_per_order()


class BoastfulRun(Run):
    """A run of which the first attempt plans far too few work orders."""

    @property
    def source(self) -> RowSource:
        """Return a source that promises too much."""
        true = super().source
        return Boastful(true.plan, true.maker)


@pytest.mark.slow
@pytest.mark.chaos
def test_a_stream_that_ends_too_early_is_no_failure_and_changes_no_batch(
    open_tiny: Callable[..., Run],
) -> None:
    run = open_tiny(workers=3)
    train(BoastfulRun(**{f.name: getattr(run, f.name) for f in dataclasses.fields(run)}))

    verdict = verify(run)
    assert (verdict.status, verdict.steps) == ("PASS", NUM_STEPS)
    _, *resumed = run.log.attempts()
    stops = [run.log.commit(attempt.commit) for attempt in resumed]
    assert stops
    for commit in stops:
        assert commit.cursor.steps_done == 0
        assert 0 < commit.step < NUM_STEPS


@pytest.mark.slow
def test_changed_data_ends_a_run_at_once_and_restored_data_lets_it_go_on(
    open_tiny: Callable[..., Run],
) -> None:
    run = open_tiny(max_restarts=3)
    plan, manifest = run.source.plan, run.manifest
    # A shard that a task reads on the way, not one that is looked at before the start.
    (block, _) = next(iter(set(plan.order(1).blocks) - set(plan.order(0).blocks)))
    shard = Path(manifest.root) / manifest.shards[manifest.blocks[block].shard].path
    whole = shard.read_bytes()
    shard.write_bytes(whole.replace(b"the", b"teh"))
    try:
        with pytest.raises(DataError, match=f"{shard.name}: bytes .* changed since"):
            train(run)
    finally:
        shard.write_bytes(whole)
    assert len(run.log.attempts()) == 1

    train(run)
    assert (verify(run).status, len(run.log.attempts())) == ("PASS", 2)


@pytest.mark.slow
@pytest.mark.chaos
def test_an_outage_is_counted_as_a_failure_and_ends_no_run(
    open_tiny: Callable[..., Run], capfd: pytest.CaptureFixture[str]
) -> None:
    run = open_tiny(max_restarts=1, steps=4)
    shard = Path(run.manifest.root) / run.manifest.shards[0].path
    away = shard.rename(shard.with_suffix(".away"))
    shard.mkdir()  # which is there and cannot be read
    try:
        with pytest.raises(TrainingError, match=f"{shard.name}: cannot be read .* try again"):
            train(run)
    finally:
        shard.rmdir()
        away.rename(shard)
    assert "restart 1 of 1" in capfd.readouterr().out
    assert len(run.log.attempts()) == 2


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_ends_a_run_at_once(open_tiny: Callable[..., Run]) -> None:
    optimizer = replace(recipe("text-tiny").optimizer, learning_rate=1e30)
    run = open_tiny(max_restarts=3, optimizer=optimizer)
    with pytest.raises(TrainingError, match=r"the gradient of step \d+ has norm (nan|inf)"):
        train(run)
    assert len(run.log.attempts()) == 1


# The command


def pretrain(corpus: Path, *flags: str) -> list[str]:
    return ["pretrain", "text-tiny", "--data", str(corpus), "--name", "run", *flags]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("library", ["pyarrow", "_raylet", "libtorch"])
def test_a_command_that_is_still_importing_ends_on_the_spot(
    corpus: Path, tmp_path: Path, library: str, number: signal.Signals
) -> None:
    with command(tmp_path, *pretrain(corpus)) as starting:
        maps = Path(f"/proc/{starting.pid}/maps")
        starting.wait_until(lambda: library in maps.read_text())
        starting.kill(number)
        assert starting.wait() == 130
        assert [line for line in starting.err if line] == ["rayssl: interrupted"]
        assert starting.out == []


@dataclass(frozen=True)
class Ended:
    """What a command has left."""

    code: int
    out: list[str]
    err: list[str]
    folder: Path

    @property
    def statuses(self) -> list[str]:
        """Return what MLflow says of its runs."""
        client = open_client(f"sqlite:///{self.folder}/mlflow.db")
        experiment = client.get_experiment_by_name("rayssl").experiment_id
        return [run.info.status for run in client.search_runs([experiment])]


def ended(of: Command, folder: Path) -> Ended:
    return Ended(of.wait(), of.out, [line for line in of.err if line], folder)


@pytest.fixture(scope="module")
def side_by_side(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """While one run trains, start it a second time, make another, and then end the first."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("first", "second", "other")}
    runs = ["--runs", str(folders["first"] / "runs")]
    log = CommitLog(folders["first"] / "runs" / "run")
    with command(folders["first"], *pretrain(corpus, *runs, "--steps", "100000")) as first:
        first.wait_until(log.newest)
        with (
            first.paused(),  # which leaves the CPU to the others
            command(folders["second"], *pretrain(corpus, *runs, "--steps", "100000")) as second,
            command(folders["other"], *pretrain(corpus, "--steps", "4")) as other,
        ):
            found = {"second": ended(second, folders["second"])}
            found["other"] = ended(other, folders["other"])
        first.kill(signal.SIGTERM)
        found["first"] = ended(first, folders["first"])
        first.wait_for_session()
    return found


@pytest.mark.slow
def test_a_second_process_on_a_run_is_refused(side_by_side: dict[str, Ended]) -> None:
    second = side_by_side["second"]
    (line,) = second.err
    assert second.code == 2
    assert line.startswith("rayssl: run 'run' is being trained by another process; wait for it")


@pytest.mark.slow
def test_two_runs_on_one_machine_leave_each_other_alone(side_by_side: dict[str, Ended]) -> None:
    assert (side_by_side["other"].code, side_by_side["other"].err) == (0, [])
    assert verify(load_run(side_by_side["other"].folder / "runs" / "run")).status == "PASS"


@pytest.mark.slow
def test_sigterm_ends_a_run_as_ctrl_c_does(side_by_side: dict[str, Ended]) -> None:
    first = side_by_side["first"]
    assert (first.code, first.err) == (130, [GOES_ON])
    assert first.statuses == ["KILLED"]
    assert not [line for line in first.out if "restart" in line]


def has_commit_of(log: CommitLog, attempt: int) -> bool:
    newest = log.newest()
    return newest is not None and newest.attempt == attempt


@pytest.mark.slow
@pytest.mark.chaos
def test_workers_that_are_killed_again_and_again_end_a_run_in_one_line(
    corpus: Path, tmp_path: Path
) -> None:
    log = CommitLog(tmp_path / "runs" / "run")
    flags = ["--steps", "100000", "--max-restarts", "1"]
    with command(tmp_path, *pretrain(corpus, *flags)) as training:
        for attempt in (1, 2):
            training.wait_until(partial(has_commit_of, log, attempt))
            (worker,) = training.titled("ray::RayTrainWorker")
            os.kill(worker, signal.SIGKILL)
        found = ended(training, tmp_path)
        training.wait_for_session()
    (line,) = found.err
    assert found.code == 1
    assert line.startswith("rayssl: training failed: ")
    assert "; the same command goes on from the newest commit" in line
    (restart,) = [line for line in found.out if line.startswith("the workers failed: ")]
    assert restart.endswith("restart 1 of 1")
    assert found.statuses == ["FAILED"]


FULL_DISK = """
set -u
mkdir runs && mount -t tmpfs -o size={size} tmpfs runs || exit 99
python="{python} -m pipelines"
$python "$@" >out.1 2>err.1; echo $? >code.1
ls runs/run/commits >commits.1; ls -A runs/run/checkpoints >checkpoints.1
mount -o remount,size=64m runs
$python "$@" >out.2 2>err.2; echo $? >code.2
$python verify run >verify 2>&1
"""


@pytest.mark.slow
def test_a_full_disk_ends_a_run_in_one_line_and_room_lets_it_go_on(
    corpus: Path, tmp_path: Path
) -> None:
    script = FULL_DISK.format(python=sys.executable, size="1200k")
    flags = ["--steps", "40", "--log-every", "40"]
    arguments = ["unshare", "-rm", "sh", "-c", script, "sh", *pretrain(corpus, *flags)]
    with process(tmp_path, *arguments) as both:
        code = both.wait()
        if code in (1, 99) and not (tmp_path / "code.1").exists():
            pytest.skip(f"no file system can be mounted here: {both.err}")
        both.wait_for_session()

    def read(name: str) -> list[str]:
        return (tmp_path / name).read_text().splitlines()

    assert read("code.1") == ["75"], read("err.1")
    (line,) = [line for line in read("err.1") if line]
    assert line.startswith("rayssl: cannot write ")
    assert "/runs/run/checkpoints/step-" in line
    assert "No space left on device" in line
    assert line.endswith("; once that is mended, the same command goes on")
    assert read("commits.1")
    assert not [name for name in read("checkpoints.1") if name.endswith(".tmp")]
    assert read("code.2") == ["0"], read("err.2")
    newest = read("commits.1")[-1].removesuffix(".json")
    assert f"training from commit {newest} with 1 worker" in read("out.2")
    assert read("verify")[0].startswith("PASS: 40 steps")
