"""Ray: a cluster to join, or a local one of our own, quiet unless asked."""

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import ray
from ray.data import DataContext
from ray.exceptions import AuthenticationError

from pipelines.errors import UserError, brief

Item = TypeVar("Item")
Result = TypeVar("Result")

LOCAL_OBJECT_STORE_BYTES = 1 << 30
"""Travelling blocks are small; Ray would take a third of the memory."""
SPARE_CPUS = 1
"""CPUs of a local Ray beyond those that a run cannot do without."""
GREETING_SECONDS = 5.0
TELL_EVERY_SECONDS = 10.0

_ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # keeps relative paths what they are
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "120",  # a hung worker; 600 by default
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",  # 30 by default, paid at every restart
}
_ADVICE = "\nFailed to apply UDF transform after"
_HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
_HTTP2_SETTINGS = b"\4"


class ClusterError(UserError):
    """The cluster is not there, or too small; exit code 75: try again later."""

    exit_code = 75


@contextlib.contextmanager
def cluster(address: str, num_cpus: int, *, verbose: bool) -> Iterator[None]:
    """Join the cluster at an address, or start a local one and end it afterwards.

    A Ray that this process is connected to already is used and left as it is. `num_cpus` is what
    the caller cannot do without: on fewer CPUs its workers or its data would wait for ever.

    Raises:
        UserError: If the address or the token is not one of a cluster.
        ClusterError: If there is no cluster at the address, or it is too small.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if ray.is_initialized():
        _quiet(verbose)
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS", "")  # a submitted job finds its cluster
    _raise_on_signals()
    try:
        if address:
            _join(address, num_cpus, verbose)
        else:
            _start(num_cpus + SPARE_CPUS, verbose)
        _raise_on_signals()  # Ray has put handlers of its own
        _quiet(verbose)
        yield
    finally:
        ray.shutdown()


def parallel_map(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    done: Callable[[int], None] | None = None,
) -> list[Result]:
    """Return the function's results for all items, in order, made by tasks of the cluster.

    `done` is told from time to time how many are made.

    Raises:
        UserError: The one that an item raised.
    """
    calls = pending = [_call.remote(function, item) for item in items]
    while done and pending:
        _, pending = ray.wait(pending, num_returns=len(pending), timeout=TELL_EVERY_SECONDS)
        done(len(calls) - len(pending))
    try:
        results: list[Result] = ray.get(calls)
    except ray.exceptions.RayTaskError as error:
        raise unwrap(error) from error
    return results


def unwrap(error: BaseException) -> BaseException:
    """Return the error of ours inside one of Ray's, or the error itself.

    Ours comes without the advice that Ray Data puts below its message.
    """
    for inside in causes(error):
        if isinstance(found := unwrap(inside), UserError):
            found.args = (str(found).partition(_ADVICE)[0],)
            return found
    return error


def causes(error: BaseException) -> list[BaseException]:
    """Return the errors that one of Ray's tells of: those of the workers, or its cause."""
    workers = getattr(error, "worker_failures", {}).values()
    others = (getattr(error, name, None) for name in ("cause", "controller_failure", "__cause__"))
    return [found for found in (*workers, *others) if found is not None]


@ray.remote
def _call(function: Any, item: Any) -> Any:
    return function(item)


def _start(num_cpus: int, verbose: bool) -> None:
    try:
        ray.init(
            address="local",
            num_cpus=num_cpus,
            object_store_memory=LOCAL_OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=verbose,
            logging_level=logging.INFO if verbose else logging.ERROR,
        )
    except SystemExit as error:  # how Ray answers a SIGTERM while it starts
        raise KeyboardInterrupt from error
    except Exception as error:  # of many kinds: no room, too long a path, a machine too busy
        raise ClusterError(
            f"a local Ray does not start: {brief(error)}; mend that, or try again"
        ) from error


def _join(address: str, num_cpus: int, verbose: bool) -> None:
    if address != "auto":
        greet(address)
    # Seconds that Ray tries, with a word on standard error each: a wrong token stays wrong.
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "3")
    try:
        with contextlib.nullcontext() if verbose else _muted():
            ray.init(
                address=address,
                # The daemons of other machines were started without what we set here.
                runtime_env={"env_vars": {name: os.environ[name] for name in _ENVIRONMENT}},
                log_to_driver=verbose,
                logging_level=logging.INFO if verbose else logging.ERROR,
            )
    except (AuthenticationError, ConnectionError) as error:
        if "any running Ray instance" in str(error):
            raise ClusterError(
                f"no Ray cluster runs on this machine, where {address!r} looks for one: start it, "
                "or name its HOST:6379"
            ) from error
        raise UserError(
            f"the Ray cluster at {address} does not let us in: is the token the cluster's? "
            "Put it into ~/.ray/auth_token and set RAY_AUTH_MODE=token"
        ) from error
    except (RuntimeError, ValueError) as error:  # another version of Ray, or runtime environment
        raise UserError(f"cannot join the Ray cluster at {address}: {error}") from error
    found = int(ray.cluster_resources().get("CPU", 0))
    if found < num_cpus:
        raise ClusterError(
            f"the Ray cluster at {address} has {found} CPUs where {num_cpus} are needed: add nodes"
            + (", or ask for fewer --workers" if num_cpus > 1 else "")
        )


def greet(address: str) -> None:
    """See that a Ray head listens at an address, which Ray itself takes minutes to find out.

    Raises:
        UserError: If it is no address of a Ray head.
        ClusterError: If nothing listens there.
    """
    host, _, port = address.rpartition(":")
    hint = "a Ray head listens at HOST:6379, unless it was started with another --port"
    if not (host and port.isdigit() and "/" not in host):
        raise UserError(f"{address!r} is no address of a Ray cluster: {hint}")
    try:
        with socket.create_connection((host, int(port)), GREETING_SECONDS) as connection:
            connection.sendall(_HTTP2_GREETING)
            answer = connection.recv(9)
    except (OSError, OverflowError) as error:
        raise ClusterError(f"no Ray cluster at {address}: {error}; {hint}") from error
    if answer[3:4] != _HTTP2_SETTINGS and os.environ.get("RAY_USE_TLS", "0") == "0":
        raise UserError(f"what listens at {address} is no Ray head: {hint}")


@contextlib.contextmanager
def _muted() -> Iterator[None]:
    """Keep from standard error what Ray's C++ prints there."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _raise_on_signals() -> None:
    """End in order on Ctrl-C and on SIGTERM alike: as a KeyboardInterrupt."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)


def _quiet(verbose: bool) -> None:
    context = DataContext.get_current()
    context.enable_progress_bars = verbose
    context.print_on_execution_start = verbose
    context.raise_original_map_exception = True  # or ours would reach the driver as text alone
    # What goes wrong is raised, too, and said once.
    logging.getLogger("ray.data").setLevel(logging.INFO if verbose else logging.CRITICAL)
