"""Ray: a cluster to join, or a local one of our own, quiet unless asked."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import ray
from ray.data import DataContext

from pipelines.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

LOCAL_OBJECT_STORE_BYTES = 1 << 30
"""Travelling blocks are small; Ray would take a third of the memory."""

_ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # keeps relative paths what they are
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "120",  # a hung worker; 600 by default
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",  # 30 by default, paid at every restart
}


@contextmanager
def cluster(address: str, num_cpus: int, *, verbose: bool) -> Iterator[None]:
    """Join the cluster at an address, or start a local one and end it afterwards.

    A Ray that this process is connected to already is used and left as it is.

    Raises:
        UserError: If there is no cluster at the address.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if ray.is_initialized():
        _quiet(verbose)
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS", "")  # a submitted job finds its cluster
    level = logging.INFO if verbose else logging.ERROR
    try:
        ray.init(
            address=address or "local",
            num_cpus=None if address else num_cpus,
            object_store_memory=None if address else LOCAL_OBJECT_STORE_BYTES,
            include_dashboard=None if address else False,
            log_to_driver=verbose,
            logging_level=level,
        )
    except (ConnectionError, ValueError) as error:
        raise UserError(f"no Ray cluster at {address!r}: {error}") from error
    try:
        _quiet(verbose)
        yield
    finally:
        ray.shutdown()


def parallel_map(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Return the function's results for all items, in order, made by tasks of the cluster.

    Raises:
        UserError: The one that an item raised.
    """
    try:
        results: list[Result] = ray.get([_call.remote(function, item) for item in items])
    except ray.exceptions.RayTaskError as error:
        raise unwrap(error) from error
    return results


def unwrap(error: BaseException) -> BaseException:
    """Return the error of ours inside one of Ray's, or the error itself."""
    inside = list(getattr(error, "worker_failures", {}).values())
    inside += [e for e in (getattr(error, "cause", None), error.__cause__) if e is not None]
    for candidate in inside:
        if isinstance(found := unwrap(candidate), UserError):
            return found
    return error


@ray.remote
def _call(function: Any, item: Any) -> Any:
    return function(item)


def _quiet(verbose: bool) -> None:
    context = DataContext.get_current()
    context.enable_progress_bars = verbose
    context.print_on_execution_start = verbose
    context.raise_original_map_exception = True  # or ours would reach the driver as text alone
    # What goes wrong is raised, too, and said once.
    logging.getLogger("ray.data").setLevel(logging.INFO if verbose else logging.CRITICAL)
