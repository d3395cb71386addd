"""The `rayssl` command as a person starts it: a process with a session and a home of its own."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

PATIENCE_SECONDS = 240.0


class Command:
    """A running command; Ray's processes belong to its session, so none is missed."""

    def __init__(self, folder: Path, words: list[str], **extra: str) -> None:
        home = folder / "home"
        home.mkdir(parents=True, exist_ok=True)
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        self._out, self._err = folder / "out.txt", folder / "err.txt"
        with self._out.open("w") as out, self._err.open("w") as err:
            self._process = subprocess.Popen(
                words,
                cwd=folder,
                env=environment | {"HOME": str(home)} | extra,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Return the number of the process."""
        return self._process.pid

    @property
    def out(self) -> list[str]:
        """Return the lines of standard output so far."""
        return self._out.read_text().splitlines()

    @property
    def err(self) -> list[str]:
        """Return the lines of standard error so far."""
        return self._err.read_text().splitlines()

    def wait_until(self, happened: Callable[[], object]) -> None:
        """Wait for something to happen while the command runs."""
        self._wait(happened, while_running=True)

    def kill(self, number: signal.Signals) -> None:
        """Send a signal to the foreground process group, as a terminal does."""
        os.killpg(self._process.pid, number)

    def wait(self) -> int:
        """Return the exit code."""
        return self._process.wait(PATIENCE_SECONDS)

    def wait_for_session(self) -> None:
        """Wait until no process is left of all that the command has started."""
        self._wait(lambda: not self.session(), while_running=False)

    def session(self) -> list[int]:
        """Return the processes of the command's session that still run."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            except OSError:  # it has ended
                continue
            if int(session) == self._process.pid and state != "Z":
                found.append(int(stat.parent.name))
        return found

    def titled(self, title: str) -> list[int]:
        """Return the processes of the session whose command line starts with a title."""
        found = []
        for process in self.session():
            with contextlib.suppress(OSError):  # it has ended
                line = Path(f"/proc/{process}/cmdline").read_text()
                found += [process] if line.startswith(title) else []
        return found

    @contextmanager
    def paused(self) -> Iterator[int]:
        """Hold the one training worker, so that it neither computes nor comes to its end."""
        (worker,) = self.titled("ray::RayTrainWorker")
        os.kill(worker, signal.SIGSTOP)
        yield worker
        with contextlib.suppress(ProcessLookupError):  # it was killed, or its command has ended
            os.kill(worker, signal.SIGCONT)

    def end(self) -> None:
        """End whatever is left."""
        for process in self.session():
            os.kill(process, signal.SIGKILL)
        self._process.wait()

    def _wait(self, happened: Callable[[], object], *, while_running: bool) -> None:
        give_up = time.monotonic() + PATIENCE_SECONDS
        while not happened():
            ended = while_running and self._process.poll() is not None
            assert not ended, f"exit code {self._process.returncode}: {self.out[-3:]} {self.err}"
            assert time.monotonic() < give_up, f"nothing happened: {self.out[-3:]} {self.err}"
            time.sleep(0.005)


def command(folder: Path, *arguments: str) -> AbstractContextManager[Command]:
    """Start the `rayssl` command, and leave nothing of it behind."""
    return process(folder, sys.executable, "-m", "pipelines", *arguments)


@contextmanager
def process(folder: Path, *words: str, **extra: str) -> Iterator[Command]:
    """Start a process with more in its environment, and leave nothing of it behind."""
    started = Command(folder, list(words), **extra)
    try:
        yield started
    finally:
        started.end()
