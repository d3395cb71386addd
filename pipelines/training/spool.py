"""What a run logs, on disk: one line a step, which outlives its writer and waits for MLflow."""

import json
import logging
import math
import os
import re
import time
from pathlib import Path
from typing import NamedTuple

from pipelines.storage import writing

logger = logging.getLogger(__name__)

METRIC_NAME = re.compile(r"\w[\w.\- :]*(/\w[\w.\- :]*)*")


class SpoolWriter:
    """Appends logged steps to one file; used by one process, rank 0 of one attempt."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = path.open("a+b", buffering=0)
        if self._file.seek(0, os.SEEK_END):
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":  # a killed process left half a line
                self._file.write(b"\n")

    def append(self, step: int, metrics: dict[str, float]) -> None:
        """Write one line, timed now; it survives the death of the process.

        Raises:
            ValueError: If MLflow would refuse the name of a metric.
            StorageError: If the disk does not take the line.
        """
        for name in metrics:
            if not METRIC_NAME.fullmatch(name):
                raise ValueError(
                    f"metric name {name!r} is not accepted by MLflow: use letters, digits and "
                    "_ . - : space, with / between parts"
                )
        values = {
            name: float(value) if math.isfinite(value) else str(float(value))  # JSON has no NaN
            for name, value in metrics.items()
        }
        line = {"step": step, "timestamp_ms": time.time_ns() // 1_000_000, "metrics": values}
        with writing(self._path):
            self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class SpoolRecord(NamedTuple):
    """One logged step, and where it ends in its file."""

    attempt: str
    end_offset: int
    step: int
    timestamp_ms: int
    metrics: dict[str, float]


def read_spool(spool_dir: Path, offsets: dict[str, int]) -> list[SpoolRecord]:
    """Return what was logged behind `offsets` (file name -> bytes), oldest attempt first.

    A half-written last line is left for the next time; a broken line with others behind it, the
    last word of a killed process, is skipped.
    """
    records = []
    for path in sorted(spool_dir.glob("*.jsonl")):
        end = offsets.get(path.name, 0)
        with path.open("rb") as file:
            file.seek(end)
            lines = file.read().splitlines(keepends=True)
        for line in lines:
            end += len(line)
            if line.endswith(b"\n") and (record := _parse_line(path.name, end, line)):
                records.append(record)
    return records


def _parse_line(attempt: str, end_offset: int, line: bytes) -> SpoolRecord | None:
    try:
        fields = json.loads(line)
        metrics = {name: float(value) for name, value in fields["metrics"].items()}
        return SpoolRecord(attempt, end_offset, fields["step"], fields["timestamp_ms"], metrics)
    except (ValueError, KeyError, TypeError, AttributeError):
        logger.warning("%s: skipped a broken line that ends at byte %d", attempt, end_offset)
        return None
