"""A run on pictures whose worker and whose driver are killed ends with the bytes of a calm one."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.pretrain import pretrain
from pipelines.recipes import recipe
from pipelines.run import Run, load_run
from pipelines.training.checkpoint import CommitLog
from pipelines.training.mlflow_client import open_client
from pipelines.training.spool import read_spool
from pipelines.use.verify import verify
from tests.command import command
from tests.pictures import write_pictures

NUM_STEPS = 40
WORKERS = 2


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write so many pictures that a run of 40 steps takes more than three epochs."""
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder)
    return folder


@pytest.fixture(scope="module")
def calm(ray_session: None, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a run that was left in peace."""
    del ray_session
    folder = tmp_path_factory.mktemp("calm")
    config = replace(
        recipe("image-tiny"),
        data=(str(pictures),),
        name="run",
        runs=str(folder / "runs"),
        tracking_uri=f"sqlite:///{folder}/mlflow.db",
        steps=NUM_STEPS,
        checkpoint_every=1,
        workers=WORKERS,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # where artifacts go
        pretrain(config)
    return load_run(folder / "runs" / "run")


def has_trained(log: CommitLog, attempt: int, steps: int) -> Callable[[], bool]:
    """Return a function that tells whether an attempt has committed a number of its own steps."""

    def told() -> bool:
        newest = log.newest()
        if newest is None or newest.attempt != attempt:
            return False
        *_, start = [made.commit for made in log.attempts()]
        return newest.step >= steps + (log.commit(start).step if start else 0)

    return told


def losses(run: Run) -> dict[int, float]:
    """Return the loss of each step, as its last attempt logged it."""
    return {
        record.step: record.metrics["loss"]
        for record in read_spool(run.dir / "spool", {})
        if "loss" in record.metrics
    }


def bundle(run: Run) -> dict[str, bytes]:
    """Return the files of a bundle but for what names the run."""
    files = {path.name: path.read_bytes() for path in (run.dir / "bundle").iterdir()}
    card, lineage, _ = files["MODEL_CARD.md"].partition(b"## Lineage")
    assert lineage
    return {n: data for n, data in files.items() if n not in BY_RUN} | {"MODEL_CARD.md": card}


BY_RUN = ("lineage.json", "manifest.json")


@pytest.mark.slow
def test_killed_workers_and_drivers_change_no_batch_no_loss_and_no_byte_of_the_encoder(
    calm: Run, pictures: Path, tmp_path: Path
) -> None:
    order = ["pretrain", "image-tiny", "--data", str(pictures), "--name", "run"]
    order += ["--steps", str(NUM_STEPS), "--checkpoint-every", "1", "--workers", str(WORKERS)]
    log = CommitLog(tmp_path / "runs" / "run")
    with command(tmp_path, *order) as first:
        first.wait_until(has_trained(log, 1, 3))
        os.kill(first.titled("ray::RayTrainWorker")[-1], signal.SIGKILL)
        first.wait_until(has_trained(log, 2, 3))
        first.kill(signal.SIGKILL)
        assert first.wait() == -signal.SIGKILL
        assert [line for line in first.out if "restart 1 of" in line]
        first.wait_for_session()
    interrupted = log.newest()
    assert interrupted is not None
    assert interrupted.step < NUM_STEPS

    with command(tmp_path, *order) as second:
        assert second.wait() == 0, second.err
    run = load_run(tmp_path / "runs" / "run")
    assert [attempt.number for attempt in run.log.attempts()] == [1, 2, 3]
    ended, expected = run.log.newest(), calm.log.newest()
    assert ended is not None
    assert expected is not None
    assert ended.digest == expected.digest
    assert verify(run).status == "PASS"
    assert losses(run) == losses(calm)
    assert sorted(losses(run)) == list(range(1, NUM_STEPS + 1))
    assert "model.safetensors" in bundle(run)
    assert bundle(run) == bundle(calm)

    client = open_client(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("rayssl").experiment_id
    (tracked,) = client.search_runs([experiment])
    assert tracked.info.status == "FINISHED"
    history = client.get_metric_history(tracked.info.run_id, "loss")
    assert [point.step for point in history] == list(range(1, NUM_STEPS + 1))
