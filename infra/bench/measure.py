"""What the benchmarks share: CPU seconds, processes as /proc tells of them, and results."""

import json
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from pipelines.training.lineage import code_version

RESULTS = Path(__file__).parent / "results"
SAMPLE_SECONDS = 0.1
PACKAGES = (
    *("numpy", "opencv-python-headless", "pillow", "pyarrow", "ray", "sentencex", "simplejpeg"),
    *("tokenizers", "tokie", "torch"),
)


class Usage(NamedTuple):
    """What one process has used so far."""

    role: str
    """`driver` is this process, `workers` run Ray tasks, `loaders` are of torch's DataLoader, and
    `ray` is the rest below this process."""
    cpu_seconds: float
    megabytes: float
    """Resident, with what it has touched of Ray's shared object store."""
    own_megabytes: float
    """Resident, without what other processes may share: files and the object store."""


class Watch:
    """Samples this process and all below it, so that those that end are not missed."""

    def __enter__(self) -> Self:
        self._before = processes()
        self._last = dict(self._before)
        self._peaks = dict(self._before)
        self._own_seconds = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()
        self.look()

    def cpu_seconds(self, *roles: str) -> float:
        """Return what the processes of these roles used in between, the samples left out."""
        before = {pid: usage.cpu_seconds for pid, usage in self._before.items()}
        used = {pid: u.cpu_seconds - before.get(pid, 0.0) for pid, u in self._of(roles).items()}
        return sum(used.values()) - ("driver" in roles) * self._own_seconds

    def peak_megabytes(self, role: str, *, own: bool = False) -> list[float]:
        """Return the largest memory, as sampled in between, of each process of a role."""
        peaks = (self._peaks[pid] for pid in self._of([role]))
        return sorted(round(peak.own_megabytes if own else peak.megabytes, 1) for peak in peaks)

    def _of(self, roles: Sequence[str]) -> dict[int, Usage]:
        return {pid: usage for pid, usage in self._last.items() if usage.role in roles}

    def _sample(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self.look()
        self._own_seconds = time.thread_time()

    def look(self) -> None:
        """Take a sample now."""
        found = processes()
        self._last |= found
        for pid, usage in found.items():
            peak = self._peaks.get(pid, usage)
            self._peaks[pid] = usage._replace(
                megabytes=max(peak.megabytes, usage.megabytes),
                own_megabytes=max(peak.own_megabytes, usage.own_megabytes),
            )


def processes() -> dict[int, Usage]:
    """Return this process and all below it, by process id."""
    parents, found = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name, _, told = (folder / "stat").read_text().rpartition(")")
            command = (folder / "cmdline").read_bytes()
            pages, shared = map(int, (folder / "statm").read_text().split()[1:3])
        except OSError:  # it has ended
            continue
        pid, stat = int(folder.name), told.split()
        parents[pid] = int(stat[1])
        role = "workers" if command.startswith(b"ray::") else "ray"
        role = "loaders" if name.endswith("(pt_data_worker") else role
        ticks, page = int(stat[11]) + int(stat[12]), os.sysconf("SC_PAGE_SIZE") / 1e6
        found[pid] = Usage(
            "driver" if pid == os.getpid() else role,
            ticks / os.sysconf("SC_CLK_TCK"),
            pages * page,
            (pages - shared) * page,
        )
    return {pid: usage for pid, usage in found.items() if _is_below(pid, parents)}


def _is_below(pid: int, parents: dict[int, int]) -> bool:
    while pid != os.getpid():
        if pid not in parents:
            return False
        pid = parents[pid]
    return True


def cpu_seconds(function: Callable[[], Any]) -> float:
    """Return the CPU seconds of this process, all its threads, that a call takes."""
    start = time.process_time()
    function()
    return time.process_time() - start


def wall_seconds(function: Callable[[], Any]) -> float:
    """Return the seconds that a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def in_turn(repeats: int, what: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Return the seconds that each function returns, all of them in turn in every repeat."""
    seconds: dict[str, list[float]] = {name: [] for name in what}
    for _ in range(repeats):
        for name, function in what.items():
            seconds[name].append(function())
    return seconds


def rates(amount: float, seconds: Sequence[float]) -> dict[str, float]:
    """Return the median, least and largest of amount per second."""
    return spread([amount / value for value in seconds])


def ratio(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    """Return the median, least and largest ratio of two measurements made in turn."""
    return spread([a / b for a, b in zip(over, under, strict=True)])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median, least and largest of some values."""
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, 3) for name, value in found.items()}


def keep(name: str, result: dict[str, Any]) -> None:
    """Print a result and write it beside those of other days."""
    today = date.today().isoformat()
    origin = {
        "date": today,
        "commit": code_version()["git_commit"],
        "machine": f"{platform.machine()}, {_processor()}, {os.cpu_count()} cores",
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "versions": {p: version(p) for p in PACKAGES},
    }
    text = json.dumps(origin | result, indent=1)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}_{today}.json").write_text(text + "\n")
    print(text)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "?")
