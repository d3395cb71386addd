"""What a person sees while a run goes on: one live line in a terminal, plain lines elsewhere."""

import sys
import time
from pathlib import Path

from pipelines.config import Schedule
from pipelines.training.checkpoint import Attempt, CommitLog
from pipelines.training.spool import SpoolRecord, read_spool
from ssl_models.objective import DIAGNOSIS

PLAIN_LINES_EVERY_SECONDS = 10.0
SAID_AFTER = 5
"""Logged steps on end that something has to go wrong for before it is said: sound runs have single
ones."""


def say(line: str) -> None:
    """Print one line."""
    print(line, flush=True)


class Progress:
    """Follows the spool and the attempts of a run, and prints what is new."""

    def __init__(self, run_dir: Path, config: Schedule) -> None:
        self._log = CommitLog(run_dir)
        self._spool = run_dir / "spool"
        self._config = config
        self._offsets: dict[str, int] = {}
        self._read()
        self._num_attempts = len(self._log.attempts())
        self._live = sys.stdout.isatty()
        self._printed = 0.0

    def update(self) -> None:
        """Print restarts and the newest logged step, if there is anything new."""
        for attempt in self._log.attempts()[self._num_attempts :]:
            self._num_attempts += 1
            for line in _describe(attempt):
                self._print(line, stays=True)
        records = self._read()
        for record in records:
            for line in _found_ill(record, self._config.stop_on_collapse):
                self._print(line, stays=True)
        due = time.monotonic() - self._printed > PLAIN_LINES_EVERY_SECONDS
        if records and (self._live or due or records[-1].step == self._config.steps):
            self._printed = time.monotonic()
            self._print(self._line(records[-1]), stays=not self._live)

    def close(self) -> None:
        """Print what is left, and leave the live line behind."""
        self.update()
        if self._live:
            print(flush=True)

    def _read(self) -> list[SpoolRecord]:
        records = read_spool(self._spool, self._offsets)
        self._offsets |= {record.attempt: record.end_offset for record in records}
        return [record for record in records if "loss" in record.metrics]

    def _line(self, record: SpoolRecord) -> str:
        metrics, num_steps = record.metrics, self._config.steps
        rows_left = (num_steps - record.step) * self._config.order.rows_per_step
        return (
            f"step {record.step}/{num_steps}  loss {metrics['loss']:.3f}  "
            f"{metrics['rows_per_second']:.0f} rows/s  "
            f"data wait {metrics['data_wait_ratio']:.1%}  "
            f"{rows_left / metrics['rows_per_second'] / 60:.1f} min left"
        )

    def _print(self, line: str, *, stays: bool) -> None:
        clear = "\r\x1b[2K" if self._live else ""
        print(f"{clear}{line}", end="\n" if stays else "", flush=True)


def _found_ill(record: SpoolRecord, limit: int) -> list[str]:
    """Return what a logged step says to go wrong, once it has done so for a while."""
    after = min(SAID_AFTER, limit // 2 or SAID_AFTER)
    what_follows = f"; the run stops if it does for {limit} logged steps on end" if limit else ""
    return [
        f"step {record.step}: the encoder shows {name.removeprefix(DIAGNOSIS)}, for {after} logged "
        f"steps now{what_follows}"
        for name, logged in record.metrics.items()
        if name.startswith(DIAGNOSIS) and logged == after
    ]


def _describe(attempt: Attempt) -> list[str]:
    lines = [f"not used: {reason}" for reason in attempt.rejected]
    where = f"from commit {attempt.commit}" if attempt.commit else "from the start"
    workers = f"{attempt.workers} worker{'s' if attempt.workers > 1 else ''}"
    return [*lines, f"training {where} with {workers}"]
