"""Workers of Ray Train as the driver sees them: followed while they train, and why they failed."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

from pipelines.cluster import ClusterError, causes


def followed(function: Callable[[], object], *updates: Callable[[], None]) -> BaseException | None:
    """Call updates until a function has ended, and return what it raised, if it did.

    Raises:
        ClusterError: If there was no room for the workers.
    """
    done = _in_thread(function)
    while not done.done():
        for update in updates:
            update()
        time.sleep(0.5)
    error = done.exception()
    if error and isinstance(innermost(error), WorkerGroupStartupTimeoutError):
        raise ClusterError(
            "the cluster has not given the workers their CPUs and GPUs in time: others hold them; "
            "try again later, or ask for fewer --workers"
        ) from error
    return error


def innermost(error: BaseException) -> BaseException:
    """Return the innermost of the errors that one of Ray's tells of."""
    while found := causes(error):
        error = found[0]
    return error


def root_cause(error: BaseException) -> str:
    """Return the innermost error, in a line."""
    found = innermost(error)
    said = str(found).strip().splitlines()[-1:]  # an assertion may say nothing
    return ": ".join([type(found).__name__, *said])


def _in_thread(function: Callable[[], object]) -> Future[object]:
    """Run a function beside the main thread, which stays free for signals and the live line."""
    future: Future[object] = Future()

    def target() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=target, name="fit", daemon=True).start()
    return future
