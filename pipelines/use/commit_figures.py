"""Held-out figures of a run while it trains, measured beside the training and never in its way.

    commit of every so many steps -> a task with a copy of its weights -> spool -> MLflow
                                                                       -> table or pictures

The points are `commit/...` at the steps of the commits; each is logged once, whatever is resumed.
MLflow keeps them as metrics of the run, and of a LoggedModel for each commit, with the data.
"""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import ray
import torch

from pipelines.cluster import unwrap
from pipelines.console import say
from pipelines.data.manifest import Manifest
from pipelines.errors import DataError, brief
from pipelines.run import Run
from pipelines.training.checkpoint import Commit
from pipelines.training.spool import SpoolWriter, read_spool
from pipelines.training.tracking import COMMITS_FILE
from pipelines.use.evaluate import Evaluation, evaluate
from pipelines.use.evaluate_images import ImageEvaluation, evaluate_images
from pipelines.use.pictures import write_pictures
from pipelines.use.predictions import write_predictions
from ssl_models import build_objective
from ssl_models.objective import Objective

MAX_RECORDS = 1000
"""Of more held-out records every n-th block is measured: a few seconds of one CPU."""
PATIENCE_SECONDS = 60.0
"""How long the end of the training waits for the last figures."""


class Shown(NamedTuple):
    """Files to be looked at, and the folder of the run and of MLflow that they belong into."""

    folder: str
    paths: list[Path]
    missing: str = ""
    """Why there are none."""


def evaluate_run(
    objective: Objective, run: Run, data: Manifest | None = None
) -> Evaluation | ImageEvaluation:
    """Return the figures of an objective on what a run has held out, or on all of other data.

    Raises:
        NothingHeldOutError: If that is nothing.
    """
    return (evaluate if run.pieces else evaluate_images)(objective, run, data)


def show_run(objective: Objective, run: Run, step: int | None = None) -> Shown:
    """Write what the eye sees of an objective: a table of predictions, or pictures.

    Into a folder of the run, at a step into one of that step; below it they go to MLflow, too.
    """
    folder = "tables" if run.pieces else "pictures"
    if step is not None:
        folder = f"{folder}/step-{step:09d}"
    write = write_predictions if run.pieces else write_pictures
    return Shown(folder, write(objective, run, run.dir / folder))


class CommitFigures:
    """Measures commits of a run, one at a time; what fails or comes too late is said and left.

    `log` takes a file that is to be looked at, and the folder that it belongs into.
    """

    def __init__(self, run: Run, log: Callable[[Path, str], None]) -> None:
        self._log = log
        self._run = replace(run, dir=run.dir.resolve(), manifest=bounded(run.manifest))
        is_on = run.config.measure_every and run.manifest.records_where("heldout")
        self._run_ref = ray.put(self._run) if is_on else None
        logged = [r.step for r in read_spool(run.dir / "spool", {}) if r.attempt == COMMITS_FILE]
        self._last = max(logged, default=0)
        self._due: Commit | None = None
        self._measured: Commit | None = None
        self._task: Any = None

    def update(self) -> None:
        """Log what is measured, and begin with a new commit if it is one to measure."""
        if self._run_ref is None:
            return
        with contextlib.suppress(DataError):  # a commit that is spoilt is for others to tell
            newest = self._run.log.newest()
            every = self._run.config.measure_every
            if newest and newest.step // every > self._last // every:
                self._due, self._last = newest, newest.step
        if self._task is not None and ray.wait([self._task], timeout=0)[0]:
            self._collect()
        if self._task is None and self._due is not None:
            self._measured, self._due = self._due, None
            self._task = _measure.remote(self._run_ref, self._measured)

    def close(self) -> None:
        """Wait a little for what is left."""
        self.update()
        while self._task is not None:
            if ray.wait([self._task], timeout=PATIENCE_SECONDS)[0]:
                self.update()
            else:
                ray.cancel(self._task, force=True)
                self._tell("took too long")
                self._task = None

    def _collect(self) -> None:
        assert self._measured is not None
        task, self._task = self._task, None
        try:
            metrics, shown = ray.get(task)
            if shown.missing:
                self._tell(f"shows nothing ({shown.missing})")
            for path in shown.paths:  # first: with its point in the spool a commit counts as done
                self._log(path, shown.folder)
            writer = SpoolWriter(self._run.dir / "spool" / COMMITS_FILE)
            writer.append(self._measured.step, metrics)
            writer.close()
        except Exception as error:  # the training does without these figures
            self._tell(f"failed ({brief(unwrap(error))})")

    def _tell(self, what: str) -> None:
        assert self._measured is not None
        say(f"measuring commit {self._measured.name} {what}: the training goes on without it")


def bounded(manifest: Manifest) -> Manifest:
    """Return a manifest with the same training blocks and about MAX_RECORDS held-out records."""
    holding = manifest.blocks_of("heldout")
    stride = -(-manifest.records_where("heldout") // MAX_RECORDS) or 1
    kept = set(holding[::stride])
    blocks = tuple(
        block if number in kept else replace(block, heldout=0)
        for number, block in enumerate(manifest.blocks)
    )
    records = sum(block.heldout for block in blocks)
    ledger = {
        fate: replace(entry, records=records) if fate == "heldout" else entry
        for fate, entry in manifest.ledger.items()
    }
    return replace(manifest, blocks=blocks, ledger=ledger)


# No CPU is reserved: the one that the data has must not wait for a measurement.
@ray.remote(num_cpus=0, max_retries=0)
def _measure(run: Run, commit: Commit) -> tuple[dict[str, float], Shown]:
    """Return the held-out figures of a commit, and what was written of it."""
    torch.set_num_threads(1)
    objective = build_objective(run.config.objective)
    objective.load_state_dict(run.log.load(commit)[0])
    metrics = {
        f"commit/{name.removeprefix('heldout/')}": value
        for name, value in evaluate_run(objective, run).metrics().items()
    }
    try:
        return metrics, show_run(objective, run, commit.step)
    except Exception as error:  # the figures are there all the same
        return metrics, Shown("", [], brief(error))
